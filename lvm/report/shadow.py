"""Report of a shadow replay, as plain text for the terminal or as Markdown."""

import math
from collections.abc import Mapping, Sequence

from lvm.report.decision import checks_markdown, decision_text
from lvm.report.tables import (
    LEAKY,
    MARKDOWN,
    TEXT,
    PredictorRow,
    bullet,
    captioned,
    difference_cell,
    interval_cell,
    p_cell,
    predictors_table,
    table,
)
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.decision import Decision


def shadow_table(result: ShadowResult, decision: Decision | None = None, style: str = TEXT) -> str:
    """Return the ranking of a replay, what could not be scored below it."""
    rows = [
        PredictorRow(
            name=_versioned(outcome),
            marks=_marks(outcome, result, decision),
            figures=outcome.figures,
            ci95=outcome.ci95,
            corrected=outcome.corrected,
            corrected_ci95=outcome.corrected_ci95,
        )
        for outcome in result.outcomes
        if outcome.is_scored
    ]
    caption = [
        f"Shadow replay: {result.num_queries:,} queries from {result.num_documents:,} documents, "
        f"ranked over {result.num_rows:,} bank rows",
        f"({result.num_answers:,} distinct), up to {result.removed_ctx:,} context rows removed; "
        f"bank {result.bank_sha256[:12]}; [95 % interval by document]",
        f"queries: {result.source}",
    ]
    body = predictors_table(rows, style) if rows else "No candidate could be scored."
    blocks = [captioned(caption, body, result.leaky)]
    left_out = [o for o in result.outcomes if not o.is_scored]
    if left_out:
        lines = [f"{bullet(style)}{_versioned(o)}: {o.why_unscored}" for o in left_out]
        blocks.append("\n".join(["Not scored:", *([""] if style == MARKDOWN else []), *lines]))
    return "\n\n".join(blocks)


def comparison_table(result: ShadowResult, style: str = TEXT) -> str:
    """Return the paired differences of a replay in points, one line per comparison."""
    lines = []
    for pair in result.comparisons:
        lines.append(
            [
                pair.candidate,
                pair.reference,
                difference_cell(pair.hit_at_5),
                difference_cell(pair.mrr_at_10),
                p_cell(pair.p_holm),
                "none differ" if math.isnan(pair.detectable) else f"{100 * pair.detectable:.1f}",
            ]
        )
    if not lines:
        return "No two candidates could be compared."
    headers = ["candidate", "against", "Hit@5, points", "MRR@10, points", "p (Holm)", "detectable"]
    caption = ["Paired differences on the same queries [95 % interval by document]"]
    body = captioned(caption, table(lines, headers, "llrrrr", style), result.leaky)
    return f"{body}\n\n{detectable_note(result)}"


def detectable_note(result: ShadowResult) -> str:
    """Say how small a difference these queries can still find."""
    smallest = [100 * pair.detectable for pair in result.comparisons if pair.detectable > 0]
    if not smallest:
        return "Detectable: nothing can be said, for no two candidates differ on these queries."
    low, high = f"{min(smallest):.1f}", f"{max(smallest):.1f}"
    span = low if low == high else f"{low} to {high}"
    return (
        f"Detectable: a smaller true difference of Hit@5 ({span} points) is missed by these "
        f"{result.num_queries:,} queries\nin more than one of five cases (80 % power, two-sided "
        "5 %, one comparison); more documents lower it."
    )


def origin_note(result: ShadowResult) -> str:
    """Say in a line or two whose answers were measured now, whose read from the store."""
    origins = dict.fromkeys(one.origin for one in result.outcomes if one.origin)
    named = {x: [one.name for one in result.outcomes if one.origin == x] for x in origins}
    return "\n".join(f"Answers {origin}: {', '.join(names)}." for origin, names in named.items())


