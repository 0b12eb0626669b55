"""Figure of the phase table: the published trend above the same phases over the whole bank."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvm.lanes.reranking import NONE
from lvm.phases.measured import PhaseComparison, Row
from lvm.phases.published import published_report
from lvm.phases.table import Phase
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
    empty,
    label,
)

LEGEND = {"fontsize": FONT - 2, "frameon": False, "ncols": 3}


def phase_figure(found: PhaseComparison, phases: Mapping[str, Phase]) -> Figure:
    """Draw Hit@5 by phase: published, in pools of the old sizes, over the whole bank."""
    figure, (above, below) = canvas(
        "The old trend, and what one evaluation makes of it",
        "above: each phase among as many candidates as it had then; below: all over the whole bank",
        found.leaky,
        height_ratios=(1, 1),
    )
    shown = [row for row in found.rows if row.same_as is None]
    names = list(dict.fromkeys(row.trained.phase.name for row in shown))
    places = {name: float(place) for place, name in enumerate(names)}
    _published(above, phases, places)
    _in_pools(above, found, shown, places)
    _whole_bank(below, found, shown, places)
    ticks = [f"{name}\nctx {phases[name].ctx:,}" for name in names]
    for axes in (above, below):
        axes.set_xticks(list(places.values()), ticks)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylabel("Hit@5, %")
        axes.grid(axis="y", color=LIGHT)
        axes.set_axisbelow(True)
        axes.legend(loc="lower left", **LEGEND)
    above.set_ylim(0, 100)
    return figure


def _published(axes: Axes, phases: Mapping[str, Phase], places: Mapping[str, float]) -> None:
    known = [(places[name], phases[name].published) for name in places]
    for number, (x, published) in enumerate((x, one) for x, one in known if one is not None):
        told = published_report(published)
        low, high = (100 * value for value in told["ci95"]["hit_at_5"])
        value = 100 * told["hit_at_5"]
        name = "published, Wilson interval" if not number else None
        axes.plot([x - 0.12] * 2, [low, high], color=RED, linewidth=2.5)
        axes.plot([x - 0.12], [value], "s", color=RED, markersize=9, label=name)
        text = f"{value:.0f} of {told['pool']:,}"
        label(axes, text, (x - 0.12, value), (-8, 0), color=RED, ha="right", va="center")


def _in_pools(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    """Draw the phases here, then one unchanged model, each in the pool of that phase."""
    pools = {
        row.trained.phase.name: row.trained.phase.published.pool
        for row in shown
        if row.trained.phase.published is not None
    }
    own = [
        (places[row.trained.phase.name], row.measured.pools[pools[row.trained.phase.name]])
        for row in shown
        if pools.get(row.trained.phase.name) in row.measured.pools
    ]
    if own:
        heights = [100 * pool["hit_at_5"] for _, pool in own]
        at = [x + 0.12 for x, _ in own]
        axes.plot(at, heights, "o", color=BLUE, markersize=10, label="these phases, same pools")
        for x, value in zip(at, heights, strict=True):
            label(axes, f"{value:.0f}", (x, value), (9, 0), color=BLUE, va="center")
    first = shown[0].measured.pools
    one = [(places[name], first[pool]) for name, pool in pools.items() if pool in first]
    if one:
        heights = [100 * pool["hit_at_5"] for _, pool in one]
        name = f"phase {shown[0].name} alone, unchanged, in each pool"
        axes.plot([x for x, _ in one], heights, ":", color=BLACK, linewidth=2, label=name)


def _whole_bank(
    axes: Axes, found: PhaseComparison, shown: Sequence[Row], places: Mapping[str, float]
) -> None:
    colors = {"dense": GREEN, "seed": BLUE}
    top, told = 0.0, set()
    for row in shown:
        recipe = row.trained.recipe
        x = places[row.trained.phase.name] + (0.08 if recipe == "seed" else -0.08)
        value = 100 * row.measured.figures["hit_at_5"]
        low, high = (100 * bound for bound in row.measured.ci95["hit_at_5"])
        name = None if recipe in told else f"recipe={recipe}, interval by document"
        told.add(recipe)
        axes.plot([x, x], [low, high], color=colors[recipe], linewidth=2.5)
        axes.plot([x], [value], "o", color=colors[recipe], markersize=10, label=name)
        label(axes, f"{value:.1f}", (x, value), (9, 0), color=colors[recipe], va="center")
        top = max(top, high)
    free = 100 * found.free_measured.figures["hit_at_5"]
    name = f"{found.free}, the best free predictor"
    axes.axhline(free, color=GREY, linestyle="--", linewidth=1.8, label=name)
    if found.free_by_lane is not None:
        value = 100 * found.free_by_lane.figures["hit_at_5"]
        ends = [places[row.trained.phase.name] for row in shown if row.order != NONE]
        named = f"{found.free}, by lane"
        span = [min(ends) - 0.4, max(ends) + 0.4]
        axes.plot(span, [value] * 2, "--", color=ORANGE, linewidth=1.8, label=named)
        top = max(top, value)
    axes.set_ylim(0, 1.2 * max(top, free, 1.0))
    if not shown:
        empty(axes, "no phase was measured")
