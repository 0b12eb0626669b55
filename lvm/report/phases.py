"""Report of the phase table: what was published, what one evaluation says of the same phases."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lvm.evaluation.intervals import points
from lvm.evaluation.metrics import POOLS
from lvm.report.tables import (
    HITS,
    MARKDOWN,
    TEXT,
    bullet,
    captioned,
    difference_cell,
    interval_cell,
    p_cell,
    percent,
    table,
)
from lvm.report.warnings import merged_warnings
from lvm.retrieval.rerank import NONE
from lvm.studies.phases.comparison import OLD_GATES, Measured, OldCheck, Pair, PhaseComparison
from lvm.studies.phases.table import OldDifference, Phase, published_report

NOTHING = "-"
WIDTH = 100


@dataclass(frozen=True)
class PhaseStory:
    """What stands beside the table: the phases known, the old decision, gates, the new decision.

    `winner` is the candidate that is the baseline now, `reasons` why; `checks` is empty where the
    old gates are off.
    """

    phases: Mapping[str, Phase]
    old: OldDifference
    winner: str | None
    reasons: Sequence[str]
    is_enabled: bool
    checks: Sequence[OldCheck] = field(default=())


def published_table(phases: Mapping[str, Phase], style: str = TEXT) -> str:
    """Return the old figures with Wilson intervals, as they were ranked: each in its own pool."""
    lines = []
    for one in phases.values():
        if one.published is None:
            lines.append([one.name, f"{one.ctx:,}", *[NOTHING] * 7])
            continue
        told = published_report(one.published)
        hits = [_published_cell(told[key], told["ci95"][key]) for key in HITS]
        epochs = f"{told['best_epoch']} of {told['last_epoch']}"
        counts = [f"{told[key]:,}" for key in ("pool", "windows", "steps")]
        lines.append([one.name, f"{one.ctx:,}", *hits, *counts, epochs])
    headers = ["phase", "ctx", "Hit@1 %", "Hit@5 %", "Hit@10 %"]
    headers += ["candidates", "windows", "steps", "best epoch"]
    caption = [
        "As published by the replaced system, each phase ranked among its own validation targets",
        "[95 % Wilson interval; the candidates are also the queries]",
    ]
    return captioned(caption, table(lines, headers, "lr" + "r" * 7, style), leaky=False)


def phases_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return the phases under one evaluation, the best free predictor below them."""
    lines = []
    for row in found.rows:
        report, plan = row.trained.report, row.trained.report["plan"]
        name = row.name if row.order == NONE else f"{row.name}, by lane"
        training = [f"{plan['examples_per_epoch']:,}", f"{report['optimiser_steps']:,}"]
        training.append(f"{report['best_epoch']} of {len(report['history'])}")
        marks = f"v{row.trained.version}" if row.same_as is None else f"same as {row.same_as}"
        ctx = f"{row.trained.phase.ctx:,}"
        lines.append([name, ctx, *_figure_cells(row.measured), *training, marks])
    free = [(found.free.name, found.free.measured)]
    if found.free_by_lane is not None:
        free.append((f"{found.free_by_lane.name}, by lane", found.free_by_lane.measured))
    for name, measured in free:
        lines.append([name, "", *_figure_cells(measured), "", "", "", "free"])
    headers = ["phase", "ctx", "Hit@1 %", "Hit@5 %", "Hit@10 %", "median\nrank"]
    headers += ["examples\nan epoch", "steps", "best\nepoch", "version"]
    if style == MARKDOWN:
        headers = [header.replace("\n", " ") for header in headers]
    caption = [
        f"One evaluation: {found.num_queries:,} queries from {found.num_documents:,} documents, "
        f"ranked over {found.num_rows:,} bank rows",
        f"({found.num_answers:,} distinct), the same for every phase; [95 % interval by document]",
    ]
    return captioned(caption, table(lines, headers, "lr" + "r" * 7 + "l", style), leaky=False)


