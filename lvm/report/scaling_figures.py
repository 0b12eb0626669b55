"""Figure of a grid of trainings: learning curves to twice the data."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvm.report.canvas import BLACK, GREY, LIGHT, SERIES, canvas, end_labels
from lvm.studies.scaling.fit import Fitted

POINTS = 60
LABELS = 11


def scaling_figure(
    hit: Fitted,
    soft: Fitted,
    documents: Sequence[float],
    parameters: Sequence[int],
    widths: Sequence[int],
    free: tuple[str, float, float],
    verdict: str,
) -> Figure:
    """Draw Hit@5 above soft Hit@5 against documents, a curve a width, dotted to twice as many.

    `free` names the best free predictor with its two scores.
    """
    figure, panels = canvas(
        f"More data or a wider model? Verdict: {verdict}",
        "bars: 95 % intervals (gains, being paired, have their own); dotted: twice the data; "
        "dashed: best free predictor",
        leaky=False,
        height_ratios=(1, 1),
    )
    names = ("Hit@5, %", "soft Hit@5, %\n(decides)")
    for axes, fitted, score, name in zip(panels, (hit, soft), free[1:], names, strict=True):
        ends = _curves(axes, fitted, documents, parameters, widths)
        axes.axhline(100 * score, color=GREY, linestyle="--", linewidth=1.5)
        axes.set_ylabel(name)
        axes.set_xscale("log")
        marks = [*documents, 2 * documents[-1]]
        axes.set_xticks(marks, [f"{mark:,.0f}" for mark in marks])
        axes.minorticks_off()
        axes.set_xlim(documents[0] / 1.1, 2.2 * documents[-1])
        axes.grid(axis="y", color=LIGHT)
        end_labels(axes, [*ends, (100 * score, free[0], GREY)], LABELS)
    panels[0].tick_params(axis="x", labelbottom=False)
    panels[1].set_xlabel("train documents (logarithmic)")
    return figure


def _curves(
    axes: Axes,
    fitted: Fitted,
    documents: Sequence[float],
    parameters: Sequence[int],
    widths: Sequence[int],
) -> list[tuple[float, str, str]]:
    """Draw the widths of one score; return where their curves end, with names and colours."""
    most = documents[-1]
    known = np.geomspace(documents[0], most, POINTS)
    beyond = np.geomspace(most, 2 * most, POINTS // 4)
    ends = []
    for place, (width, number) in enumerate(zip(widths, parameters, strict=True)):
        color, z = SERIES[place % len(SERIES)], number / parameters[-1]
        at = np.array(documents) * 1.02 ** (place - len(widths) / 2)
        axes.plot(at, 100 * fitted.mean_FW[:, place], "o", color=color, markersize=8)
        for x, bounds in zip(at, fitted.interval_FW2[:, place], strict=True):
            axes.plot([x, x], 100 * bounds, color=color, linewidth=2, alpha=0.6)
        axes.plot(known, 100 * fitted.at(known / most, z), color=color, linewidth=2)
        axes.plot(beyond, 100 * fitted.at(beyond / most, z), ":", color=color, linewidth=2)
        end = 2 * most * 1.02 ** (place - len(widths) / 2)
        axes.plot([end, end], 100 * fitted.next_interval_W2[place], color=color, linewidth=4)
        ends.append((100 * float(fitted.at(2.0, z)), f"width {width}", color))
    axes.axvline(most, color=BLACK, linewidth=0.8)
    return ends
