"""Figures of a result as matplotlib images of 1280 x 800 pixels."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lvm.comparison import Comparison, ShadowResult
from lvm.diagnosis import Diagnosis
from lvm.lanes import LaneFigures

# Okabe, Ito: Color universal design (2008); told apart with every common colour blindness.
BLACK, BLUE, GREEN, RED = "#000000", "#0072B2", "#009E73", "#D55E00"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
GREY, LIGHT = "#767676", "#DDDDDD"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
FONT = 15


def forest_figure(result: ShadowResult) -> Figure:
    """Draw every paired Hit@5 difference with its interval; right of zero is better."""
    figure, [axes] = _canvas(
        "Who beats whom? Difference in Hit@5 on the same queries",
        f"{result.num_queries:,} queries from {result.num_documents:,} documents; 95 % "
        "intervals by document; band: too small to be found",
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
            _label(axes, f"{mean:+.1f}", (mean, y), (0, 11), color=color, ha="center")
        else:
            side, mark = np.sign(mean), "<" if mean < 0 else ">"
            axes.plot([0.985 * side * limit], [y], mark, color=color, markersize=11)
            where, ha = (-15 * side, -5), "left" if mean < 0 else "right"
            _label(
                axes, f"{mean:+.1f}, off the scale", (side * limit, y), where, color=color, ha=ha
            )
        labels.append(f"{pair.candidate}\nagainst {pair.reference}")
    axes.axvline(0, color=BLACK, linewidth=1.2)
    axes.set_yticks(range(len(pairs)), labels, size=FONT - 2 if len(pairs) <= 16 else FONT - 6)
    axes.set_ylim(-0.6, max(len(pairs), 1) - 0.3)
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("difference in Hit@5, points; green or red where the interval excludes zero")
    axes.grid(axis="x", color=LIGHT)
    if not pairs:
        _empty(axes, "no two candidates could be compared")
    return figure


def _forest_limit(pairs: Sequence[Comparison]) -> float:
    """Return the half width, in points, that shows most pairs; far ones would squeeze the rest."""
    ends = [100 * max(abs(p.hit_at_5.low), abs(p.hit_at_5.high), p.detectable) for p in pairs]
    reach = [end for end in ends if np.isfinite(end)]
    if not reach:
        return 5.0
    return 1.2 * max(1.0, *(end for end in reach if end <= max(3 * np.median(reach), 5.0)))


def rank_figure(result: ShadowResult) -> Figure:
    """Draw the share of queries answered within the first k, for every k, per candidate."""
    figure, [axes] = _canvas(
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
    _end_labels(axes, ends)
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
        figure, [axes] = _canvas("Hit@5 per lane", "no lane was measured", result.leaky)
        _empty(axes, "no candidate was scored" if not shown else "the bank has no lanes")
        return figure
    measured = {one.name: one.lanes for one in shown}
    overall = {one.name: one.figures["hit_at_5"] for one in shown}
    return lane_figure(measured, overall, result.leaky)


def lane_figure(
    measured: Mapping[str, Sequence[LaneFigures]], overall: Mapping[str, float], leaky: bool = False
) -> Figure:
    """Draw Hit@5 per lane with intervals, a row of marks per predictor of `measured`.

    Lanes stand in the order of the first predictor's Hit@5; a dashed line is its `overall`.
    """
    first, *_ = measured
    lanes = sorted(measured[first], key=lambda lane: lane.figures["hit_at_5"])
    figure, [axes] = _canvas(
        "Hit@5 per lane",
        f"95 % intervals by document; dashed: {first} over all lanes, {100 * overall[first]:.1f} %",
        leaky,
    )
    height = 0.8 / len(measured)
    for place, figures in enumerate(measured.values()):
        by_lane = {lane.lane: lane for lane in figures}
        color = SERIES[place % len(SERIES)]
        for y, lane in enumerate(lanes):
            one = by_lane[lane.lane]
            at = y + 0.4 - (place + 0.5) * height
            low, high = (100 * value for value in one.ci95["hit_at_5"])
            value = 100 * one.figures["hit_at_5"]
            axes.barh(at, value, height=0.9 * height, color=color, alpha=0.6)
            axes.plot([low, high], [at, at], color=BLACK, linewidth=2)
    axes.axvline(100 * overall[first], color=GREY, linestyle="--", linewidth=1.5)
    axes.set_yticks(range(len(lanes)), [f"{x.lane}  ({x.num_queries:,})" for x in lanes])
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("Hit@5, % (number of queries in brackets)")
    axes.grid(axis="x", color=LIGHT)
    axes.set_axisbelow(True)
    names = [
        Patch(color=SERIES[place % len(SERIES)], alpha=0.6, label=name)
        for place, name in enumerate(measured)
    ]
    axes.legend(
        handles=names,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=4,
        fontsize=FONT - 1,
        frameon=False,
    )
    return figure


def training_figure(
    history: Sequence[Mapping[str, float]], best_epoch: int, baselines: Mapping[str, float]
) -> Figure:
    """Draw val Hit@1/5/10 above the training loss, by epoch; `baselines` are val Hit@5, dashed."""
    figure, (axes, below) = _canvas(
        "Training: share of val queries answered",
        f"kept: epoch {best_epoch}, chosen by val Hit@5; dashed: val Hit@5 of a free predictor",
        leaky=False,
        height_ratios=(3, 1),
    )
    epochs = [record["epoch"] for record in history]
    curves = [(f"val/hit_at_{k}", f"Hit@{k}", c) for k, c in ((10, SKY), (5, BLUE), (1, PURPLE))]
    ends = []
    for key, name, color in curves:
        values = [100 * record[key] for record in history]
        axes.plot(epochs, values, "o-", color=color, linewidth=2.5, markersize=6)
        ends.append((values[-1], name, color))
    for name, value in baselines.items():
        axes.axhline(100 * value, color=GREY, linestyle="--", linewidth=1.5)
        ends.append((100 * value, name, GREY))
    below.plot(epochs, [r["train/loss"] for r in history], "o-", color=RED, linewidth=2.5)
    for panel in (axes, below):
        panel.axvline(best_epoch, color=LIGHT, linewidth=10, zorder=0)
        panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color=LIGHT)
    axes.set_ylim(0, 1.08 * max(value for value, _, _ in ends) or 1.0)
    axes.tick_params(axis="x", labelbottom=False)
    axes.set_ylabel("val queries, %")
    _end_labels(axes, ends)
    below.set_ylabel("train loss")
    below.set_xlabel("epoch")
    return figure


def confusion_figure(diagnosis: Diagnosis) -> Figure:
    """Draw the lane of the first retrieved row against the lane of the answer, rows sum to 100."""
    figure, [axes] = _canvas(
        "In which lane does the first hit lie?",
        f"{diagnosis.model}, {diagnosis.num_queries:,} queries; each row is one lane of answers, % "
        "of its queries",
        leaky=False,
    )
    used = np.flatnonzero(diagnosis.confusion_LL.sum(axis=0) + diagnosis.confusion_LL.sum(axis=1))
    count_LL = diagnosis.confusion_LL[np.ix_(used, used)]
    share_LL = 100 * count_LL / np.maximum(1, count_LL.sum(axis=1, keepdims=True))
    names = [diagnosis.confusion_lanes[code] for code in used]
    image = axes.imshow(share_LL, cmap="cividis", vmin=0, vmax=share_LL.max(), aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    num_answers = count_LL.sum(axis=1)
    labels = [f"{name}  ({num:,})" for name, num in zip(names, num_answers, strict=True)]
    axes.set_yticks(range(len(names)), labels)
    size = FONT if len(names) <= 8 else FONT - 4
    for (truth, found), share in np.ndenumerate(share_LL):
        color = BLACK if share > share_LL.max() / 2 else "#FFFFFF"
        axes.text(found, truth, f"{share:.0f}", ha="center", va="center", color=color, size=size)
    axes.set_xlabel("lane of the first hit")
    axes.set_ylabel("lane of the answer (queries)")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("% of the row", size=FONT)
    bar.ax.tick_params(labelsize=FONT - 2)
    return figure


def _canvas(
    title: str, subtitle: str, leaky: bool, height_ratios: tuple[int, ...] = (1,)
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of 1280 x 800 pixels in the common style, a panel per ratio."""
    layout = ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.15)
    figure = Figure(figsize=(12.8, 8.0), dpi=100, layout=layout)
    grid = figure.subplots(len(height_ratios), 1, height_ratios=height_ratios, squeeze=False)
    panels = list(grid[:, 0])
    panels[0].set_title(f"{title}\n", loc="left", fontsize=FONT + 5, fontweight="bold")
    panels[0].annotate(
        f"LEAKY, no evidence: {subtitle}" if leaky else subtitle,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 10),
        textcoords="offset points",
        fontsize=FONT - 2,
        color=RED if leaky else GREY,
    )
    for axes in panels:
        axes.tick_params(labelsize=FONT - 2)
        axes.xaxis.label.set_size(FONT)
        axes.yaxis.label.set_size(FONT)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _label(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[int, int], **style: Any
) -> None:
    """Write text at `offset` points from the data point `at`."""
    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        fontsize=FONT - 1,
        annotation_clip=False,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        **style,
    )


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (value, name, color) at the right edge, moved apart where values are close."""
    low, high = axes.get_ylim()
    gap = (high - low) / 26
    places: list[float] = []
    for value, _, _ in sorted(ends):
        places.append(max(value, places[-1] + gap) if places else value)
    top = high
    for index in reversed(range(len(places))):  # a crowd at the top grows downwards
        places[index] = min(places[index], top)
        top = places[index] - gap
    for at, (_, name, color) in zip(places, sorted(ends), strict=True):
        _label(axes, name, (axes.get_xlim()[1], at), (8, 0), color=color, va="center")


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", size=FONT, color=GREY)
