"""Report of `phases`: published figures beside those of one evaluation for all phases."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvm.evaluation.metrics import POOLS, points
from lvm.report.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREEN,
    GREY,
    LEGEND,
    LIGHT,
    ORANGE,
    RED,
    canvas,
    label,
    legible,
)
from lvm.report.tables import (
    HIT_HEADERS,
    HITS,
    MARKDOWN,
    TEXT,
    bullets,
    captioned,
    difference_cell,
    figure_cells,
    interval_cell,
    p_cell,
    percent,
    table,
    wrapped,
)
from lvm.retrieval.rerank import NONE
from lvm.studies.phase_comparison import OLD_GATES, Measured, OldCheck, Pair, PhaseComparison, Row
from lvm.studies.phases import Job, OldDifference, Phase, published_report
from lvm.training.guard import planned_warnings

NOTHING = "-"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
COLORS, SIDES = {"dense": GREEN, "seed": BLUE}, {"dense": -1, "seed": 1}


@dataclass(frozen=True)
class PhaseStory:
    """What the report adds to the comparison: all phases, the old decision, the new one.

    `winner` is the candidate that is the baseline now, and `reasons` say why. `checks` holds the
    old gates; it is empty if they are off.
    """

    phases: Mapping[str, Phase]
    old: OldDifference
    winner: str | None
    reasons: Sequence[str]
    is_enabled: bool
    checks: Sequence[OldCheck] = field(default=())


def published_table(phases: Mapping[str, Phase], style: str = TEXT) -> str:
    """Return the old figures with Wilson intervals, each phase ranked in its own pool."""
    lines = []
    for one in phases.values():
        if one.published is None:
            lines.append([one.name, f"{one.ctx:,}", *[NOTHING] * 7])
            continue
        report = published_report(one.published)
        hits = [_published_cell(report[key], report["ci95"][key]) for key in HITS]
        epochs = f"{report['best_epoch']} of {report['last_epoch']}"
        counts = [f"{report[key]:,}" for key in ("pool", "windows", "steps")]
        lines.append([one.name, f"{one.ctx:,}", *hits, *counts, epochs])
    headers = ["phase", "ctx", *HIT_HEADERS, "candidates", "windows", "steps", "best epoch"]
    caption = [
        "As published by the replaced system: each phase ranked among its own validation targets",
        "[95 % Wilson interval; the candidates are also the queries]",
    ]
    return captioned(caption, table(lines, headers, "lr" + "r" * 7, style), leaky=False)


def phases_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return the phases under one evaluation, with the best free predictor."""
    lines = []
    for row in found.rows:
        report, plan = row.trained.report, row.trained.report["plan"]
        name = row.name if row.order == NONE else f"{row.name}, by lane"
        training = [f"{plan['examples_per_epoch']:,}", f"{report['optimiser_steps']:,}"]
        training.append(f"{report['best_epoch']} of {len(report['history'])}")
        marks = f"v{row.trained.version}" if row.same_as is None else f"same as {row.same_as}"
        ctx = f"{row.trained.phase.ctx:,}"
        lines.append([name, ctx, *_cells(row.measured), *training, marks])
    free = [(found.free.name, found.free.measured)]
    if found.free_by_lane is not None:
        free.append((f"{found.free_by_lane.name}, by lane", found.free_by_lane.measured))
    for name, measured in free:
        lines.append([name, "", *_cells(measured), "", "", "", "free"])
    headers = ["phase", "ctx", *HIT_HEADERS, "median\nrank"]
    headers += ["examples\nan epoch", "steps", "best\nepoch", "version"]
    caption = [
        f"One evaluation: {found.num_queries:,} queries from {found.num_documents:,} documents, "
        f"ranked over {found.num_rows:,} bank rows",
        f"({found.num_answers:,} distinct), the same for every phase; [95 % interval by document]",
    ]
    body = captioned(caption, table(lines, headers, "lr" + "r" * 7 + "l", style), leaky=False)
    shown = [(row.name, row.measured) for row in found.distinct] + free[:1]
    served = [f"{name} {interval_cell(*one.served)}" for name, one in shown if one.served]
    if not served:
        return body
    return f"{body}\n\n{wrapped('Hit@5 % as served (corrected): ' + '; '.join(served), style)}"


