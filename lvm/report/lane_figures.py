"""Figures of lanes: agreement with labels, Hit@k of a larger k."""

import itertools

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lvm.evaluation.lane_assignment import Agreement
from lvm.evaluation.lane_ceilings import UNKNOWN, Ceilings, LaneCeiling
from lvm.report.canvas import BLACK, FONT, GREY, LIGHT, SERIES, canvas, end_labels, heat_map
from lvm.retrieval.lanes import UNASSIGNED_LANE

DASHES = ("-", "--")
# Marks of the curves of lanes too small to judge, repeated before their names.
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★"}


def agreement_figure(method: str, agreement: Agreement) -> Figure:
    """Draw the assigned lane against the bank's own label, rows sum to 100."""
    figure, [axes] = canvas(
        "Assigned lanes against the bank's labels",
        f"{method}, {agreement.num_assigned:,} of {agreement.num_labelled:,} labelled rows "
        f"assigned; adjusted Rand {agreement.adjusted_rand:.2f}, NMI {agreement.nmi:.2f}",
        leaky=False,
    )
    used = np.flatnonzero(agreement.count_AL.sum(axis=0))
    names = [*agreement.lanes, UNASSIGNED_LANE]
    count_AL = agreement.count_AL[:, used]
    heat_map(figure, axes, count_AL, agreement.labels, [names[code] for code in used])
    axes.set_xlabel("assigned lane")
    axes.set_ylabel("label (rows)")
    return figure


def larger_k_figure(model: str, ceilings: Ceilings, leaky: bool) -> Figure:
    """Draw Hit@k of exact search against k, a curve per lane.

    Lanes with too few queries to judge are grey, each with a mark of its own.
    """
    whole = ceilings.all_lanes
    figure, [axes] = canvas(
        "Does a larger k help? Hit@k per lane",
        f"{model}, {whole.num_queries:,} queries, plain, filtered; crosses: all lanes, less what "
        "the index loses; grey: too few queries",
        leaky,
    )
    ends = []
    judged = [lane for lane in ceilings.lanes if lane.limited_by != UNKNOWN]
    unjudged = [lane for lane in ceilings.lanes if lane.limited_by == UNKNOWN]
    for lane, (mark, glyph) in zip(unjudged, itertools.cycle(MARKS.items())):
        _curve(axes, lane, GREY, f":{mark}", 1.5)
        ends.append((_last(lane), f"{glyph} {lane.lane}", GREY))
    for place, lane in enumerate(judged):
        color = SERIES[:6][place % 6]
        _curve(axes, lane, color, DASHES[place // 6 % 2], 2)
        ends.append((_last(lane), lane.lane, color))
    _curve(axes, whole, BLACK, "-", 4)
    ends.append((_last(whole), whole.lane, BLACK))
    lost = {k: hit - whole.hits_served[k] for k, hit in whole.hits_corrected.items()}
    axes.plot(
        [int(k) for k in lost],
        [100 * (whole.hits[k] - points) for k, points in lost.items()],
        "x",
        color=BLACK,
        markersize=11,
        markeredgewidth=2.5,
    )
    ks = [int(k) for k in whole.hits]
    axes.set_xscale("log")
    axes.set_xticks(ks, [f"{k:,}" for k in ks])
    axes.minorticks_off()
    axes.set_xlim(ks[0] / 1.1, ks[-1] * 1.05)
    top = max(100 * hit for lane in (*ceilings.lanes, whole) for hit in lane.hits.values())
    axes.set_ylim(0, min(100.0, 1.08 * top) or 1.0)
    end_labels(axes, ends)
    axes.set_xlabel("k (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %", size=FONT)
    axes.grid(axis="y", color=LIGHT)
    return figure


def _curve(axes: Axes, lane: LaneCeiling, color: str, style: str, width: float) -> None:
    ks, values = [int(k) for k in lane.hits], [100 * hit for hit in lane.hits.values()]
    axes.plot(ks, values, style, color=color, linewidth=width)


def _last(lane: LaneCeiling) -> float:
    return 100 * list(lane.hits.values())[-1]
