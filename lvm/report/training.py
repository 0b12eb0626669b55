"""Figures of `train`: Hit@k and loss by epoch, the load of the experts by lane."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lvm.report.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREY,
    LIGHT,
    PURPLE,
    RED,
    SKY,
    canvas,
    empty,
    end_labels,
    legible,
)
from lvm.training.gate_figures import DEAD_SHARE, mutual_information

CURVES = ((10, SKY), (5, BLUE), (1, PURPLE))
SHARE = "train/share_"
SMALL_SHARE = 0.005  # shares below it have no number


def training_figure(
    history: Sequence[Mapping[str, float]],
    best_epoch: int,
    baselines: Mapping[str, float],
    leaky: bool,
) -> Figure:
    """Draw val Hit@1/5/10, the training loss, the shares of the model's parts, by epoch.

    `baselines` are val Hit@5, dashed. A model without parts has no third panel.
    """
    parts = [name for name in history[0] if name.startswith(SHARE)]
    figure, (axes, *lower) = canvas(
        "Training: share of val queries answered",
        f"best epoch: {best_epoch}, by val Hit@5; dashed: val Hit@5 of a free predictor",
        leaky,
        height_ratios=(4, 1, 1) if parts else (3, 1),
    )
    epochs = [record["epoch"] for record in history]
    ends = []
    for k, color in CURVES:
        values = [100 * record[f"val/hit_at_{k}"] for record in history]
        axes.plot(epochs, values, "o-", color=color, linewidth=2.5, markersize=6)
        ends.append((values[-1], f"Hit@{k}", color))
    for name, value in baselines.items():
        axes.axhline(100 * value, color=GREY, linestyle="--", linewidth=1.5)
        ends.append((100 * value, name, GREY))
    lower[0].plot(epochs, [r["train/loss"] for r in history], "o-", color=RED, linewidth=2.5)
    lower[0].set_ylabel("train loss")
    share_ends = _draw_shares(lower[1], history, parts) if parts else []
    for panel in (axes, *lower):
        panel.axvline(best_epoch, color=LIGHT, linewidth=10, zorder=0)
        panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(axis="y", color=LIGHT)
    axes.set_ylim(0, 1.08 * max(value for value, _, _ in ends) or 1.0)
    for panel in (axes, *lower[:-1]):
        panel.tick_params(axis="x", labelbottom=False)
    axes.set_ylabel("val queries, %")
    end_labels(axes, ends, lines=17)
    if parts:
        end_labels(lower[1], share_ends, lines=5)
    lower[-1].set_xlabel("epoch")
    return legible(figure)


def _draw_shares(
    axes: Axes, history: Sequence[Mapping[str, float]], parts: Sequence[str]
) -> list[tuple[float, str, str]]:
    """Draw by epoch how far predictions turn without each part; return the ends of the lines."""
    epochs = [record["epoch"] for record in history]
    ends = []
    for name, color in zip(parts, (PURPLE, BLUE, SKY, RED), strict=False):
        values = [100 * record[name] for record in history]
        axes.plot(epochs, values, "o-", color=color, linewidth=2.5)
        ends.append((values[-1], name.removeprefix(SHARE), color))
    axes.set_ylabel("share, %")
    axes.set_ylim(0, 1.15 * max(100 * r[name] for r in history for name in parts) or 1.0)
    return ends


def experts_figure(table_LX: NDArray[np.floating], lanes: Sequence[str], leaky: bool) -> Figure:
    """Draw the load of each expert above the loads by lane; `table_LX` is that of `lane_table`."""
    num_experts = table_LX.shape[1]
    figure, [axes, below] = canvas(
        "Which experts answer for which lane?",
        f"val queries; lane and expert share {mutual_information(table_LX):.2f} nats; experts "
        "below the dotted line are dead",
        leaky,
        (1, 2),
    )
    used = np.flatnonzero(table_LX.sum(axis=1))
    if not len(used):
        empty(below, "no val query has a lane")
        return figure
    load_X = 100 * table_LX.sum(axis=0) / table_LX.sum()
    axes.bar(range(num_experts), load_X, color=BLUE)
    axes.axhline(100 * DEAD_SHARE / num_experts, color=GREY, linestyle=":", linewidth=2)
    axes.set_xlim(-0.5, num_experts - 0.5)
    axes.set_ylabel("load, %")
    axes.grid(axis="y", color=LIGHT)
    axes.set_axisbelow(True)
    share_LX = table_LX[used] / table_LX[used].sum(axis=1, keepdims=True)
    below.imshow(100 * share_LX, cmap="cividis", vmin=0, aspect="auto")
    below.set_yticks(range(len(used)), [lanes[int(code)] for code in used])
    for panel in (axes, below):
        panel.set_xticks(range(num_experts))
    below.set_xlabel("expert (numbers: % of the lane's weight)")
    for (lane, expert), share in np.ndenumerate(share_LX):
        color = BLACK if share > share_LX.max() / 2 else "#FFFFFF"
        text = f"{100 * share:.0f}" if share >= SMALL_SHARE else ""
        below.text(expert, lane, text, ha="center", va="center", color=color, size=FONT - 4)
    return legible(figure)