def pools_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return Hit@5 of the same ranks among fewer candidates, beside the published figures."""
    named = [(row.name, row.measured, row) for row in found.distinct]
    lines = []
    for name, measured, row in [*named, (found.free.name, found.free.measured, None)]:
        if not measured.pools:
            continue
        cells = [percent(measured.figures["hit_at_5"]), *_pool_cells(measured)]
        published = None if row is None else row.trained.phase.published
        own = reported = NOTHING
        if published is not None:
            own = _pool_cell(measured, published.pool)
            reported = f"{100 * published.hit_at_5:.2f} (of {published.pool:,})"
        lines.append([name, *cells, own, reported])
    headers = ["phase", "whole bank", *(f"{pool:,}" for pool in reversed(POOLS))]
    headers += ["in its old pool", "published"]
    caption = [
        "Hit@5 %, expected from the same raw ranks in smaller candidate pools (hypergeometric)"
    ]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    body = captioned(caption, body, leaky=False)
    return f"{body}\n\n{wrapped(_pool_note(found), style)}"


def _pool_note(found: PhaseComparison) -> str:
    """Say how much the pool size alone changes the figures of one model."""
    row = found.as_ranked
    if row is None:
        return (
            "Every phase here is re-ranked by lane, and re-ranked lists have no equivalent in a "
            "smaller pool: nothing to compare. Add a phase without re-ranking."
        )
    pools = sorted(row.measured.pools)
    if len(pools) < 2:
        return "The bank is smaller than the old pools: nothing to compare. Take a larger bank."
    few, many = pools[0], pools[-1]
    low, high = (percent(row.measured.pools[pool]["hit_at_5"]) for pool in (many, few))
    return (
        f"The model of phase {row.name}, unchanged, answers {low} % among {many:,} candidates, "
        f"{high} % among {few:,}. The old pools shrank from 1,149 to 58 as the context grew, which "
        "alone may explain the rise in the published column."
    )


def pairs_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return the paired differences between phases, then against the best free predictor."""
    headers = ["phase", "against", "Hit@5, points", "Hit@10, points", "p (Holm)", "detectable"]
    lines = [_pair_cells(pair) for pair in (*found.successive, *found.leads)]
    caption = [
        "Paired differences on the same queries [95 % interval by document]; detectable: points of",
        "Hit@5, 80 % power; a phase by lane is compared with the best free predictor by lane",
        f"p (Holm) of Hit@5, in two families: {len(found.successive)} between phases, "
        f"{len(found.leads)} against a free predictor",
    ]
    return captioned(caption, table(lines, headers, "llrrrr", style), leaky=False)


def old_decision_text(old: OldDifference, style: str = TEXT) -> str:
    """Return the old decision with its missing interval."""
    interval = f"[{100 * old.low:+.1f}, {100 * old.high:+.1f}]"
    later = interval_cell(old.later_hits / old.later_pool, old.later_ci95)
    earlier = interval_cell(old.earlier_hits / old.earlier_pool, old.earlier_ci95)
    has_zero = old.low < 0 < old.high
    verdict = "contains zero" if has_zero else "does not contain zero"
    outcome = "it decided nothing" if has_zero else "the difference is real"
    text = (
        f"The old rule: phase {old.later} answers less than phase {old.earlier}, therefore data is "
        f"scarce. It compared {old.later_hits} of {old.later_pool} ({later} %) with "
        f"{old.earlier_hits} of {old.earlier_pool} ({earlier} %): {100 * old.difference:+.1f} "
        f"points {interval}, Fisher's p = {p_cell(old.p_value)}. The interval {verdict}: "
        f"{outcome}. Finding a difference of this size in four of five cases takes about "
        f"{old.queries_needed:,} queries a phase; a smaller pool is also easier, so the two shares "
        "are not comparable at all."
    )
    return wrapped(text, style)


