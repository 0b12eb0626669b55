"""Figures of a training run, of an evaluation, of lanes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lvm.evaluation.lane_diagnosis import Diagnosis, LaneFigures
from lvm.report.canvas import (
    BLACK,
    BLUE,
    GREY,
    LEGEND,
    LIGHT,
    PURPLE,
    RED,
    SERIES,
    SKY,
    canvas,
    end_labels,
    heat_map,
)


def lane_figure(
    measured: Mapping[str, Sequence[LaneFigures]], overall: Mapping[str, float], leaky: bool
) -> Figure:
    """Draw Hit@5 per lane with intervals, a row of marks per predictor of `measured`.

    Lanes stand in the order of the first predictor's Hit@5; a dashed line is its `overall`.
    """
    first, *_ = measured
    lanes = sorted(measured[first], key=lambda lane: lane.figures["hit_at_5"])
    figure, [axes] = canvas(
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
    figure.legend(handles=names, loc="outside lower right", ncols=4, **LEGEND)
    return figure


def training_figure(
    history: Sequence[Mapping[str, float]],
    best_epoch: int,
    baselines: Mapping[str, float],
    leaky: bool,
) -> Figure:
    """Draw val Hit@1/5/10 above the training loss, by epoch; `baselines` are val Hit@5, dashed."""
    figure, (axes, below) = canvas(
        "Training: share of val queries answered",
        f"kept: epoch {best_epoch}, chosen by val Hit@5; dashed: val Hit@5 of a free predictor",
        leaky,
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
    end_labels(axes, ends, lines=17)
    below.set_ylabel("train loss")
    below.set_xlabel("epoch")
    return figure


def context_figure(name: str, controls: Mapping[str, Any], leaky: bool) -> Figure:
    """Draw Hit@1/5/10 with intervals against the rows of context that were read."""
    entries = controls["context"]
    figure, [axes] = canvas(
        "Does context pay? Hit@k by context length",
        f"{name}, the same {controls['queries']:,} queries at every length; bars are 95 % "
        f"intervals over {controls['documents']:,} documents",
        leaky,
    )
    lengths = [entry["ctx"] for entry in entries]
    ends = []
    for shift, (k, color) in enumerate(((10, SKY), (5, BLUE), (1, PURPLE)), start=-1):
        key = f"hit_at_{k}"
        values = [100 * entry[key] for entry in entries]
        at = [length * 1.03**shift for length in lengths]
        axes.plot(at, values, "o-", color=color, linewidth=2.5, markersize=8)
        for x, entry in zip(at, entries, strict=True):
            bounds = [100 * bound for bound in entry["ci95"][key] if bound is not None]
            axes.plot([x] * len(bounds), bounds, color=color, linewidth=2, alpha=0.7)
            ends += [(bound, "", color) for bound in bounds]
        ends.append((values[-1], f"Hit@{k}", color))
    axes.set_xscale("log")
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * max(value for value, _, _ in ends) or 1.0)
    end_labels(axes, [end for end in ends if end[1]])
    axes.set_xlabel("last rows of context that are read (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %")
    axes.grid(axis="y", color=LIGHT)
    return figure


def confusion_figure(diagnosis: Diagnosis) -> Figure:
    """Draw the lane of the first retrieved row against the lane of the answer, rows sum to 100."""
    figure, [axes] = canvas(
        "In which lane does the first hit lie?",
        f"{diagnosis.model}, {diagnosis.num_queries:,} queries; each row is one lane of answers, % "
        "of its queries",
        diagnosis.leaky,
    )
    names, count_LL = diagnosis.confusion_lanes, diagnosis.confusion_LL
    asked = np.flatnonzero(count_LL.sum(axis=1))
    used = np.flatnonzero(count_LL.sum(axis=0) + count_LL.sum(axis=1))
    shown = [[names[code] for code in codes] for codes in (asked, used)]
    heat_map(figure, axes, count_LL[np.ix_(asked, used)], *shown)
    axes.set_xlabel("lane of the first hit")
    axes.set_ylabel("lane of the answer (queries)")
    return figure
