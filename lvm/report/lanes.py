"""Report of `lane-diagnostics`: tables and figures of lanes, their ceilings, their assignment."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lvm.evaluation.lane_assignment import Agreement, Assignment
from lvm.evaluation.lane_ceilings import UNKNOWN, Ceilings, LaneCeiling
from lvm.evaluation.lane_diagnosis import Diagnosis, LaneFigures
from lvm.report.canvas import (
    BLACK,
    GREY,
    LEGEND,
    LIGHT,
    SERIES,
    canvas,
    end_labels,
    heat_map,
    legible,
    log_axis,
)
from lvm.report.tables import (
    HIT_HEADERS,
    TEXT,
    captioned,
    difference_cell,
    hit_cells,
    interval_cell,
    page_table,
    percent,
    table,
)
from lvm.retrieval.lanes import UNASSIGNED_LANE

DASHES = ("-", "--")
# Marks of the curves of lanes too small to judge, repeated before their names.
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★"}


def lanes_table(diagnosis: Diagnosis, style: str = TEXT) -> str:
    """Return the lanes from the lowest Hit@5 up, the largest confusions, the decision."""
    lines = []
    for lane in _by_hit(diagnosis.lanes):
        supply = diagnosis.supply.get(lane.lane)
        lines.append(
            [
                lane.lane,
                f"{lane.num_queries:,}",
                f"{lane.num_documents:,}",
                f"{supply.num_chains:,}" if supply else "",
                interval_cell(lane.figures["hit_at_5"], lane.ci95["hit_at_5"]),
                lane.best_baseline or "",
                difference_cell(lane.lift) if lane.lift else "",
                _marks(lane.lane, diagnosis),
            ]
        )
    headers = ["lane", "queries", "documents", "chains", "Hit@5 %", "best free", "lift, points", ""]
    caption = [
        f"Lanes of {diagnosis.model}: {diagnosis.num_queries:,} queries, overall Hit@5 "
        f"{percent(diagnosis.hit_at_5)} % [95 % interval by document]"
    ]
    body = table(lines, headers, "lrrrrlrl", style)
    blocks = [captioned(caption, body, diagnosis.leaky)]
    if diagnosis.pairs:
        pairs = [
            [p.truth, p.found, f"{p.count:,}", percent(p.share), f"{p.excess:+,.0f}"]
            for p in diagnosis.pairs
        ]
        headers = ["lane of the answer", "lane of the first hit", "queries", "share %", "excess"]
        body = table(pairs, headers, "llrrr", style)
        caption = ["Confusions, largest excess over chance first"]
        blocks.append(captioned(caption, body, diagnosis.leaky))
    return "\n\n".join([*blocks, diagnosis.sentence])


def lanes_screen(diagnosis: Diagnosis, ceilings: Ceilings) -> str:
    """Return the terminal's report: a line per lane, then the confusion and the decision in words.

    The artifact lanes.txt has the rest.
    """
    lines = [
        [
            lane.lane,
            f"{lane.num_queries:,}",
            interval_cell(lane.figures["hit_at_5"], lane.ci95["hit_at_5"]),
            lane.best_baseline or "",
            difference_cell(lane.lift) if lane.lift else "",
            _marks(lane.lane, diagnosis),
        ]
        for lane in _by_hit(diagnosis.lanes)
    ]
    headers = ["lane", "queries", "Hit@5 %", "best free", "lift, points", ""]
    caption = [
        f"Lanes of {diagnosis.model}, lowest first: {diagnosis.num_queries:,} queries, overall "
        f"Hit@5 {percent(diagnosis.hit_at_5)} %",
        "[95 % interval by document]; lift: over the free predictor that is best in the lane",
    ]
    sentences = [
        f"Most confused: {confusion_words(diagnosis)}",
        ceilings.sentence(),
        "Confusions, ceilings, Hit@1 and Hit@10 of each lane: lanes.txt of the run.",
    ]
    body = captioned(caption, table(lines, headers, "lrrlrl", TEXT), diagnosis.leaky)
    return "\n\n".join([body, "\n".join(sentences), diagnosis.sentence])


def confusion_words(diagnosis: Diagnosis) -> str:
    """Return in words the pair of lanes whose confusion most exceeds chance."""
    if not diagnosis.pairs:
        return "no lane more than by chance."
    pair = diagnosis.pairs[0]
    return (
        f"the first hit for {pair.truth} lies in {pair.found} for {percent(pair.share)} % of its "
        f"queries ({pair.count:,}; by chance {pair.expected:,.0f})."
    )


def _by_hit(lanes: Sequence[LaneFigures]) -> list[LaneFigures]:
    return sorted(lanes, key=lambda lane: lane.figures["hit_at_5"])


def _marks(lane: str, diagnosis: Diagnosis) -> str:
    marks = {
        "WEAK": lane in diagnosis.weak,
        "weak by the old rule": lane in diagnosis.weak_old_rule,
        "too few queries to judge": lane in diagnosis.unjudged,
    }
    return ", ".join(mark for mark, holds in marks.items() if holds)


def hits_table(diagnosis: Diagnosis, style: str = TEXT) -> str:
    """Return Hit@1/5/10 of each lane with intervals, from the lowest Hit@5 up."""
    lines = [[lane.lane, *hit_cells(lane.figures, lane.ci95)] for lane in _by_hit(diagnosis.lanes)]
    caption = [f"Hit@k of {diagnosis.model} in each lane [95 % interval by document]"]
    body = table(lines, ["lane", *HIT_HEADERS], "lrrr", style)
    return captioned(caption, body, diagnosis.leaky)


def supply_line(diagnosis: Diagnosis) -> str:
    """Say which lanes have few chains."""
    few, least = diagnosis.small_supply, diagnosis.rules.min_chains
    if not few:
        return f"Supply: every lane has {least:,} chains to train on or more."
    if len(few) == len(diagnosis.supply):
        return f"Supply: all {len(few)} lanes have fewer than {least:,} chains to train on."
    return f"Supply: fewer than {least:,} chains to train on in {', '.join(few)}."


def ceilings_table(ceilings: Ceilings, leaky: bool, style: str = TEXT) -> str:
    """Return the ceilings of each lane, Hit@k for larger k, what limits Hit@k."""
    entries = [*ceilings.lanes, ceilings.all_lanes]
    lines = [
        [
            lane.lane,
            percent(lane.oracle_hit_at_5),
            percent(lane.oracle_exact_hit_at_10),
            percent(lane.oracle_index_hit_at_10),
            percent(lane.agreement),
            percent(lane.hits_corrected["10"]),
            percent(lane.hits_served["10"]),
            difference_cell(lane.served_difference),
            lane.limited_by,
        ]
        for lane in entries
    ]
    headers = ["lane", "truth\n@5", "truth\n@10*", "by index\n@10*", "agreement", "exact\n@10*"]
    headers += ["served\n@10*", "served - exact", "limited\nby"]
    caption = [
        "Ceilings, %: searching with the answer's own vector, exactly or through the index; Hit@10",
        "of the model, by exact search or as served. *: corrected scores, context rows kept.",
        "Limited by: index, where serving loses hits that exact search has; else by the model.",
        f"Serving: {ceilings.index}",
    ]
    first = captioned(caption, table(lines, headers, "lrrrrrrrl", style), leaky)
    return "\n\n".join([first, _larger_k_table(entries, leaky, style), ceilings.sentence()])


def _larger_k_table(entries: Sequence[LaneCeiling], leaky: bool, style: str) -> str:
    lines = []
    for lane in entries:
        shown = [percent(hit) for hit in lane.hits.values()]
        served = [
            f"{100 * (lane.hits_served[k] - hit):+.1f}" for k, hit in lane.hits_corrected.items()
        ]
        lines.append([lane.lane, *shown, " ".join(f"{value:>5}" for value in served)])
    headers = ["lane", *(f"@{int(k):,}" for k in entries[0].hits)]
    headers.append("served - exact @" + ", ".join(entries[0].hits_corrected))
    caption = ["Hit@k for larger k, %: exact search, plain, filtered; served - exact in points"]
    body = table(lines, headers, "l" + "r" * (len(headers) - 1), style)
    return captioned(caption, body, leaky)


def assignment_table(assignment: Assignment, agreement: Agreement | None, style: str = TEXT) -> str:
    """Return the rows of each assigned lane, beside the bank's own labels if it has any."""
    facts = assignment.facts
    num_assigned = sum(facts["rows"].values())
    total = num_assigned + facts["unassigned_rows"]
    caption = [f"Lanes by {assignment.method}: {num_assigned:,} of {total:,} rows assigned"]
    if facts.get("checked_rows") == 0:
        caption.append(
            "No row has a text, so nothing shows that this encoder made the bank; make sure of it."
        )
    if agreement is None:
        lines = [[lane, f"{num:,}"] for lane, num in facts["rows"].items()]
        lines.append([UNASSIGNED_LANE, f"{facts['unassigned_rows']:,}"])
        return captioned(caption, table(lines, ["lane", "rows"], "lr", style), leaky=False)
    caption.append(
        f"Against the bank's labels: adjusted Rand {agreement.adjusted_rand:.3f}, NMI "
        f"{agreement.nmi:.3f}; best one-to-one match {percent(agreement.best_match_accuracy)} % of"
    )
    words = f"the assigned rows, {percent(agreement.best_match_of_labelled)} % of the labelled ones"
    if agreement.same_name_accuracy is not None:
        words += f"; same name {percent(agreement.same_name_accuracy)} %"
    caption.append(words)
    names = [*agreement.lanes, UNASSIGNED_LANE]
    lines = []
    for label, count_L in zip(agreement.labels, agreement.count_AL, strict=True):
        shares = count_L / max(1, count_L.sum())
        order = (-shares).argsort(kind="stable")[:3]
        found = ", ".join(f"{names[c]} {percent(shares[c])}" for c in order if count_L[c])
        lines.append([label, f"{count_L.sum():,}", agreement.best_match.get(label, ""), found])
    headers = ["label", "rows", "best match", "lanes of its rows, %"]
    return captioned(caption, table(lines, headers, "lrll", style), leaky=False)