def checks_table(checks: Sequence[OldCheck], style: str = TEXT) -> str:
    """Return the old gates of each phase with their numbers."""
    words = {True: "pass", False: "FAIL", None: NOTHING}
    by_phase: dict[str, dict[str, OldCheck]] = {}
    for check in checks:
        by_phase.setdefault(check.phase, {})[check.gate] = check
    lines = [
        [phase, *(f"{words[own[gate].passed]}: {own[gate].detail}" for gate in OLD_GATES)]
        for phase, own in by_phase.items()
    ]
    caption = ["The old criteria of success (lvm/phases.yaml); no promotion follows from them"]
    return captioned(caption, table(lines, ["phase", *OLD_GATES], "llll", style), leaky=False)


def warnings_text(found: PhaseComparison, style: str = TEXT) -> str:
    """Return each kind of warning once, with the phases that raised it."""
    merged = merged_warnings({row.name: row.trained.report["warnings"] for row in found.distinct})
    lines = [wrapped(bullets([one], style), style) for one in merged]
    return "\n".join(lines) if lines else "No training raised a warning."


def winner_text(found: PhaseComparison, story: PhaseStory, style: str = TEXT) -> str:
    """Return which phase is best here and which predictor is the baseline now."""
    best = found.best
    own = [row.name for row in found.rows if row.trained.candidate == story.winner]
    what = f"phase {' = '.join(own)}" if own else "no phase"
    lead = next(pair for pair in found.leads if pair.later == (best.same_as or best.name))
    value = interval_cell(best.measured.figures["hit_at_5"], best.measured.ci95["hit_at_5"])
    tail = "" if story.is_enabled else "; a dry run: no alias was changed"
    order = "" if best.order == NONE else ", both re-ranked by lane"
    number = len(found.distinct)
    chosen = f", chosen among {number} on these queries" if number > 1 else ""
    return wrapped(
        f"Best phase: {best.name}{chosen}: Hit@5 {value} %, {points(lead.hit_at_5)} "
        f"points against {lead.earlier}, the best free predictor{order}, p (Holm) "
        f"{p_cell(lead.p_holm)}. Baseline: {story.winner or 'none yet'} ({what}){tail}.",
        style,
    )


def phases_text(found: PhaseComparison, story: PhaseStory) -> str:
    """Return the report for the terminal, the outcome last."""
    return "\n\n".join([*_tables(found, story, TEXT), winner_text(found, story)])


def phases_markdown(found: PhaseComparison, story: PhaseStory, figure: str) -> str:
    """Return the report as a page; `figure` is the file name of its figure."""
    titles = ["As published", "Under one evaluation", "The pool explains the trend", "Differences"]
    titles += ["The old decision", "Warnings"]
    titles += ["The old gates"] if story.checks else []
    blocks = ["# Phases", winner_text(found, story, MARKDOWN), f"![phases]({figure})"]
    for title, body in zip(titles, _tables(found, story, MARKDOWN), strict=True):
        blocks += [f"## {title}", body]
    blocks += ["## Why this baseline", bullets(story.reasons, MARKDOWN)]
    return "\n\n".join(blocks) + "\n"


def _tables(found: PhaseComparison, story: PhaseStory, style: str) -> list[str]:
    blocks = [
        published_table(story.phases, style),
        phases_table(found, style),
        pools_table(found, style),
        pairs_table(found, style),
        old_decision_text(story.old, style),
        warnings_text(found, style),
    ]
    return [*blocks, checks_table(story.checks, style)] if story.checks else blocks


