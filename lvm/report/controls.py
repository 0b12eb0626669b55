"""Table of the controls of an evaluation."""

from collections.abc import Mapping
from typing import Any

from lvm.evaluation.controls import longest_beaten
from lvm.evaluation.intervals import Difference, points
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


def controls_table(controls: Mapping[str, Any], leaky: bool, style: str = TEXT) -> str:
    """Return Hit@k by rows of context, what that shows, the two controls of order below it."""
    lines = []
    for entry in controls["context"]:
        cells = [interval_cell(entry[key], entry["ci95"][key]) for key in HITS]
        is_full = "p_holm" not in entry
        paired = ["", ""] if is_full else [difference_cell(_change(entry)), p_cell(entry["p_holm"])]
        lines.append([f"{entry['ctx']:,}", *cells, *paired])
    headers = ["rows read", "Hit@1 %", "Hit@5 %", "Hit@10 %", "Hit@5 - full, points", "p (Holm)"]
    caption = [
        f"Context: the same {controls['queries']:,} queries from {controls['documents']:,} "
        "documents, the same rows removed,",
        "the predictor given the last rows alone [95 % interval by document]",
    ]
    blocks = [captioned(caption, table(lines, headers, "rrrrrr", style), leaky), _verdict(controls)]
    return "\n\n".join([*blocks, "\n".join(_order_lines(controls))])


def _verdict(controls: Mapping[str, Any]) -> str:
    """Say what the truncated contexts show, which is the whole evidence on context."""
    beaten = longest_beaten(controls)
    if beaten is None:
        return (
            f"Context is not shown to pay: no shorter one is shown to be worse than all "
            f"{controls['ctx']:,} rows on these queries."
        )
    gain = -beaten["hit_at_5_difference"]["mean"]
    return (
        f"Context pays beyond {beaten['ctx']:,} rows: all {controls['ctx']:,} give "
        f"{percent(gain)} points of Hit@5 more than the last {beaten['ctx']:,} alone."
    )


def _order_lines(controls: Mapping[str, Any]) -> list[str]:
    """Write a line for the shuffled context, one for the reversed ridge where it was asked."""
    shuffled, ridge = controls["shuffled"], controls["reversed_ridge"]
    ordered = percent(shuffled["ordered"]["hit_at_5"])
    lines = [
        f"Shuffled, all rows but the last ({shuffled['queries']:,} queries): Hit@5 "
        f"{percent(shuffled['hit_at_5'])} %, in order {ordered} %, "
        f"{points(_change(shuffled))} points, p = {_p_value(shuffled)}."
    ]
    if ridge is not None:
        lines.append(
            f"Arrow of time, ridge ({ridge['queries']:,} queries): Hit@5 of the row after its "
            f"context {percent(ridge['forward']['hit_at_5'])} %, of the same row before it "
            f"{percent(ridge['backward']['hit_at_5'])} %, {points(_change(ridge))} points, "
            f"p = {_p_value(ridge)}."
        )
    return lines


def _change(entry: Mapping[str, Any]) -> Difference:
    return read_difference(entry["hit_at_5_difference"])


def _p_value(entry: Mapping[str, Any]) -> str:
    return p_cell(entry["hit_at_5_difference"]["p_value"])
