"""Tables of an evaluation, as plain text for the terminal or as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from lvm.evaluation.intervals import points
from lvm.evaluation.lane_diagnosis import Diagnosis
from lvm.report.tables import (
    LEAKY,
    TEXT,
    PredictorRow,
    captioned,
    difference_cell,
    interval_cell,
    p_cell,
    percent,
    predictors_table,
    read_difference,
    table,
)


def evaluation_table(report: Mapping[str, Any], style: str = TEXT) -> str:
    """Return the report of `eval` as a table: the model among the free predictors, best first."""
    leaky = bool(report["leaky"])
    rows = [_report_row(report["model"], report, ["model"] + [LEAKY] * leaky)]
    for name, entry in report["baselines"].items():
        rows.append(_report_row(name, entry, ["free"] + [LEAKY] * leaky))
    rows.sort(key=lambda row: -row.figures["hit_at_5"])
    caption = [
        f"Predictors on the {report['split']} split: {report['queries']:,} queries from "
        f"{report['documents']:,} documents, ranked over {report['bank_rows']:,} bank rows",
        f"({report['candidates']:,} distinct), up to {report['ctx']:,} context rows removed; "
        f"bank {report['bank_sha256'][:12]}; [95 % interval by document]",
    ]
    oracle = percent(report["oracle"]["hit_at_5"])
    blocks = [
        captioned(caption, predictors_table(rows, style), leaky),
        f"Ceiling: a search with the answer itself has Hit@5 {oracle} %.",
    ]
    if report.get("hubness_counts_own"):
        blocks[1] += (
            f"\n{report['model']} is corrected as it was logged: the hubness of a row counts "
            "predictions of its own document, that of the free predictors does not."
        )
    best = report["best_baseline"]
    if best is not None:
        difference = read_difference(best["hit_at_5_difference"])
        blocks[1] += (
            f"\nAgainst {best['name']}, the best free predictor, in points of Hit@5: "
            f"{points(difference)}, p = {p_cell(difference.p_value)}."
        )
    return "\n\n".join(blocks)


def serving_lines(report: Mapping[str, Any]) -> str:
    """Return two lines: the serving index with its agreement, and what an answer takes."""
    index, times = report["index"], report["latency_ms"]
    return (
        f"Serving: {index['description']}; on these queries {index['agreement']:.3f}.\n"
        f"One answer, P95 in ms: cold context {times['p95']:.1f}, "
        f"warm stream with search {times['warm_p95']:.1f}, search alone {times['index_p95']:.1f}."
    )


def lanes_table(diagnosis: Diagnosis, style: str = TEXT) -> str:
    """Return the lanes from the lowest Hit@5 up, the top confusions, the decision."""
    lines = []
    for lane in sorted(diagnosis.lanes, key=lambda lane: lane.figures["hit_at_5"]):
        supply = diagnosis.supply.get(lane.lane)
        lines.append(
            [
                lane.lane,
                f"{lane.num_queries:,}",
                f"{lane.num_documents:,}",
                f"{supply.num_chains:,}" if supply else "",
                interval_cell(lane.figures["hit_at_5"], lane.ci95["hit_at_5"]),
                lane.best_baseline or "",
                difference_cell(lane.lift) if lane.lift else "",
                _lane_marks(lane.lane, diagnosis),
            ]
        )
    headers = ["lane", "queries", "documents", "chains", "Hit@5 %", "best free", "lift, points", ""]
    caption = [
        f"Lanes of {diagnosis.model}: {diagnosis.num_queries:,} queries, Hit@5 "
        f"{percent(diagnosis.hit_at_5)} % over all [95 % interval by document]"
    ]
    body = table(lines, headers, "lrrrrlrl", style)
    blocks = [captioned(caption, body, diagnosis.leaky)]
    if diagnosis.pairs:
        pairs = [
            [
                pair.truth,
                pair.found,
                f"{pair.count:,}",
                percent(pair.share),
                f"{pair.excess:+,.0f}",
            ]
            for pair in diagnosis.pairs
        ]
        headers = ["lane of the answer", "lane of the first hit", "queries", "share %", "excess"]
        caption = ["Confusions, by how much they exceed chance"]
        body = table(pairs, headers, "llrrr", style)
        blocks.append(captioned(caption, body, diagnosis.leaky))
    return "\n\n".join([*blocks, diagnosis.sentence])


def _report_row(name: str, entry: Mapping[str, Any], marks: Sequence[str]) -> PredictorRow:
    corrected = entry.get("corrected") or {}
    return PredictorRow(
        name=name,
        marks=tuple(marks),
        figures=entry,
        ci95=entry["ci95"],
        corrected=corrected,
        corrected_ci95=corrected.get("ci95", {}),
    )


def _lane_marks(lane: str, diagnosis: Diagnosis) -> str:
    marks = {
        "WEAK": lane in diagnosis.weak,
        "weak by the old rule": lane in diagnosis.weak_old_rule,
        "too few queries to judge": lane in diagnosis.unjudged,
    }
    return ", ".join(mark for mark, holds in marks.items() if holds)
