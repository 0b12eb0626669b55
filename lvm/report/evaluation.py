"""Reports of `eval`, `train` and `predict`: tables, figures, a page of examples."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lvm.evaluation.controls import longest_beaten
from lvm.evaluation.metrics import points
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
    log_axis,
)
from lvm.report.tables import (
    HIT_HEADERS,
    LEAKY,
    LEAKY_NOTE,
    MARKDOWN,
    TEXT,
    PredictorRow,
    bullets,
    captioned,
    difference_cell,
    hit_cells,
    interval_cell,
    p_cell,
    page_table,
    percent,
    predictors_table,
    queries_line,
    read_difference,
    served_hit_at_5,
    table,
)
from lvm.training.expert_gate import DEAD_SHARE, mutual_information

ORDERS = {
    "lane": "by lane",
    "lexical": "by words",
    "hybrid": "by lane and words",
    "old_rule": "0.7 cos + 0.3 alignment",
    "true_lane": "true lane first: the ceiling",
}
PARTS = {"linear": "linear map", "older_rows": "all but 20 rows"}
EXAMPLES_STYLE = (
    "body { font: 14px sans-serif } table { border-collapse: collapse } "
    "th, td { border: 1px solid #ddd; padding: 4px 8px; text-align: left; vertical-align: top } "
    "th { position: sticky; top: 0; background: #f4f4f4 }"
)
CURVES = ((10, SKY), (5, BLUE), (1, PURPLE))
SHARE = "train/share_"
SMALL_SHARE = 0.005  # shares below it have no number
TEXT_WIDTH, SOURCE_WIDTH = 80, 36


def evaluation_table(report: Mapping[str, Any], style: str = TEXT) -> str:
    """Return the table of `eval`: the model among the free predictors, the best first."""
    leaky = bool(report["leaky"])
    named = [(report["model"], report, "model")]
    named += [(name, entry, "free") for name, entry in report["baselines"].items()]
    rows = [_predictor_row(name, entry, [kind] + [LEAKY] * leaky) for name, entry, kind in named]
    rows.sort(key=lambda row: -served_hit_at_5(row.figures, row.corrected))
    caption = [
        f"Predictors on the {report['split']} split: {report['queries']:,} queries from "
        f"{report['documents']:,} documents, ranked over {report['bank_rows']:,} bank rows",
        f"({report['candidates']:,} distinct), up to {report['ctx']:,} context rows removed; "
        f"bank {report['bank_sha256'][:12]}; [95 % interval by document]",
    ]
    ceiling = percent(report["oracle"]["hit_at_5"])
    below = f"Ceiling: searching with the answer's own vector gives Hit@5 {ceiling} %."
    if report.get("hubness_counts_own"):
        below += (
            f"\n{report['model']} is corrected as it was logged: the hubness of a row counts "
            "predictions of its own document. That of the free predictors does not."
        )
    best = report["best_baseline"]
    if best is not None:
        served = read_difference(best["corrected_hit_at_5_difference"])
        plain = read_difference(best["hit_at_5_difference"])
        below += (
            f"\nAgainst {best['name']}, the best free predictor: Hit@5 as served (corrected) "
            f"{points(served)} points, p = {p_cell(served.p_value)};\n"
            f"plain {points(plain)} points, p = {p_cell(plain.p_value)}."
        )
    return f"{captioned(caption, predictors_table(rows, style), leaky)}\n\n{below}"


def serving_lines(report: Mapping[str, Any]) -> str:
    """Return two lines: the serving index with its agreement, and latencies."""
    index, times = report["index"], report["latency_ms"]
    return (
        f"Serving: {index['description']}; agreement on these queries {index['agreement']:.3f}.\n"
        f"One answer, P95 in ms: cold context {times['p95']:.1f}, "
        f"warm stream with search {times['warm_p95']:.1f}, search alone {times['index_p95']:.1f}."
    )


def _predictor_row(name: str, entry: Mapping[str, Any], marks: Sequence[str]) -> PredictorRow:
    corrected = entry.get("corrected") or {}
    own, corrected_ci95 = entry["ci95"], corrected.get("ci95", {})
    return PredictorRow(name, tuple(marks), entry, own, corrected, corrected_ci95)


def controls_table(controls: Mapping[str, Any], leaky: bool, style: str = TEXT) -> str:
    """Return Hit@k by context length, a sentence that sums it up, and the two controls of order."""
    lines = []
    for entry in controls["context"]:
        is_full = "p_holm" not in entry
        change = ["", ""] if is_full else _change_cells(entry, entry["p_holm"])
        lines.append([f"{entry['ctx']:,}", *hit_cells(entry, entry["ci95"]), *change])
    headers = ["rows read", *HIT_HEADERS, "Hit@5 - full, points", "p (Holm)"]
    caption = [
        f"Context: the same {controls['queries']:,} queries from {controls['documents']:,} "
        "documents, with the same rows removed;",
        "the predictor reads only the last rows [95 % interval by document]",
    ]
    body = captioned(caption, table(lines, headers, "rrrrrr", style), leaky)
    return "\n\n".join([body, _context_sentence(controls), "\n".join(_order_lines(controls))])


def ablations_table(ablations: Mapping[str, Any], leaky: bool, style: str = TEXT) -> str:
    """Return Hit@k of the whole model, then without each of its parts."""
    full = ablations["full"]
    lines = [["nothing", *hit_cells(full, full["ci95"]), "", ""]]
    for entry in ablations["without"]:
        name = PARTS.get(entry["part"], entry["part"])
        change = _change_cells(entry, entry["p_holm"])
        lines.append([name, *hit_cells(entry, entry["ci95"]), *change])
    headers = ["without", *HIT_HEADERS, "Hit@5 - full, points", "p (Holm)"]
    caption = [
        f"Ablations: the same {ablations['queries']:,} queries from {ablations['documents']:,} "
        "documents; the trained weights",
        "predict without one part of the model [95 % interval by document]",
    ]
    return captioned(caption, table(lines, headers, "lrrrrr", style), leaky)


def _context_sentence(controls: Mapping[str, Any]) -> str:
    """Say whether longer contexts help, by the shortened contexts alone."""
    beaten = longest_beaten(controls)
    if beaten is None:
        return (
            f"Context is not shown to help: no shorter context is significantly worse than all "
            f"{controls['ctx']:,} rows on these queries."
        )
    gain = -beaten["hit_at_5_difference"]["mean"]
    return (
        f"Context helps beyond {beaten['ctx']:,} row{'s' * (beaten['ctx'] > 1)}: all "
        f"{controls['ctx']:,} rows give {percent(gain)} points more Hit@5 than the last "
        f"{beaten['ctx']:,} alone."
    )


def _order_lines(controls: Mapping[str, Any]) -> list[str]:
    """Return a line on the shuffled context, and one on the reversed ridge if it was measured."""
    shuffled, ridge = controls["shuffled"], controls["reversed_ridge"]
    ordered = percent(shuffled["ordered"]["hit_at_5"])
    lines = [
        f"Shuffled context, last row in place ({shuffled['queries']:,} queries): Hit@5 "
        f"{percent(shuffled['hit_at_5'])} %, in order {ordered} %, {_change_words(shuffled)}."
    ]
    if ridge is not None:
        lines.append(
            f"Arrow of time, ridge ({ridge['queries']:,} queries): Hit@5 of the row after the "
            f"context {percent(ridge['forward']['hit_at_5'])} %, of the same row before it "
            f"{percent(ridge['backward']['hit_at_5'])} %, {_change_words(ridge)}."
        )
    return lines


def _change_words(entry: Mapping[str, Any]) -> str:
    change = read_difference(entry["hit_at_5_difference"])
    return f"{points(change)} points, p = {p_cell(change.p_value)}"


def _change_cells(entry: Mapping[str, Any], p_value: float | None = None) -> list[str]:
    change = read_difference(entry["hit_at_5_difference"])
    return [difference_cell(change), p_cell(change.p_value if p_value is None else p_value)]


def reranking_table(
    reranked: Mapping[str, Any], report: Mapping[str, Any], leaky: bool, style: str = TEXT
) -> str:
    """Return the ranks before and after re-ranking, then how well a lane is predicted.

    `reranked` is the report of `evaluate_reranking`, `report` that of the evaluation before it.
    """
    lines, weights = [], []
    for kind, before in (("plain", report), ("corrected", report["corrected"])):
        lines.append([kind, "original order", *hit_cells(before, before["ci95"]), "", ""])
        own = {reranked["order"]: reranked[kind]} | reranked[kind]
        for key, name in ((key, name) for key, name in ORDERS.items() if key in own):
            entry = own[key]
            lines.append(["", name, *hit_cells(entry, entry["ci95"]), *_change_cells(entry)])
            if "tau" in entry:
                values = (f"{one} {entry[one]:g}" for one in ("beta", "gamma") if entry[one])
                words = ", ".join(values) or "no weight"
                weights.append(f"{kind} {name}: tau {entry['tau']:.3f}, {words}")
    headers = ["score", "order", *HIT_HEADERS, "Hit@5, points", "p"]
    caption = [
        f"Second stage: score + tau (beta log p(lane) + gamma BM25) orders the best "
        f"{reranked['shortlist']} of each",
        "query; points against the original order; weights chosen on val:",
        *weights,
    ]
    below = (
        f"The answer is among the best {reranked['shortlist']} of "
        f"{percent(reranked['plain']['on_list'])} % of the queries."
    )
    if "classifier" in reranked:
        classifier = reranked["classifier"]
        below = (
            "The classifier names the lane of the next row in "
            f"{percent(classifier['accuracy'])} % of the queries (the most frequent lane: "
            f"{percent(classifier['commonest_lane'])} %); calibration error "
            f"{percent(classifier['calibration_error'])} points.\n{below}"
        )
    return f"{captioned(caption, table(lines, headers, 'llrrrrr', style), leaky)}\n\n{below}"


def second_stage_line(orders: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the weights of each order for corrected scores in one line; `orders` may be empty."""
    found = [
        f"{name} beta {own['corrected']['beta']:g} gamma {own['corrected']['gamma']:g}"
        for name, own in orders.items()
    ]
    return f"second stage, weights chosen on val: {'; '.join(found) or 'no lanes, no texts'}"