def pools_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return Hit@5 of the very same ranks among fewer candidates, beside what was published."""
    named = [(row.name, row.measured, row) for row in found.distinct]
    lines = []
    for name, measured, row in [*named, (found.free.name, found.free.measured, None)]:
        if not measured.pools:
            continue
        cells = [percent(measured.figures["hit_at_5"]), *_pool_cells(measured)]
        published = None if row is None else row.trained.phase.published
        own = told = NOTHING
        if published is not None:
            own = _pool_cell(measured, published.pool)
            told = f"{100 * published.hit_at_5:.2f} (of {published.pool:,})"
        lines.append([name, *cells, own, told])
    headers = ["phase", "whole bank", *(f"{pool:,}" for pool in reversed(POOLS))]
    headers += ["in its old pool", "published"]
    caption = [
        "Hit@5 % of the same ranks, expected among so many candidates (hypergeometric, raw ranks)"
    ]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    body = captioned(caption, body, leaky=False)
    return f"{body}\n\n{_wrapped(pool_note(found), style)}"


def pool_note(found: PhaseComparison) -> str:
    """Say what the size of the pool alone does to one and the same model."""
    row = found.as_ranked
    if row is None:
        return (
            "Every phase here is ordered anew by lane, and such ranks have no equivalent in a "
            "pool: there is nothing to compare."
        )
    pools = sorted(row.measured.pools)
    if len(pools) < 2:
        return "The bank is smaller than the old pools: there is nothing to compare."
    few, many = pools[0], pools[-1]
    low, high = (percent(row.measured.pools[pool]["hit_at_5"]) for pool in (many, few))
    return (
        f"The model of phase {row.name}, unchanged, answers {low} % among {many:,} candidates, "
        f"{high} % among {few:,}. The old pools shrank from 1,149 to 58 as the context grew: what "
        "rises with it in the published column may be no more than that."
    )


def pairs_table(found: PhaseComparison, style: str = TEXT) -> str:
    """Return the paired differences, phase by phase, then against the best free predictor."""
    headers = ["phase", "against", "Hit@5, points", "Hit@10, points", "p (Holm)", "detectable"]
    lines = [_pair_cells(pair) for pair in (*found.successive, *found.leads)]
    caption = [
        "Paired differences on the same queries [95 % interval by document]; detectable: points of",
        "Hit@5, 80 % power; a phase by lane meets the free predictor that is best by lane",
        f"p (Holm) of Hit@5, in two families: {len(found.successive)} between phases, "
        f"{len(found.leads)} against a free predictor",
    ]
    return captioned(caption, table(lines, headers, "llrrrr", style), leaky=False)


def old_decision_text(old: OldDifference, style: str = TEXT) -> str:
    """Return what the old decision would have been, had its interval been looked at."""
    interval = f"[{100 * old.low:+.1f}, {100 * old.high:+.1f}]"
    later = interval_cell(old.later_hits / old.later_pool, old.later_ci95)
    earlier = interval_cell(old.earlier_hits / old.earlier_pool, old.earlier_ci95)
    verdict = "holds zero" if old.low < 0 < old.high else "does not hold zero"
    outcome = "nothing was decided" if old.low < 0 < old.high else "a difference was there"
    told = (
        f"The old rule: phase {old.later} answers less than phase {old.earlier}, therefore data is "
        f"scarce. It compared {old.later_hits} of {old.later_pool} ({later} %) with "
        f"{old.earlier_hits} of {old.earlier_pool} ({earlier} %): {100 * old.difference:+.1f} "
        f"points {interval}, Fisher's p = {p_cell(old.p_value)}. The interval {verdict}: "
        f"{outcome}. About {old.queries_needed:,} queries a phase would have been needed to see a "
        "difference of this size in four of five cases; a smaller pool is also an easier one, so "
        "that the two shares do not compare at all."
    )
    return _wrapped(told, style)


def checks_table(checks: Sequence[OldCheck], style: str = TEXT) -> str:
    """Return the old gates per phase with their numbers."""
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
    """Return what the trainings were warned of, each kind once, with their names."""
    told = merged_warnings({row.name: row.trained.report["warnings"] for row in found.distinct})
    lines = [_wrapped(f"{bullet(style)}{one}", style) for one in told]
    return "\n".join(lines) if lines else "No training was warned."


def winner_text(found: PhaseComparison, story: PhaseStory, style: str = TEXT) -> str:
    """Return which phase is best here, which predictor is the baseline now."""
    best = found.best
    own = [row.name for row in found.rows if row.trained.candidate == story.winner]
    what = f"phase {' = '.join(own)}" if own else "no phase"
    lead = next(pair for pair in found.leads if pair.later == (best.same_as or best.name))
    value = interval_cell(best.measured.figures["hit_at_5"], best.measured.ci95["hit_at_5"])
    tail = "" if story.is_enabled else "; a dry run: no alias was changed"
    order = "" if best.order == NONE else ", both ordered by lane"
    number = len(found.distinct)
    chosen = f", chosen among {number} on these queries" if number > 1 else ""
    return _wrapped(
        f"Best phase: {best.name}{chosen}: Hit@5 {value} %, {points(lead.hit_at_5)} "
        f"points against {lead.earlier}, the best free predictor{order}, p (Holm) "
        f"{p_cell(lead.p_holm)}. Baseline: {story.winner or 'none yet'} ({what}){tail}.",
        style,
    )


def phases_text(found: PhaseComparison, story: PhaseStory) -> str:
    """Return what the terminal shows, the outcome last."""
    return "\n\n".join([*_tables(found, story, TEXT), winner_text(found, story)])


def phases_markdown(found: PhaseComparison, story: PhaseStory, figure: str) -> str:
    """Return the page; `figure` is the file name of its figure."""
    titles = ["As published", "Under one evaluation", "The pool explains the trend", "Differences"]
    titles += ["The old decision", "Warnings"]
    titles += ["The old gates"] if story.checks else []
    blocks = ["# Phases", winner_text(found, story, MARKDOWN), f"![phases]({figure})"]
    for title, body in zip(titles, _tables(found, story, MARKDOWN), strict=True):
        blocks += [f"## {title}", body]
    reasons = [f"{bullet(MARKDOWN)}{reason}" for reason in story.reasons]
    blocks += ["## Why this baseline", "\n".join(reasons)]
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


def _wrapped(text: str, style: str) -> str:
    """Break a paragraph for the terminal."""
    return text if style == MARKDOWN else textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _published_cell(share: float, interval: Sequence[float]) -> str:
    """Write a share with the two digits that it was published with."""
    low, high = (percent(bound) for bound in interval)
    return f"{100 * share:.2f} [{low}, {high}]"


def _figure_cells(one: Measured) -> list[str]:
    hits = [interval_cell(one.figures[key], one.ci95[key]) for key in HITS]
    return [*hits, f"{one.figures['median_rank']:,.0f}"]


def _pool_cells(one: Measured) -> list[str]:
    return [_pool_cell(one, pool) for pool in reversed(POOLS)]


def _pool_cell(one: Measured, pool: int) -> str:
    return percent(one.pools[pool]["hit_at_5"]) if pool in one.pools else NOTHING


def _pair_cells(pair: Pair) -> list[str]:
    detectable = NOTHING if math.isnan(pair.detectable) else f"{100 * pair.detectable:.1f}"
    changes = [difference_cell(pair.hit_at_5), difference_cell(pair.hit_at_10)]
    return [pair.later, pair.earlier, *changes, p_cell(pair.p_holm), detectable]
