"""Figure of the phase table: the published trend above the same phases over the whole bank."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvm.report.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    RED,
    canvas,
    label,
)
from lvm.retrieval.rerank import NONE
from lvm.studies.phases.comparison import PhaseComparison, Row
from lvm.studies.phases.table import Phase, published_report

COLORS, SIDES = {"dense": GREEN, "seed": BLUE}, {"dense": -1, "seed": 1}


def phase_figure(found: PhaseComparison, phases: Mapping[str, Phase]) -> Figure:
    """Draw Hit@5 by phase: published, in pools of the old sizes, over the whole bank."""
    figure, (above, below) = canvas(
        "The old trend, and what one evaluation makes of it",
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
    figure.legend(
        handles=handles, loc="outside lower left", ncols=3, fontsize=FONT - 2, frameon=False
    )
    return figure


def _published(axes: Axes, phases: Mapping[str, Phase], places: Mapping[str, float]) -> None:
    known = [(places[name], phases[name].published) for name in places if name in phases]
    for number, (x, published) in enumerate((x, one) for x, one in known if one is not None):
        told = published_report(published)
        low, high = (100 * value for value in told["ci95"]["hit_at_5"])
        value = 100 * told["hit_at_5"]
        name = "published, Wilson interval" if not number else None
        axes.plot([x] * 2, [low, high], color=RED, linewidth=2.5)
        axes.plot([x], [value], "s", color=RED, markersize=9, label=name)
        text = f"{value:.0f} % of {told['pool']:,}"
        label(axes, text, (x, low), (0, -8), color=RED, ha="center", va="top")


def _in_pools(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    """Draw the phases here, then one unchanged model, each in the pool of that phase."""
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
    """Draw a phase, dense ones on the left of its place with their number, others on the right."""
    side = SIDES[row.trained.recipe]
    x, color = places[row.trained.label] + 0.1 * side, COLORS[row.trained.recipe]
    axes.plot([x], [value], "o", color=color, markersize=10)
    ha = "left" if side > 0 else "right"
    label(axes, form.format(value), (x, value), (9 * side, 0), color=color, ha=ha, va="center")
    return x


def _whole_bank(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    top, told = 0.0, set()
    for row in shown:
        recipe = row.trained.recipe
        low, high = (100 * bound for bound in row.measured.ci95["hit_at_5"])
        x = _point(axes, row, places, 100 * row.measured.figures["hit_at_5"], "{:.1f}")
        name = None if recipe in told else f"these phases, recipe={recipe}"
        told.add(recipe)
        axes.plot([x, x], [low, high], color=COLORS[recipe], linewidth=2.5, label=name)
        top = max(top, high)
    free = 100 * found.free.measured.figures["hit_at_5"]
    name = f"{found.free.name}, the best free predictor"
    axes.axhline(free, color=GREY, linestyle="--", linewidth=1.8, label=name)
    if found.free_by_lane is not None:
        value = 100 * found.free_by_lane.measured.figures["hit_at_5"]
        ends = [places[row.trained.label] for row in shown if row.order != NONE]
        named = f"{found.free_by_lane.name}, the best one by lane"
        span = [min(ends) - 0.4, max(ends) + 0.4]
        axes.plot(span, [value] * 2, "--", color=ORANGE, linewidth=1.8, label=named)
        top = max(top, value)
    axes.set_ylim(0, 1.15 * max(top, free, 1.0))