def assignment_line(assignment: Assignment, agreement: Agreement | None) -> str:
    """Say how many rows were assigned, and how well the lanes agree with the bank's labels."""
    num_assigned = sum(assignment.facts["rows"].values())
    total = num_assigned + assignment.facts["unassigned_rows"]
    line = f"Lanes by {assignment.method}: {num_assigned:,} of {total:,} rows assigned"
    if agreement is None:
        return line
    return f"{line}; agreement with the bank's labels {agreement.adjusted_rand:.2f} (adjusted Rand)"


def lane_figure(
    measured: Mapping[str, Sequence[LaneFigures]], overall: Mapping[str, float], leaky: bool
) -> Figure:
    """Draw Hit@5 per lane with intervals, a row of marks per predictor of `measured`.

    Lanes are in the order of the first predictor's Hit@5; a dashed line is its `overall`.
    """
    first, *_ = measured
    lanes = _by_hit(measured[first])
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
    return legible(figure)


def confusion_figure(diagnosis: Diagnosis) -> Figure:
    """Draw the lane of the first hit against the lane of the answer; rows sum to 100."""
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
    return legible(figure)


def agreement_figure(method: str, agreement: Agreement) -> Figure:
    """Draw the assigned lane against the bank's own label; rows sum to 100."""
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
    return legible(figure)


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
    log_axis(axes, ks)
    axes.set_xlim(ks[0] / 1.1, ks[-1] * 1.05)
    top = max(100 * hit for lane in (*ceilings.lanes, whole) for hit in lane.hits.values())
    axes.set_ylim(0, min(100.0, 1.08 * top) or 1.0)
    end_labels(axes, ends)
    axes.set_xlabel("k (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %")
    axes.grid(axis="y", color=LIGHT)
    return legible(figure)


def _curve(axes: Axes, lane: LaneCeiling, color: str, style: str, width: float) -> None:
    ks, values = [int(k) for k in lane.hits], [100 * hit for hit in lane.hits.values()]
    axes.plot(ks, values, style, color=color, linewidth=width)


def _last(lane: LaneCeiling) -> float:
    return 100 * list(lane.hits.values())[-1]


def lanes_note(diagnosis: Diagnosis) -> str:
    """Return the decision and Hit@5 of each lane, from the lowest up."""
    lanes = sorted(diagnosis.lanes, key=lambda lane: lane.figures["hit_at_5"])
    lines = [
        [
            lane.lane,
            f"{lane.num_queries:,}",
            interval_cell(lane.figures["hit_at_5"], lane.ci95["hit_at_5"]),
            "WEAK" if lane.lane in diagnosis.weak else "",
        ]
        for lane in lanes
    ]
    body = page_table(lines, ["lane", "queries", "Hit@5 %", ""], "lrrl")
    return captioned([f"**{diagnosis.sentence}**"], body, diagnosis.leaky)