def context_figure(name: str, controls: Mapping[str, Any], leaky: bool) -> Figure:
    """Draw Hit@1/5/10 with intervals against the number of context rows."""
    entries = controls["context"]
    figure, [axes] = canvas(
        "Does context help? Hit@k by context length",
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
    log_axis(axes, lengths)
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
    axes.set_ylim(0, 1.08 * max(value for value, _, _ in ends) or 1.0)
    end_labels(axes, [end for end in ends if end[1]])
    axes.set_xlabel("last rows of context that are read (logarithmic)")
    axes.set_ylabel("queries answered within the first k, %")
    axes.grid(axis="y", color=LIGHT)
    return legible(figure)


def examples_page(title: str, examples: pd.DataFrame, leaky: bool) -> str:
    """Return the table of `example_table` as an HTML page with full texts."""
    counts = examples["outcome"].value_counts()
    drawn = ", ".join(f"{outcome}: {count}" for outcome, count in counts.items())
    mark = f"<p><b>{escape(LEAKY_NOTE)}</b></p>\n" if leaky else ""
    with pd.option_context("display.max_colwidth", None):
        body = examples.to_html(index=False, border=0, float_format="{:,g}".format)
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><style>{EXAMPLES_STYLE}</style>\n'
        f"<h2>{escape(title)}</h2>\n{mark}<p>{drawn}, drawn by seed; the rank is exact over the "
        f"whole bank.</p>\n{body}\n"
    )


