"""Figure of the experts that a gate chooses."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lvm.report.canvas import BLACK, BLUE, FONT, GREY, LIGHT, canvas, empty
from lvm.training.gate_figures import DEAD_SHARE, mutual_information

SMALL = 0.005


def experts_figure(table_LX: NDArray[np.floating], lanes: Sequence[str], leaky: bool) -> Figure:
    """Draw the load of each expert over the lanes' loads; `table_LX` is that of `lane_table`."""
    num_experts = table_LX.shape[1]
    figure, [axes, below] = canvas(
        "Which experts answer for which lane?",
        f"val queries; lane and expert share {mutual_information(table_LX):.2f} nats; below the "
        "dotted line an expert counts as dead",
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
    below.set_xlabel("expert (figures: % of the lane's weight)")
    for (lane, expert), share in np.ndenumerate(share_LX):
        color = BLACK if share > share_LX.max() / 2 else "#FFFFFF"
        text = f"{100 * share:.0f}" if share >= SMALL else ""
        below.text(expert, lane, text, ha="center", va="center", color=color, size=FONT - 4)
    return figure
