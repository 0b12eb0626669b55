"""Cells and tables as plain text for the terminal or as Markdown, shared by all reports."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from lvm.evaluation.metrics import Difference, points

TEXT, MARKDOWN = "simple", "pipe"
HITS = ("hit_at_1", "hit_at_5", "hit_at_10")
SERVED = ("hit_at_5",)  # what is shown of the served order
HIT_HEADERS = ("Hit@1 %", "Hit@5 %", "Hit@10 %")
LEAKY = "LEAKY"
LEAKY_NOTE = (
    "LEAKY: training saw rows of these queries, so no figure here is evidence; export with "
    "split=document and train again."
)
WIDTH = 100  # characters per line of a paragraph in the terminal
NOTE_LINES = 10  # candidates and reasons at most: MLflow limits the length of a description
SPACE = "&ensp;"  # the tables of MLflow's pages have no space between their cells
CI95 = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class PredictorRow:
    """One predictor of the table: fractions with 95 % intervals; `marks` are shown below its name.

    `reranked` is empty unless its best candidates were re-ranked.
    """

    name: str
    marks: tuple[str, ...]
    figures: Mapping[str, float]
    ci95: CI95
    corrected: Mapping[str, float]
    corrected_ci95: CI95
    reranked: Mapping[str, float] = field(default_factory=dict)
    reranked_ci95: CI95 = field(default_factory=dict)


def predictors_table(rows: Sequence[PredictorRow], style: str = TEXT) -> str:
    """Return lines of plain, corrected and re-ranked scores per predictor, where it has these.

    Hit@k in percent, and the median rank; in Markdown also MRR@10, with the marks beside the name.
    The last line of a predictor is its served order.
    """
    is_page = style == MARKDOWN
    shown = (*HITS, "mrr_at_10") if is_page else HITS
    lines = []
    for row in rows:
        first, second = row.name, f"  {', '.join(row.marks)}" if row.marks else ""
        if is_page:
            first, second = ", ".join([row.name, *row.marks]), ""
        scores = [
            ("plain", row.figures, row.ci95),
            ("corrected", row.corrected, row.corrected_ci95),
        ]
        scores.append(("re-ranked", row.reranked, row.reranked_ci95))
        cells = [[name, *figure_cells(f, ci95, shown)] for name, f, ci95 in scores if f]
        if len(cells) == 1 and second:
            cells.append([""] * (len(shown) + 2))
        names = [first, *[second] * (len(cells) > 1), *[""] * (len(cells) - 2)]
        lines += [[name, *line] for name, line in zip(names, cells, strict=True)]
    headers = ["predictor", "score", *HIT_HEADERS]
    headers += ["MRR@10 %", "median rank"] if is_page else ["median\nrank"]
    return table(lines, headers, "ll" + "r" * (len(shown) + 1), style)


def served_hit_at_5(figures: Mapping[str, float], corrected: Mapping[str, float] | None) -> float:
    """Return Hit@5 of the served order of a report: corrected if there is a correction."""
    return (corrected or figures)["hit_at_5"]


def interval_cell(value: float, interval: Sequence[float | None]) -> str:
    """Write a fraction in percent with its interval: `17.2 [15.5, 19.0]`.

    An interval of None or NaN, as for queries of one document, is written as unknown.
    """
    low, high = interval
    if low is None or high is None or math.isnan(low):
        return f"{percent(value)} [unknown]"
    return f"{percent(value)} [{percent(low):>4}, {percent(high):>4}]"


def hit_cells(figures: Mapping[str, Any], ci95: CI95, shown: Sequence[str] = HITS) -> list[str]:
    """Write Hit@1, 5, 10 (or the figures of `shown`) in percent, each with its interval."""
    return [interval_cell(figures[key], ci95[key]) for key in shown]


def figure_cells(figures: Mapping[str, Any], ci95: CI95, shown: Sequence[str] = HITS) -> list[str]:
    """Write the cells of `hit_cells`, then the median rank."""
    return [*hit_cells(figures, ci95, shown), f"{figures['median_rank']:,.0f}"]


def hit_metrics(
    prefix: str, figures: Mapping[str, Any], ci95: CI95, shown: Sequence[str] = HITS
) -> dict[str, float]:
    """Return figures as metrics with the bounds of their intervals: test/hit_at_5, ..._low, _high.

    Unknown bounds, as for queries of one document, are omitted.
    """
    found: dict[str, float] = {}
    for key in shown:
        bounds = zip(("", "_low", "_high"), (figures[key], *ci95[key]), strict=True)
        found |= {f"{prefix}{key}{end}": float(v) for end, v in bounds if v is not None and v == v}
    return found


def order_metrics(
    prefix: str, plain: Mapping[str, Any], served: Mapping[str, Any]
) -> dict[str, float]:
    """Return `hit_metrics` of the plain order, and `corrected_hit_at_5` of the served one."""
    metrics = hit_metrics(prefix, plain, plain["ci95"])
    return metrics | hit_metrics(f"{prefix}corrected_", served, served["ci95"], SERVED)


def read_difference(entry: Mapping[str, Any]) -> Difference:
    """Return the difference stored in a JSON report, where None stands for NaN."""
    values: dict[str, Any] = {
        key: math.nan if value is None else value for key, value in entry.items()
    }
    return Difference(**values)


def difference_cell(difference: Difference) -> str:
    """Write a difference in points for a column: `+1.2 [ +0.4,  +2.0]`."""
    return points(difference, width=5)


def p_cell(p_value: float) -> str:
    """Write a p-value with four digits, NaN as a dash."""
    if math.isnan(p_value):
        return "-"
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def percent(fraction: float) -> str:
    """Write a fraction in percent with one digit."""
    return f"{100 * fraction:.1f}"


def utc(timestamp: str) -> str:
    """Write an ISO timestamp of UTC for a column that is headed UTC."""
    return timestamp.replace("T", " ").removesuffix("+00:00")


def table(
    lines: Sequence[Sequence[str]], headers: Sequence[str], alignment: str, style: str
) -> str:
    """Align lines of cells; `alignment` has one of l, c, r for each column."""
    names = {"l": "left", "r": "right", "c": "center"}
    columns = [names[letter] for letter in alignment]
    text = tabulate(
        lines,
        headers if style == TEXT else [header.replace("\n", " ") for header in headers],
        style,
        colalign=columns,
        headersalign=columns,
        disable_numparse=True,
        preserve_whitespace=style == TEXT,
    )
    return "\n".join(line.rstrip() for line in text.splitlines())


def page_table(lines: Sequence[Sequence[str]], headers: Sequence[str], alignment: str) -> str:
    """Return a Markdown table for MLflow's pages."""
    spaced = [[first, *(SPACE + cell for cell in others)] for first, *others in lines]
    names = [headers[0], *(SPACE + name for name in headers[1:])]
    return table(spaced, names, alignment, MARKDOWN)


def captioned(caption: Sequence[str], body: str, leaky: bool) -> str:
    """Put the lines of a caption above a table; leaky results get a warning there."""
    lines = [*caption, *([LEAKY_NOTE] if leaky else [])]
    return "\n".join([*lines, "", body])


def fenced(text: str) -> str:
    """Return text as a Markdown code block."""
    return f"```\n{text}\n```"


def bullet(style: str) -> str:
    """Return the beginning of a list item."""
    return "* " if style == MARKDOWN else "  "


def bullets(lines: Iterable[str], style: str) -> str:
    """Return lines as list items."""
    return "\n".join(bullet(style) + line for line in lines)


def wrapped(text: str, style: str, hanging: str = "") -> str:
    """Break a paragraph into lines for the terminal; Markdown stays one line.

    `hanging` indents all lines but the first.
    """
    if style == MARKDOWN:
        return text
    return textwrap.fill(text, WIDTH, subsequent_indent=hanging, break_on_hyphens=False)


def queries_line(queries: int, documents: int, rows: int) -> str:
    """Return how many queries were asked over how many bank rows."""
    return (
        f"{queries:,} queries from {documents:,} documents over {rows:,} bank rows "
        "[95 % interval by document]"
    )