def training_figure(
    history: Sequence[Mapping[str, float]],
    best_epoch: int,
    baselines: Mapping[str, float],
    leaky: bool,
) -> Figure:
    """Draw val Hit@1/5/10, the training loss, and the shares of the model's parts by epoch.

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
    """Draw how far predictions turn without each part, by epoch; return the ends of the lines."""
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
    """Draw the load of each expert, above its load by lane; `table_LX` is from `lane_table`."""
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


def passages_table(report: Mapping[str, Any], k: int) -> str:
    """Return the passages as a table with short cells; a note says if there are fewer than k."""
    found = report["passages"]
    lines = [
        [
            f"{one['score']:.3f}",
            f"{one['row']:,}",
            one["lane"] or "",
            shorten(f"{one['sequence']}: {one['document']}", SOURCE_WIDTH),
            shorten(one["text"] or "", TEXT_WIDTH),
        ]
        for one in found
    ]
    body = table(lines, ["score", "row", "lane", "source", "passage"], "rrlll", TEXT)
    head = f"{report['model']} after {report['context_rows']:,} rows; score: {report['score']}"
    blocks = [head, f"search: {report['search']}", "", body]
    if len(found) < k:
        blocks.append(f"{len(found)} of {k} found: the lists that were read hold no more")
    return "\n".join(blocks)


def shorten(text: str, width: int) -> str:
    """Return a text as one line of at most `width` characters, with an ellipsis if it was cut."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def training_note(report: Mapping[str, Any], registered: str) -> str:
    """Return the val figures of a training beside those of the best free predictor.

    `registered` names the version and its registry.
    """
    last = len(report["history"])
    blocks = [_headline(report), f"Best epoch {report['best_epoch']} of {last}; {registered}."]
    blocks.append(_figures(report))
    if report["warnings"]:
        blocks.append(bullets((f"warning: {warning}" for warning in report["warnings"]), MARKDOWN))
    return "\n\n".join(blocks)


