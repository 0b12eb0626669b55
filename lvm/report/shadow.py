"""Report of `shadow-eval`: ranking, comparisons, the decision with its gates, figures."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lvm.report.canvas import (
    BLACK,
    FONT,
    GREEN,
    GREY,
    LEGEND,
    LIGHT,
    RED,
    SERIES,
    canvas,
    empty,
    end_labels,
    label,
    legible,
    log_axis,
)
from lvm.report.lanes import lane_figure
from lvm.report.tables import (
    HIT_HEADERS,
    LEAKY,
    MARKDOWN,
    NOTE_LINES,
    TEXT,
    PredictorRow,
    bullet,
    bullets,
    captioned,
    difference_cell,
    hit_cells,
    interval_cell,
    p_cell,
    page_table,
    percent,
    predictors_table,
    queries_line,
    table,
    utc,
    wrapped,
)
from lvm.shadow.comparison import Comparison, Outcome, Reranked, ShadowResult
from lvm.shadow.promotion_gates import Decision

DRY_RUN = "Dry run: no alias is changed; promote=enabled changes it."


def shadow_table(result: ShadowResult, decision: Decision | None = None, style: str = TEXT) -> str:
    """Return the ranking of a replay, then the candidates that could not be scored."""
    is_reranked = "rank_reranked" in result.per_query and bool(
        result.per_query["rank_reranked"].notna().any()
    )
    rows = [
        PredictorRow(
            _versioned(one),
            _marks(one, result, decision),
            one.figures,
            one.ci95,
            one.corrected,
            one.corrected_ci95,
            *((one.served, one.served_ci95) if is_reranked else ()),
        )
        for one in result.outcomes
        if one.is_scored
    ]
    caption = [
        f"Shadow replay: {result.num_queries:,} queries from {result.num_documents:,} documents, "
        f"ranked over {result.num_rows:,} bank rows",
        f"({result.num_answers:,} distinct), up to {result.removed_ctx:,} context rows removed; "
        f"bank {result.bank_sha256[:12]}; [95 % interval by document]",
        f"queries: {result.source}; {_decided_before(result)}",
    ]
    body = predictors_table(rows, style) if rows else "No candidate could be scored."
    blocks = [captioned(caption, body, result.leaky)]
    counting = [_versioned(one) for one in result.outcomes if one.counts_own and one.corrected]
    if counting:
        blocks.append(
            f"Corrected as logged, by the older definition: {', '.join(counting)} (the hubness of "
            "a row counts\npredictions of its own document). All others leave these out."
        )
    unscored = [f"{_versioned(o)}: {o.why_unscored}" for o in result.outcomes if not o.is_scored]
    if unscored:
        gap = "\n\n" if style == MARKDOWN else "\n"
        blocks.append(f"Not scored:{gap}{bullets(unscored, style)}")
    return "\n\n".join(blocks)


def _decided_before(result: ShadowResult) -> str:
    """Say how often the queries have decided: with every reuse a small p-value means less."""
    times = "once" if result.num_earlier == 1 else f"{result.num_earlier} times"
    return f"they have decided {times} before" if result.num_earlier else "their first decision"


def comparison_table(
    result: ShadowResult, decision: Decision | None = None, style: str = TEXT
) -> str:
    """Return the paired differences of a replay in points, one line per comparison.

    Candidates that `decision` did not test have no p-value.
    """
    lines = [
        [
            pair.candidate,
            pair.reference,
            difference_cell(pair.hit_at_5),
            difference_cell(pair.plain_hit_at_5),
            p_cell(pair.hit_at_5.p_value if _is_tested(pair, decision) else math.nan),
            "none differ" if math.isnan(pair.detectable) else f"{100 * pair.detectable:.1f}",
        ]
        for pair in result.comparisons
    ]
    if not lines:
        return "No two candidates could be compared."
    headers = ["candidate", "against", "served", "plain", "p", "detectable"]
    caption = [
        "Paired differences of Hit@5 on the same queries, in points: of the served order, which",
        "decides (corrected, re-ranked where asked), with p where it was tested; and plain",
        "[95 % interval by document]",
    ]
    body = captioned(caption, table(lines, headers, "llrrrr", style), result.leaky)
    return f"{body}\n\n{_detectable_note(result)}"


def _is_tested(pair: Comparison, decision: Decision | None) -> bool:
    return decision is None or pair.candidate in decision.tested


def _detectable_note(result: ShadowResult) -> str:
    """Say how small a difference these queries can detect."""
    smallest = [100 * pair.detectable for pair in result.comparisons if pair.detectable > 0]
    if not smallest:
        return "Detectable: unknown, for no two candidates differ on these queries."
    low, high = f"{min(smallest):.1f}", f"{max(smallest):.1f}"
    span = low if low == high else f"{low} to {high}"
    return (
        f"Detectable: true differences of Hit@5 below {span} points are missed by these "
        f"{result.num_queries:,} queries\nin more than one of five cases (80 % power, two-sided "
        "5 % test, one comparison); more documents lower this limit."
    )


def origin_note(result: ShadowResult) -> str:
    """Say which candidates were measured now and which were read from the store."""
    origins = dict.fromkeys(one.origin for one in result.outcomes if one.origin)
    named = {x: [one.name for one in result.outcomes if one.origin == x] for x in origins}
    return "\n".join(f"Answers {origin}: {', '.join(names)}." for origin, names in named.items())


def measurement_table(result: ShadowResult, style: str = TEXT) -> str:
    """Return when, how long and with what latency each candidate was measured."""
    lines = [
        [
            _versioned(one),
            f"{one.ctx:,}",
            *(f"{one.latency_ms.get(key, math.nan):.1f}" for key in ("p50", "p95")),
            f"{one.seconds:.1f}",
            utc(one.measured_at),
            one.origin,
        ]
        for one in result.outcomes
        if one.origin
    ]
    if not lines:
        return "No candidate was measured."
    headers = ["candidate", "ctx", "P50 ms", "P95 ms", "seconds", "measured, UTC", "answers"]
    caption = [
        "Each candidate runs in its own process; latency: one query with its whole context, the",
        "model alone, without the search",
    ]
    return captioned(caption, table(lines, headers, "lrrrrll", style), leaky=False)


def history_table(moves: Sequence[Mapping[str, str]], style: str = TEXT) -> str:
    """Return the moves of the alias, latest first."""
    if not moves:
        return "The alias was never set."
    lines = [
        [utc(one["at"]), one["version"], one["replaced"], one["reason"], one["run"][:8]]
        for one in reversed(moves)
    ]
    headers = ["UTC", "baseline", "before", "reason", "run"]
    return table(lines, headers, "lrrll", style)


def shadow_lanes_table(result: ShadowResult, style: str = TEXT) -> str:
    """Return Hit@5 per lane of the top candidate, the baseline, the best free predictor."""
    shown = result.leaders()
    if not shown or not shown[0].lanes:
        return "The bank has no lanes."
    lines = []
    for place, lane in enumerate(shown[0].lanes):
        same = [one.lanes[place] for one in shown]
        cells = [interval_cell(x.figures["hit_at_5"], x.ci95["hit_at_5"]) for x in same]
        lines.append([lane.lane, f"{lane.num_queries:,}", f"{lane.num_documents:,}", *cells])
    headers = ["lane", "queries", "documents", *(f"{one.name} %" for one in shown)]
    caption = ["Hit@5 per lane in the served order [95 % interval by document]"]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    return captioned(caption, body, result.leaky)


def shadow_markdown(
    result: ShadowResult,
    decision: Decision,
    is_enabled: bool,
    figure_names: Sequence[str] = (),
    moves: Sequence[Mapping[str, str]] = (),
) -> str:
    """Return the whole report of a shadow evaluation; figures are linked by their file names.

    `moves` are the moves of the alias before this decision.
    """
    blocks = [
        *([] if is_enabled else [f"**{DRY_RUN}**"]),
        "# Shadow evaluation",
        decision_text(decision, MARKDOWN),
        "## Ranking",
        shadow_table(result, decision, MARKDOWN),
        "## Paired differences",
        comparison_table(result, decision, MARKDOWN),
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
    is_named = outcome.version is None or outcome.name.endswith(tag)
    return outcome.name if is_named else f"{outcome.name} ({tag})"


def _marks(outcome: Outcome, result: ShadowResult, decision: Decision | None) -> tuple[str, ...]:
    """Return whether the predictor is the baseline, its kind, whether it is leaky."""
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


def reranked_table(
    outcomes: Sequence[Reranked], rerank: str, leaky: bool, style: str = TEXT
) -> str:
    """Return Hit@k of the re-ranked candidates, the change by re-ranking, and their lead."""
    lines = [
        [
            one.name,
            *hit_cells(one.figures, one.ci95),
            difference_cell(one.change),
            "" if one.lead is None else difference_cell(one.lead),
        ]
        for one in outcomes
    ]
    headers = ["candidate", *HIT_HEADERS, "against original", "against best free"]
    caption = [
        f"Second stage: {rerank} (weights chosen on val for each); paired points of Hit@5 against",
        "its original ranks above, against the best free predictor with the same stage",
    ]
    return captioned(caption, table(lines, headers, "lrrrrr", style), leaky)


def gates_table(decision: Decision, style: str = TEXT) -> str:
    """Return a table of candidates by gates: pass, FAIL, or - if not checked.

    Gates that nobody failed are named above the table.
    """
    gates = list(dict.fromkeys(check.gate for check in decision.checks))
    names = list(dict.fromkeys(check.candidate for check in decision.checks))
    verdicts = {(check.candidate, check.gate): check.passed for check in decision.checks}
    failing = [gate for gate in gates if False in (verdicts.get((name, gate)) for name in names)]
    words = {True: "pass", False: "FAIL", None: "-"}
    lines = [[name, *(words[verdicts.get((name, gate))] for gate in failing)] for name in names]
    headers = ["gate", *(gate.replace(" ", "\n") for gate in failing)]
    caption = [
        "Gates, in the order of the val figures: each challenger is tested at the whole alpha,",
        "until the first that fails",
    ]
    passed = ", ".join(gate for gate in gates if gate not in failing)
    if passed:
        caption.append(wrapped(f"nobody failed: {passed}", style))
    return captioned(caption, table(lines, headers, "l" + "c" * len(failing), style), leaky=False)


def decision_text(decision: Decision, style: str = TEXT) -> str:
    """Return the outcome with its reasons, and the gates.

    The outcome is last on a terminal, which shows the end of its output, and first on a page.
    """
    lines = [wrapped(bullet(style) + reason, style, "    ") for reason in decision.reasons]
    winner = decision.winner or "none yet"
    head = f"Decision: baseline is {winner}"
    if decision.promote:
        before = decision.baseline or "none"
        head += f" (promoted: {', then '.join(decision.promote)}; before: {before})"
    blocks = [head + "\n" * (style == MARKDOWN) + "\n" + "\n".join(lines)]
    if decision.checks:
        blocks.insert(len(blocks) if style == MARKDOWN else 0, gates_table(decision, style))
    return "\n\n".join(blocks)


def checks_markdown(decision: Decision) -> str:
    """Return every gate of every candidate with the numbers that decided it."""
    lines = [
        [check.candidate, check.gate, "pass" if check.passed else "**FAIL**", check.detail]
        for check in decision.checks
    ]
    return table(lines, ["candidate", "gate", "", "numbers"], "llll", MARKDOWN)


def forest_figure(result: ShadowResult) -> Figure:
    """Draw every paired Hit@5 difference with its interval; right of zero is better."""
    figure, [axes] = canvas(
        "Who beats whom? Difference in Hit@5 on the same queries",
        f"{result.num_queries:,} queries from {result.num_documents:,} documents; 95 % "
        "intervals by document",
        result.leaky,
    )
    pairs = sorted(result.comparisons, key=lambda pair: (pair.reference, pair.hit_at_5.mean))
    limit = _forest_limit(pairs)
    labels = []
    for y, pair in enumerate(pairs):
        change = pair.hit_at_5
        mean, low, high = (100 * value for value in (change.mean, change.low, change.high))
        color = GREEN if low > 0 else RED if high < 0 else GREY
        if pair.detectable > 0:
            band = 100 * pair.detectable
            axes.barh(y, 2 * band, left=-band, height=0.62, color=LIGHT, alpha=0.5, zorder=0)
        axes.plot([low, high], [y, y], color=color, linewidth=4, solid_capstyle="butt")
        if abs(mean) < limit:
            axes.plot([mean], [y], "o", color=color, markersize=11)
            label(axes, f"{mean:+.1f}", (mean, y), (0, 11), color=color, ha="center")
        else:
            side, mark = np.sign(mean), "<" if mean < 0 else ">"
            axes.plot([0.985 * side * limit], [y], mark, color=color, markersize=11)
            where, ha = (-15 * side, -5), "left" if mean < 0 else "right"
            label(axes, f"{mean:+.1f}, off the scale", (side * limit, y), where, color=color, ha=ha)
        labels.append(f"{pair.candidate}\nagainst {pair.reference}")
    axes.axvline(0, color=BLACK, linewidth=1.2)
    axes.set_yticks(range(len(pairs)), labels, size=FONT - 2 if len(pairs) <= 16 else FONT - 6)
    axes.set_ylim(-0.6, max(len(pairs), 1) - 0.3)
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("difference in Hit@5, points")
    axes.grid(axis="x", color=LIGHT)
    figure.legend(handles=_forest_legend(), loc="outside lower right", ncols=4, **LEGEND)
    if not pairs:
        empty(axes, "no two candidates could be compared")
    return legible(figure)


def _forest_legend() -> list[Artist]:
    verdicts = {"better": GREEN, "worse": RED, "not shown to differ": GREY}
    marks = [
        Line2D([], [], color=color, linewidth=4, marker="o", markersize=11, label=name)
        for name, color in verdicts.items()
    ]
    return [*marks, Patch(color=LIGHT, alpha=0.5, label="too small to detect here")]


def _forest_limit(pairs: Sequence[Comparison]) -> float:
    """Return the half width in points; pairs far beyond most others do not widen it."""
    ends = [100 * max(abs(p.hit_at_5.low), abs(p.hit_at_5.high), p.detectable) for p in pairs]
    reach = [end for end in ends if np.isfinite(end)]
    if not reach:
        return 5.0
    return 1.2 * max(1.0, *(end for end in reach if end <= max(3 * np.median(reach), 5.0)))


def rank_figure(result: ShadowResult) -> Figure:
    """Draw the share of queries answered within the first k as served, for every k."""
    figure, [axes] = canvas(
        "How far down is the answer?",
        f"share of {result.num_queries:,} queries whose answer is among the first k of "
        f"{result.num_answers:,}; dotted: a random order",
        result.leaky,
    )
    last = min(result.num_answers, 1000)
    k_K = np.unique(np.geomspace(1, max(2, last), 200).round())
    ends = []
    for place, one in enumerate(one for one in result.outcomes if one.is_scored):
        own = result.per_query["candidate"] == one.name
        rank_Q = np.sort(result.per_query.loc[own, "rank_served"])
        share_K = 100 * np.searchsorted(rank_Q, k_K, side="right") / len(rank_Q)
        color, dashes = SERIES[place % len(SERIES)], "-" if place < len(SERIES) else "--"
        axes.plot(k_K, share_K, color=color, linestyle=dashes, linewidth=2.5)
        name = one.name if one.leak is None else f"{one.name} (LEAKY)"
        ends.append((float(share_K[-1]), name, color))
    axes.plot(k_K, 100 * k_K / result.num_answers, ":", color=GREY, linewidth=2)
    log_axis(axes, [k for k in (1, 5, 10, 50, 100, 500, 1000) if k <= last])
    axes.set_xlim(1, k_K[-1])
    axes.set_ylim(0, max([5.0, *(1.08 * value for value, _, _ in ends)]))
    end_labels(axes, ends)
    axes.set_xlabel("k (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %")
    axes.grid(color=LIGHT)
    return legible(figure)


def shadow_lane_figure(result: ShadowResult) -> Figure:
    """Draw Hit@5 per lane of the top candidate, the baseline, the best free predictor."""
    shown = result.leaders()
    if not shown or not shown[0].lanes:
        figure, [axes] = canvas("Hit@5 per lane", "no lane was measured", result.leaky)
        empty(axes, "no candidate was scored" if not shown else "the bank has no lanes")
        return legible(figure)
    measured = {one.name: one.lanes for one in shown}
    overall = {one.name: one.served["hit_at_5"] for one in shown}
    return lane_figure(measured, overall, result.leaky)


def shadow_text(
    result: ShadowResult, decision: Decision, is_enabled: bool, failure: str | None
) -> str:
    """Return the report for the terminal; a failed promotion is reported at its end."""
    blocks = [] if is_enabled else [DRY_RUN]
    blocks += [
        shadow_table(result, decision),
        comparison_table(result, decision),
        origin_note(result),
        decision_text(decision),
    ]
    if failure is not None:
        blocks.append(failure)
    return "\n\n".join(blocks)


def shadow_note(result: ShadowResult, decision: Decision, is_enabled: bool) -> str:
    """Return the decision, the top candidates, the reasons."""
    mode = "" if is_enabled else f"{DRY_RUN} "
    scored = [one for one in result.outcomes if one.is_scored]
    lines = [_outcome_line(one, decision) for one in scored[:NOTE_LINES]]
    headers = ["candidate", "ctx", "Hit@5 % as served", "plain Hit@5 %", ""]
    caption = [queries_line(result.num_queries, result.num_documents, result.num_rows)]
    blocks = [
        f"{mode}**Baseline: {decision.winner or 'none'}**",
        captioned(caption, page_table(lines, headers, "lrrrl"), result.leaky),
        bullets(decision.reasons[:NOTE_LINES], MARKDOWN),
    ]
    return "\n\n".join(blocks)


def _outcome_line(one: Outcome, decision: Decision) -> list[str]:
    marks = ["baseline"] * (one.name == decision.winner) + [one.kind] + [LEAKY] * bool(one.leak)
    hit = interval_cell(one.served["hit_at_5"], one.served_ci95["hit_at_5"])
    plain = percent(one.figures["hit_at_5"])
    return [one.name, f"{one.ctx:,}", hit, plain, ", ".join(marks)]
