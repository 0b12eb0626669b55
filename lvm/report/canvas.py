"""The common style of all figures: one size, one palette, fonts for names in any script."""

import itertools
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator
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
NAME = "name"  # marks texts that `legible` cuts to NAME_WIDTH, as it does tick labels
NAME_WIDTH = 36  # characters; longer names would squeeze the panel
CODE = "U+"
CODE_NOTE = "U+...: characters that no installed font has; install one that has them (fonts-noto)"
LAST_RESORT = "Last Resort"  # matplotlib's font of boxes, which claims every character


def canvas(
    title: str, subtitle: str, leaky: bool, height_ratios: tuple[int, ...] = (1,)
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of 1280 x 800 pixels in the common style, a panel per ratio.

    A function that draws names into it returns `legible(figure)`.
    """
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
    """Write (value, name, color) at the right edge; labels of close values are moved apart.

    A short line leads from each value to its name. The panel has room for `lines` labels.
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
            gid=NAME,
            xytext=(edge, at),
            textcoords=beside,
            annotation_clip=False,
            arrowprops=leader | {"relpos": (0, 0.5)},
            color=color,
            fontsize=FONT - 1,
            va="center",
        )


def empty(axes: Axes, text: str) -> None:
    """Write the reason into a panel that shows no data."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", size=FONT, color=GREY)


def heat_map(
    figure: Figure,
    axes: Axes,
    count_RC: NDArray[np.integer],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Draw counts as percentages of their row; row labels show the row's total in brackets.

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


def log_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """Make the x axis logarithmic, with only these ticks."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()


def legible(figure: Figure) -> Figure:
    """Return the figure after choosing fonts that have the characters of all its texts.

    Characters that no installed font has are written as code points, `U+79D1.5B66`, and a line at
    the top says so. Long names lose their middle.
    """
    has_codes = False
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [text.get_text() for text in axis.get_ticklabels()]
            coded = [_coded(label) for label in labels]
            has_codes |= coded != labels
            if isinstance(axis.get_major_locator(), FixedLocator):
                axis.set_ticklabels(["\n".join(map(_cut, one.split("\n"))) for one in coded])
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        shown = _coded(text.get_text())
        has_codes |= shown != text.get_text()
        text.set_text(_cut(shown) if text.get_gid() == NAME else shown)
        if not text.get_text().isascii():
            families, _ = _fallbacks(frozenset(text.get_text()))
            text.set_fontfamily([*text.get_fontfamily(), *families])
    if has_codes:
        figure.suptitle(CODE_NOTE, x=0.99, ha="right", fontsize=FONT - 4, color=GREY)
    return figure


def _coded(text: str) -> str:
    """Write each run of characters that no installed font has as its code points."""
    _, lacking = _fallbacks(frozenset(text))
    runs = itertools.groupby(text, key=lacking.__contains__)
    return "".join(
        CODE + ".".join(f"{ord(one):04X}" for one in run) if is_lacking else "".join(run)
        for is_lacking, run in runs
    )


def _cut(name: str) -> str:
    """Return a name, without its middle if it is longer than NAME_WIDTH."""
    half = NAME_WIDTH // 2
    return name if len(name) <= NAME_WIDTH else f"{name[: half - 1]}…{name[-half:]}"


@lru_cache
def _fallbacks(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return installed fonts for the characters that the default lacks, and those that none has.

    The font with the most of the missing characters comes first.
    """
    default = font_manager.findfont(FontProperties())
    missing = {one for one in characters if not one.isascii()} - _available(default, characters)
    families: list[str] = []
    while missing:
        have = {
            font.name: _available(font_manager.FontPath(font.fname, font.index), missing)
            for font in font_manager.fontManager.ttflist
            if font.weight == 400 and font.style == "normal" and LAST_RESORT not in font.name
        }
        best = max(have, key=lambda name: (len(have[name]), "Serif" not in name, -len(name), name))
        if not have[best]:
            break
        families.append(best)
        missing -= have[best]
    return tuple(families), frozenset(missing)


def _available(path: font_manager.FontPath, characters: Collection[str]) -> set[str]:
    """Return the characters that the font at this path has."""
    charmap = font_manager.get_font(path).get_charmap()
    return {one for one in characters if ord(one) in charmap}