def evaluation_note(report: Mapping[str, Any]) -> str:
    """Return the figures of one predictor beside those of the best free one."""
    blocks = [_headline(report), _figures(report)]
    best = report["best_baseline"]
    if best is not None:
        served = points(read_difference(best["corrected_hit_at_5_difference"]))
        plain = points(read_difference(best["hit_at_5_difference"]))
        blocks.append(
            f"Against {best['name']}: Hit@5 {served} points as served, plain {plain} points, on "
            "the same queries."
        )
    return "\n\n".join(blocks)


def _headline(report: Mapping[str, Any]) -> str:
    """Return the line that MLflow shows of a collapsed description."""
    served = _served(report)
    hit = interval_cell(served["hit_at_5"], served["ci95"]["hit_at_5"])
    line = f"**Hit@5 {hit} %** as served on {report['split']}"
    best = _best_free(report)
    if best is None:
        return f"{line}."
    rival = percent(_served(report["baselines"][best])["hit_at_5"])
    return f"{line}; {best}, the best free predictor: {rival} %."


def _figures(report: Mapping[str, Any]) -> str:
    """Return plain and corrected Hit@k of the predictor, then of the best free one."""
    rows = {report["model"]: report}
    best = _best_free(report)
    if best is not None:
        rows[f"{best} (best free)"] = report["baselines"][best]
    lines = []
    for name, entry in rows.items():
        lines.append([name, "plain", *hit_cells(entry, entry["ci95"])])
        corrected = entry.get("corrected")
        if corrected:
            lines.append([name, "corrected", *hit_cells(corrected, corrected["ci95"])])
    headers = ["predictor", "score", *HIT_HEADERS]
    asked = queries_line(report["queries"], report["documents"], report["bank_rows"])
    caption = [f"{report['split']}, ctx {report['ctx']:,}: {asked}"]
    return captioned(caption, page_table(lines, headers, "llrrr"), bool(report["leaky"]))


def _best_free(report: Mapping[str, Any]) -> str | None:
    free = report["baselines"]
    return max(free, key=lambda name: _served(free[name])["hit_at_5"], default=None)


def _served(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the figures of the served order: corrected if there are any, else plain."""
    corrected: Mapping[str, Any] = entry.get("corrected") or entry
    return corrected
