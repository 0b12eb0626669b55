"""Cells of a table, aligned to text or Markdown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from lvm.evaluation.intervals import Difference, points

TEXT, MARKDOWN = "simple", "pipe"
HITS = ("hit_at_1", "hit_at_5", "hit_at_10")
LEAKY = "LEAKY"
LEAKY_NOTE = "LEAKY: training saw rows of these queries; no figure here is evidence."


@dataclass(frozen=True)
class PredictorRow:
    """One predictor of the table: fractions with 95 % intervals; `marks` stand under its name."""

    name: str
    marks: tuple[str, ...]
    figures: Mapping[str, float]
    ci95: Mapping[str, Sequence[float | None]]
    corrected: Mapping[str, float]
    corrected_ci95: Mapping[str, Sequence[float | None]]


def predictors_table(rows: Sequence[PredictorRow], style: str = TEXT) -> str:
    """Return a plain and a corrected line per predictor: Hit@k in percent, the median rank.

    A page has room for MRR@10, too, and for the marks beside the name.
    """
    is_page = style == MARKDOWN
    shown = (*HITS, "mrr_at_10") if is_page else HITS
    lines = []
    for row in rows:
        first, second = row.name, f"  {', '.join(row.marks)}" if row.marks else ""
        if is_page:
            first, second = ", ".join([row.name, *row.marks]), ""
        lines.append([first, "plain", *_figure_cells(row.figures, row.ci95, shown)])
        if row.corrected:
            cells = _figure_cells(row.corrected, row.corrected_ci95, shown)
            lines.append([second, "corrected", *cells])
        elif second:
            lines.append([second, *[""] * (len(shown) + 2)])
    headers = ["predictor", "score", "Hit@1 %", "Hit@5 %", "Hit@10 %"]
    headers += ["MRR@10 %", "median rank"] if is_page else ["median\nrank"]
    return table(lines, headers, "ll" + "r" * (len(shown) + 1), style)


def interval_cell(value: float, interval: Sequence[float | None]) -> str:
    """Write a fraction in percent with its interval: `17.2 [15.5, 19.0]`.

    Where it is None or NaN, as for queries of one document, it is unknown.
    """
    low, high = interval
    if low is None or high is None or math.isnan(low):
        return f"{percent(value)} [unknown]"
    return f"{percent(value)} [{percent(low):>4}, {percent(high):>4}]"


def read_difference(entry: Mapping[str, Any]) -> Difference:
    """Return the difference that a JSON report holds; None there stands for NaN."""
    values: dict[str, Any] = {
        key: math.nan if value is None else value for key, value in entry.items()
    }
    return Difference(**values)


def difference_cell(difference: Difference) -> str:
    """Write a difference in points for a column: `+1.2 [ +0.4,  +2.0]`."""
    return points(difference, width=5)


def p_cell(p_value: float) -> str:
    """Write a p-value with four digits; a dash where there is none."""
    if math.isnan(p_value):
        return "-"
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def percent(fraction: float) -> str:
    """Write a fraction in percent with one digit."""
    return f"{100 * fraction:.1f}"


def table(
    lines: Sequence[Sequence[str]], headers: Sequence[str], alignment: str, style: str
) -> str:
    """Align lines of cells; `alignment` has one of l, c, r for each column."""
    names = {"l": "left", "r": "right", "c": "center"}
    columns = [names[letter] for letter in alignment]
    text = tabulate(
        lines,
        headers,
        style,
        colalign=columns,
        headersalign=columns,
        disable_numparse=True,
        preserve_whitespace=style == TEXT,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def captioned(caption: Sequence[str], body: str, leaky: bool) -> str:
    """Put lines of caption above a table, the warning of a leak among them."""
    lines = [*caption, *([LEAKY_NOTE] if leaky else [])]
    return "\n".join([*lines, "", body])


def fenced(text: str) -> str:
    """Return text that a Markdown page shows as it stands."""
    return f"```\n{text}\n```"


def bullet(style: str) -> str:
    """Return what a line of a list begins with."""
    return "* " if style == MARKDOWN else "  "


def _figure_cells(
    figures: Mapping[str, float],
    ci95: Mapping[str, Sequence[float | None]],
    shown: Sequence[str],
) -> list[str]:
    return [*(interval_cell(figures[k], ci95[k]) for k in shown), f"{figures['median_rank']:,.0f}"]
