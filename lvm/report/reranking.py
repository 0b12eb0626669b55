"""Table of what re-ranking by lane does."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvm.report.tables import (
    HITS,
    TEXT,
    captioned,
    difference_cell,
    interval_cell,
    p_cell,
    percent,
    read_difference,
    table,
)
from lvm.shadow.comparison import Reranked

ORDERS = {
    "lane": "cos / tau + beta log p",
    "old_rule": "0.7 cos + 0.3 alignment",
    "true_lane": "true lane first: the ceiling",
}


def reranking_table(
    reranked: Mapping[str, Any], report: Mapping[str, Any], leaky: bool, style: str = TEXT
) -> str:
    """Return the ranks as they were above those of each order; what of the lane is foretold.

    `reranked` is the report of `evaluate_reranking`, `report` that of the evaluation before it.
    """
    lines = []
    for kind, before in (("plain", report), ("corrected", report["corrected"])):
        lines.append([kind, "as ranked", *_hits(before), "", ""])
        found = reranked[kind]
        for key, name in ORDERS.items():
            entry = found if key == "lane" else found[key]
            lines.append(["", name, *_hits(entry), *_change(entry["hit_at_5_difference"])])
    headers = ["score", "order", "Hit@1 %", "Hit@5 %", "Hit@10 %", "Hit@5, points", "p"]
    caption = [
        f"Re-ranking the best {reranked['shortlist']} of each query by lane; points against the "
        "order as ranked",
        f"plain: {_weights(reranked['plain'])}; corrected: {_weights(reranked['corrected'])}; both "
        "chosen on val",
    ]
    known = reranked["classifier"]
    told = (
        f"The lane of the next row is foretold in {percent(known['accuracy'])} % of the queries "
        f"(the commonest lane: {percent(known['commonest_lane'])} %); calibration error "
        f"{percent(known['calibration_error'])} points.\nThe truth is on the list of "
        f"{percent(reranked['plain']['on_list'])} % of the queries."
    )
    return f"{captioned(caption, table(lines, headers, 'llrrrrr', style), leaky)}\n\n{told}"


def reranked_table(outcomes: Sequence[Reranked], leaky: bool, style: str = TEXT) -> str:
    """Return the re-ranked candidates of a replay, what it changed, their lead."""
    lines = [
        [
            one.name,
            *(interval_cell(one.figures[key], one.ci95[key]) for key in HITS),
            difference_cell(one.change),
            "" if one.lead is None else difference_cell(one.lead),
        ]
        for one in outcomes
    ]
    headers = [
        "candidate",
        "Hit@1 %",
        "Hit@5 %",
        "Hit@10 %",
        "against as ranked",
        "against best free",
    ]
    caption = [
        "Re-ranked by lane (tau, beta chosen on val for each); points of Hit@5, paired",
        "against its own ranks above, against the best free predictor re-ranked as well",
    ]
    return captioned(caption, table(lines, headers, "lrrrrr", style), leaky)


def _weights(entry: Mapping[str, Any]) -> str:
    return f"tau {entry['tau']:.3f}, beta {entry['beta']:g}"


def _hits(entry: Mapping[str, Any]) -> list[str]:
    return [interval_cell(entry[key], entry["ci95"][key]) for key in HITS]


def _change(entry: Mapping[str, Any]) -> list[str]:
    difference = read_difference(entry)
    return [difference_cell(difference), p_cell(difference.p_value)]
