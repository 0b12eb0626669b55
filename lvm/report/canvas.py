"""The common style of all figures: 1280 x 800 pixels, one palette."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import offset_copy
from numpy.typing import NDArray

# Okabe, Ito: Color universal design (2008); told apart with every common colour blindness.
BLACK, BLUE, GREEN, RED = "#000000", "#0072B2", "#009E73", "#D55E00"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
GREY, LIGHT = "#767676", "#DDDDDD"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
FONT = 15
LEGEND = {"fontsize": FONT - 1, "frameon": False}
LEADER = 22  # points from the right edge of a panel to the names of its curves


def canvas(
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


def label(
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


def end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], lines: int = 26) -> None:
    """Write (value, name, color) at the right edge, moved apart where values are close.

    A short line leads from each value to its name. `lines` is the number of labels that the panel
    has room for.
    """
    low, high = axes.get_ylim()
    gap = (high - low) / lines
    places: list[float] = []
    for value, _, _ in sorted(ends):
        places.append(max(value, places[-1] + gap) if places else value)
    top = high
    for index in reversed(range(len(places))):  # a crowd at the top grows downwards
        places[index] = min(places[index], top)
        top = places[index] - gap
    edge = axes.get_xlim()[1]
    beside = offset_copy(axes.transData, axes.get_figure(root=True), x=LEADER, units="points")
    for at, (value, name, color) in zip(places, sorted(ends), strict=True):
        leader = {"arrowstyle": "-", "color": color, "linewidth": 1, "shrinkA": 2, "shrinkB": 2}
        axes.annotate(
            name,
            (edge, value),
            xytext=(edge, at),
            textcoords=beside,
            annotation_clip=False,
            arrowprops=leader | {"relpos": (0, 0.5)},
            color=color,
            fontsize=FONT - 1,
            va="center",
        )


def empty(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", size=FONT, color=GREY)


def heat_map(
    figure: Figure,
    axes: Axes,
    count_RC: NDArray[np.integer],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Draw counts as shares of their rows in percent; a row is named with its count in brackets.

    Shares below half a percent have no number.
    """
    total_R = count_RC.sum(axis=1)
    share_RC = 100 * count_RC / np.maximum(1, total_R)[:, None]
    image = axes.imshow(share_RC, cmap="cividis", vmin=0, vmax=share_RC.max(), aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    labels = [f"{name}  ({num:,})" for name, num in zip(rows, total_R, strict=True)]
    axes.set_yticks(range(len(rows)), labels)
    size = FONT if len(columns) <= 8 else FONT - 4
    for (row, column), share in np.ndenumerate(share_RC):
        color = BLACK if share > share_RC.max() / 2 else "#FFFFFF"
        if share >= 0.5:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, size=size)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("% of the row", size=FONT)
    bar.ax.tick_params(labelsize=FONT - 2)
