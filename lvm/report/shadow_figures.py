"""Figures of a shadow replay."""

from collections.abc import Sequence

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
)
from lvm.report.figures import lane_figure
from lvm.shadow.comparison import Comparison, ShadowResult


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
    return figure


def _forest_legend() -> list[Artist]:
    verdicts = {"better": GREEN, "worse": RED, "not shown to differ": GREY}
    marks = [
        Line2D([], [], color=color, linewidth=4, marker="o", markersize=11, label=name)
        for name, color in verdicts.items()
    ]
    return [*marks, Patch(color=LIGHT, alpha=0.5, label="too small to be found here")]


def _forest_limit(pairs: Sequence[Comparison]) -> float:
    """Return the half width, in points, that shows most pairs; far ones would squeeze the rest."""
    ends = [100 * max(abs(p.hit_at_5.low), abs(p.hit_at_5.high), p.detectable) for p in pairs]
    reach = [end for end in ends if np.isfinite(end)]
    if not reach:
        return 5.0
    return 1.2 * max(1.0, *(end for end in reach if end <= max(3 * np.median(reach), 5.0)))


def rank_figure(result: ShadowResult) -> Figure:
    """Draw the share of queries answered within the first k, for every k, per candidate."""
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
        rank_Q = np.sort(result.per_query.loc[own, "rank"])
        share_K = 100 * np.searchsorted(rank_Q, k_K, side="right") / len(rank_Q)
        color, dashes = SERIES[place % len(SERIES)], "-" if place < len(SERIES) else "--"
        axes.plot(k_K, share_K, color=color, linestyle=dashes, linewidth=2.5)
        name = one.name if one.leak is None else f"{one.name} (LEAKY)"
        ends.append((float(share_K[-1]), name, color))
    axes.plot(k_K, 100 * k_K / result.num_answers, ":", color=GREY, linewidth=2)
    axes.set_xscale("log")
    axes.set_xlim(1, k_K[-1])
    axes.set_ylim(0, max([5.0, *(1.08 * value for value, _, _ in ends)]))
    end_labels(axes, ends)
    ticks = [k for k in (1, 5, 10, 50, 100, 500, 1000) if k <= last]
    axes.set_xticks(ticks, [f"{k:,}" for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("k (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %")
    axes.grid(color=LIGHT)
    return figure


def shadow_lane_figure(result: ShadowResult) -> Figure:
    """Draw Hit@5 per lane of the first of the ranking, the baseline, the best free predictor."""
    shown = result.leaders()
    if not shown or not shown[0].lanes:
        figure, [axes] = canvas("Hit@5 per lane", "no lane was measured", result.leaky)
        empty(axes, "no candidate was scored" if not shown else "the bank has no lanes")
        return figure
    measured = {one.name: one.lanes for one in shown}
    overall = {one.name: one.figures["hit_at_5"] for one in shown}
    return lane_figure(measured, overall, result.leaky)