def _published_cell(share: float, interval: Sequence[float]) -> str:
    """Write a share with two digits, as it was published."""
    low, high = (percent(bound) for bound in interval)
    return f"{100 * share:.2f} [{low}, {high}]"


def _cells(one: Measured) -> list[str]:
    return figure_cells(one.figures, one.ci95)


def _pool_cells(one: Measured) -> list[str]:
    return [_pool_cell(one, pool) for pool in reversed(POOLS)]


def _pool_cell(one: Measured, pool: int) -> str:
    return percent(one.pools[pool]["hit_at_5"]) if pool in one.pools else NOTHING


def _pair_cells(pair: Pair) -> list[str]:
    detectable = NOTHING if math.isnan(pair.detectable) else f"{100 * pair.detectable:.1f}"
    changes = [difference_cell(pair.hit_at_5), difference_cell(pair.hit_at_10)]
    return [pair.later, pair.earlier, *changes, p_cell(pair.p_holm), detectable]


def merged_warnings(warnings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line for each kind of warning, with the names of the trainings that raised it.

    Warnings of one kind differ only in their numbers, which are merged into a range: `1, 2: only 24
    to 252 optimizer steps are planned`.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, sentences in warnings.items():
        for sentence in sentences:
            kinds.setdefault(NUMBER.sub("#", sentence), []).append((name, sentence))
    return [
        f"{', '.join(dict.fromkeys(name for name, _ in found))}: {_merged([s for _, s in found])}"
        for found in kinds.values()
    ]


def _merged(sentences: Sequence[str]) -> str:
    """Return the first sentence, with a range for each number that differs between them."""
    columns = iter(zip(*(NUMBER.findall(sentence) for sentence in sentences), strict=True))

    def span(_: re.Match[str]) -> str:
        numbers = next(columns)
        ordered = sorted(numbers, key=lambda number: float(number.replace(",", "")))
        low, high = ordered[0], ordered[-1]
        return low if low == high else f"{low} to {high}"

    return NUMBER.sub(span, sentences[0])


def phase_figure(found: PhaseComparison, phases: Mapping[str, Phase]) -> Figure:
    """Draw Hit@5 by phase: published, in pools of the old sizes, over the whole bank."""
    figure, (above, below) = canvas(
        "The old trend under one evaluation",
        "above: each phase among as many candidates as it had then; below: all over the whole bank",
        leaky=False,
        height_ratios=(1, 1),
    )
    shown = found.distinct
    contexts = {row.trained.label: row.trained.phase.ctx for row in shown}
    places = {name: float(place) for place, name in enumerate(contexts)}
    _published(above, phases, places)
    _in_pools(above, found, shown, places)
    _whole_bank(below, found, shown, places)
    ticks = [f"{name}\nctx {ctx:,}" for name, ctx in contexts.items()]
    for axes in (above, below):
        axes.set_xticks(list(places.values()), ticks)
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_ylabel("Hit@5, %")
        axes.grid(axis="y", color=LIGHT)
        axes.set_axisbelow(True)
    above.set_ylim(0, 108)
    handles = [handle for axes in (above, below) for handle in axes.get_legend_handles_labels()[0]]
    style = LEGEND | {"fontsize": FONT - 2}
    figure.legend(handles=handles, loc="outside lower left", ncols=3, **style)
    return legible(figure)


def _published(axes: Axes, phases: Mapping[str, Phase], places: Mapping[str, float]) -> None:
    known = [(places[name], phases[name].published) for name in places if name in phases]
    for number, (x, published) in enumerate((x, one) for x, one in known if one is not None):
        report = published_report(published)
        low, high = (100 * value for value in report["ci95"]["hit_at_5"])
        value = 100 * report["hit_at_5"]
        name = "published, Wilson interval" if not number else None
        axes.plot([x] * 2, [low, high], color=RED, linewidth=2.5)
        axes.plot([x], [value], "s", color=RED, markersize=9, label=name)
        text = f"{value:.0f} % of {report['pool']:,}"
        label(axes, text, (x, low), (0, -8), color=RED, ha="center", va="top")


def _in_pools(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    """Draw these phases, then one unchanged model, each in the old pool of its phase."""
    pools = {
        row.trained.label: row.trained.phase.published.pool
        for row in shown
        if row.trained.phase.published is not None
    }
    for row in shown:
        pool = row.measured.pools.get(pools.get(row.trained.label, 0))
        if pool is not None:
            _point(axes, row, places, 100 * pool["hit_at_5"], "{:.0f}")
    first = found.as_ranked
    if first is None:
        return
    known = first.measured.pools
    one = [(places[name], known[pool]) for name, pool in pools.items() if pool in known]
    if one:
        heights = [100 * pool["hit_at_5"] for _, pool in one]
        name = f"phase {first.name} alone, unchanged, in each pool"
        axes.plot([x for x, _ in one], heights, ":", color=BLACK, linewidth=2, label=name)


def _point(axes: Axes, row: Row, places: Mapping[str, float], value: float, form: str) -> float:
    """Draw a phase with its number, `dense` to the left and `seed` to the right; return its x."""
    side = SIDES[row.trained.recipe]
    x, color = places[row.trained.label] + 0.1 * side, COLORS[row.trained.recipe]
    axes.plot([x], [value], "o", color=color, markersize=10)
    ha = "left" if side > 0 else "right"
    label(axes, form.format(value), (x, value), (9 * side, 0), color=color, ha=ha, va="center")
    return x


def _whole_bank(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    top, named = 0.0, set()
    for row in shown:
        recipe = row.trained.recipe
        low, high = (100 * bound for bound in row.measured.ci95["hit_at_5"])
        x = _point(axes, row, places, 100 * row.measured.figures["hit_at_5"], "{:.1f}")
        name = None if recipe in named else f"these phases, recipe={recipe}"
        named.add(recipe)
        axes.plot([x, x], [low, high], color=COLORS[recipe], linewidth=2.5, label=name)
        top = max(top, high)
    free = 100 * found.free.measured.figures["hit_at_5"]
    name = f"{found.free.name}, the best free predictor"
    axes.axhline(free, color=GREY, linestyle="--", linewidth=1.8, label=name)
    if found.free_by_lane is not None:
        value = 100 * found.free_by_lane.measured.figures["hit_at_5"]
        ends = [places[row.trained.label] for row in shown if row.order != NONE]
        name = f"{found.free_by_lane.name}, the best one by lane"
        span = [min(ends) - 0.4, max(ends) + 0.4]
        axes.plot(span, [value] * 2, "--", color=ORANGE, linewidth=1.8, label=name)
        top = max(top, value)
    axes.set_ylim(0, 1.15 * max(top, free, 1.0))


def plan_text(jobs: Sequence[Job]) -> str:
    """Return the table of planned trainings, with the warnings known so far."""
    first = {job.sha256: job for job in reversed(jobs)}
    lines = []
    for job in jobs:
        plan = job.plan
        same = "" if first[job.sha256] is job else f"same training as {first[job.sha256].name}"
        same = same if job.grows_from is None else f"grown from {job.grows_from}"
        counts = [plan.examples_per_epoch, plan.steps_per_epoch, plan.steps]
        ctx = f"{job.phase.ctx:,}"
        lines.append([job.name, job.recipe, ctx, *(f"{number:,}" for number in counts), same])
    headers = ["phase", "recipe", "ctx", "examples", "steps an epoch", "steps at most", ""]
    body = captioned(["The plan"], table(lines, headers, "llrrrrl", TEXT), leaky=False)
    shown = (job for job in jobs if first[job.sha256] is job)
    warnings = merged_warnings({job.name: planned_warnings(job.plan) for job in shown})
    return "\n".join([body, "", *(f"warning: {one}" for one in warnings)])