def measurement_table(result: ShadowResult, style: str = TEXT) -> str:
    """Return how each candidate was measured: now or before, for how long, with which latency."""
    lines = [
        [
            _versioned(one),
            f"{one.ctx:,}",
            *(f"{one.latency_ms.get(key, math.nan):.1f}" for key in ("p50", "p95")),
            f"{one.seconds:.1f}",
            one.measured_at.replace("T", " ").removesuffix("+00:00"),
            one.origin,
        ]
        for one in result.outcomes
        if one.origin
    ]
    if not lines:
        return "No candidate was measured."
    headers = ["candidate", "ctx", "P50 ms", "P95 ms", "seconds", "measured, UTC", "answers"]
    caption = [
        "Each candidate in its own process; latency of one query whose whole context is read anew,",
        "the model alone, without a search",
    ]
    return captioned(caption, table(lines, headers, "lrrrrll", style), leaky=False)


def history_table(moves: Sequence[Mapping[str, str]], style: str = TEXT) -> str:
    """Return the moves of the alias, the latest first."""
    if not moves:
        return "The alias was never set."
    lines = [
        [
            one["at"].replace("T", " ").removesuffix("+00:00"),
            one["version"],
            one["replaced"],
            one["reason"],
            one["run"][:8],
        ]
        for one in reversed(moves)
    ]
    headers = ["UTC", "baseline", "before", "reason", "run"]
    return table(lines, headers, "lrrll", style)


def shadow_lanes_table(result: ShadowResult, style: str = TEXT) -> str:
    """Return Hit@5 per lane of the first of the ranking, the baseline, the best free predictor."""
    shown = result.leaders()
    if not shown or not shown[0].lanes:
        return "The bank has no lanes."
    lines = []
    for place, lane in enumerate(shown[0].lanes):
        same = [one.lanes[place] for one in shown]
        cells = [interval_cell(x.figures["hit_at_5"], x.ci95["hit_at_5"]) for x in same]
        lines.append([lane.lane, f"{lane.num_queries:,}", f"{lane.num_documents:,}", *cells])
    headers = ["lane", "queries", "documents", *(f"{one.name} %" for one in shown)]
    caption = ["Hit@5 per lane [95 % interval by document]"]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    return captioned(caption, body, result.leaky)


def shadow_markdown(
    result: ShadowResult,
    decision: Decision,
    figure_names: Sequence[str] = (),
    moves: Sequence[Mapping[str, str]] = (),
) -> str:
    """Return the whole report of a shadow evaluation; figures are linked by their file names.

    `moves` are those of the alias before this decision.
    """
    blocks = [
        "# Shadow evaluation",
        decision_text(decision, MARKDOWN),
        "## Ranking",
        shadow_table(result, decision, MARKDOWN),
        "## Paired differences",
        comparison_table(result, MARKDOWN),
        *(f"![{name.rpartition('.')[0].replace('_', ' ')}]({name})" for name in figure_names),
        "## Lanes",
        shadow_lanes_table(result, MARKDOWN),
        "## Every gate",
        checks_markdown(decision),
        "## How it was measured",
        measurement_table(result, MARKDOWN),
        "## The alias before this decision",
        history_table(moves, MARKDOWN),
    ]
    return "\n\n".join(blocks) + "\n"


def _versioned(outcome: Outcome) -> str:
    tag = f"v{outcome.version}"
    is_told = outcome.version is None or outcome.name.endswith(tag)
    return outcome.name if is_told else f"{outcome.name} ({tag})"


def _marks(outcome: Outcome, result: ShadowResult, decision: Decision | None) -> tuple[str, ...]:
    """Say what the predictor is to the alias, before a word on where it comes from."""
    winner = decision.winner if decision is not None else result.baseline_name
    marks = []
    if outcome.name == winner:
        marks.append("baseline" if winner == result.baseline_name else "NEW BASELINE")
    elif outcome.name == result.baseline_name:
        marks.append("was baseline")
    marks.append(outcome.kind)
    if result.leaky or outcome.leak is not None:
        marks.append(LEAKY)
    return tuple(marks)
