"""Reports of `scaling` and `tune`: a grid of trainings with its verdict, trials and their gain."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from lvm.evaluation.metrics import Difference, points
from lvm.report.canvas import (
    BLACK,
    BLUE,
    FONT,
    GREY,
    LEGEND,
    LIGHT,
    RED,
    SERIES,
    canvas,
    empty,
    end_labels,
    label,
    legible,
    log_axis,
)
from lvm.report.tables import (
    MARKDOWN,
    TEXT,
    bullets,
    hit_cells,
    interval_cell,
    page_table,
    percent,
    table,
    wrapped,
)
from lvm.studies.scaling_fit import Fitted
from lvm.studies.scaling_grid import BreakEven, Plan, Scaling
from lvm.studies.tuning import DEFAULT_TRIAL, VALUES, Gain, Tuned

POINTS = 60  # of a drawn curve
LABELS = 11  # that a panel has room for
LEAST_SPAN = 3.0
SHOWN_TRIALS = 10
ENOUGH_TRIALS = 20  # complete ones, for shares that are more than a hint
Free = Mapping[str, Mapping[str, Any]]


def scaling_report(scaling: Scaling, plan: Plan, free: Free, num_queries: int) -> dict[str, Any]:
    """Return all results as JSON values; the writer converts arrays and infinities."""
    verdict, optimised = scaling.verdict, scaling.optimised
    report: dict[str, Any] = {
        "verdict": verdict.name,
        "sentence": verdict.sentence,
        "needed": None if verdict.needed is None else asdict(verdict.needed),
        "queries": num_queries,
        "documents": scaling.num_documents,
        "plan": asdict(plan),
        "optimised": asdict(optimised),
        "free": dict(free),
        "lead": None
        if scaling.lead is None
        else {"over": scaling.lead[0], **asdict(scaling.lead[1])},
        "cells": [_cell(result) for result in scaling.results],
    }
    if scaling.soft is not None and scaling.hit is not None and scaling.break_even is not None:
        report["gains"] = {"soft_hit_at_5": _gains(scaling.soft), "hit_at_5": _gains(scaling.hit)}
        report["break_even"] = asdict(scaling.break_even)
    return report


def scaling_text(scaling: Scaling, plan: Plan, free: Free, num_queries: int) -> str:
    """Return the verdict, then the tables, for a terminal."""
    return "\n\n".join(_parts(scaling, plan, free, num_queries, TEXT))


def scaling_note(scaling: Scaling) -> str:
    """Return the verdict, and the gains where the grid was trained, as the run's description."""
    parts = [f"**{scaling.verdict.name}**: {scaling.verdict.sentence}"]
    if scaling.soft is not None and scaling.hit is not None:
        parts.append(_gain_table(scaling.soft, scaling.hit, MARKDOWN))
    return "\n\n".join(parts)


def scaling_page(scaling: Scaling, plan: Plan, free: Free, num_queries: int, bank: str) -> str:
    """Return the text of `scaling_text` as one page of Markdown."""
    first, *others = _parts(scaling, plan, free, num_queries, MARKDOWN)
    parts = [f"**{first}**", f"Bank {bank}; {num_queries:,} val queries measured.", *others]
    return "\n\n".join(parts) + "\n"


def documents_of(scaling: Scaling, plan: Plan) -> list[float]:
    """Return the mean number of documents that each fraction trains on."""
    grid = [result for result in scaling.results if result.cell.steps == plan.steps]
    return [
        float(np.mean([r.documents for r in grid if r.cell.fraction == fraction]))
        for fraction in plan.fractions
    ]


def parameters_of(scaling: Scaling, plan: Plan) -> list[int]:
    """Return the number of parameters of each width."""
    by_width = {result.cell.width: result.parameters for result in scaling.results}
    return [by_width[width] for width in plan.widths]


def _parts(scaling: Scaling, plan: Plan, free: Free, num_queries: int, style: str) -> list[str]:
    parts = [scaling.verdict.sentence, _optimised_lines(scaling, style)]
    if scaling.soft is not None and scaling.hit is not None and scaling.break_even is not None:
        parts.append(_grid_table(scaling, scaling.hit, plan, style))
        parts.append(_gain_table(scaling.soft, scaling.hit, style))
        notes = _notes(scaling.soft, scaling.hit, scaling.break_even, num_queries)
        notes += _span_warning(parameters_of(scaling, plan))
        parts.append(bullets(notes, style))
    parts.append(_free_table(free, style))
    return parts if scaling.lead is None else [*parts, _lead_line(*scaling.lead)]


def _optimised_lines(scaling: Scaling, style: str) -> str:
    found = scaling.optimised
    lines = [
        f"{found.num_steps} optimizer steps; {found.passes:.1f} passes over the data; best round "
        f"{found.best_round} of {found.rounds}; train loss {100 * found.loss_change:+.1f} % in "
        "the last quarter",
        f"second half of the steps: soft Hit@5 {points(found.steps)} points",
        *(f"lr {lr:g} instead: {points(d)} points" for lr, d in found.rates),
    ]
    return f"Is it optimised?\n\n{bullets(lines, style)}"


def _grid_table(scaling: Scaling, hit: Fitted, plan: Plan, style: str) -> str:
    lines = []
    for place, documents in enumerate(documents_of(scaling, plan)):
        cells = [
            interval_cell(float(hit.mean_FW[place, w]), list(hit.interval_FW2[place, w]))
            for w in range(len(plan.widths))
        ]
        lines.append([f"{plan.fractions[place]:g}", f"{documents:,.0f}", *cells])
    names = [
        f"width {width} ({number / 1e6:.2g} M)"
        for width, number in zip(plan.widths, parameters_of(scaling, plan), strict=True)
    ]
    body = table(lines, ["fraction", "documents", *names], "rr" + "r" * len(names), style)
    return (
        f"Hit@5 %, mean of {len(plan.seeds)} seeds [95 % interval by document and seed]\n\n{body}"
    )


def _gain_table(soft: Fitted, hit: Fitted, style: str) -> str:
    lines = [
        [name, points(getattr(soft, key)), points(getattr(hit, key))]
        for name, key in (
            ("twice the data", "data"),
            ("twice the parameters", "parameters"),
            ("data minus parameters", "lead"),
        )
    ]
    headers = ["gain over the largest cell", "soft Hit@5, points", "Hit@5, points"]
    return table(lines, headers, "lrr", style)


def _notes(soft: Fitted, hit: Fitted, even: BreakEven, num_queries: int) -> list[str]:
    data, width = soft.exponents
    lines = [
        f"train documents to add for {100 * even.gain:g} point of Hit@5: {_count(even.documents)} "
        f"[{_count(even.low)}, {_count(even.high)}]",
        f"fit: exponents {data:.2f} (data), {width:.2f} (parameters); standard deviation of a "
        f"cell's mean over seeds: {100 * soft.seed_sd:.2f} points",
        f"{num_queries:,} queries; soft Hit@5, the mean of 1 / (1 + (rank / 5)^2), decides",
    ]
    if soft.backtest is not None and hit.backtest is not None:
        error = f"{points(soft.backtest)} points ({points(hit.backtest)} of Hit@5)"
        lines.append(f"backtest: the largest data, predicted from the smaller, is off by {error}")
    return lines


def _span_warning(parameters: list[int]) -> list[str]:
    span = parameters[-1] / parameters[0]
    if span >= LEAST_SPAN:
        return []
    return [
        f"warning: the largest model has only {span:.1f} x the parameters of the smallest, so "
        "doubling them leaves the grid far behind; choose widths further apart"
    ]


def _free_table(free: Free, style: str) -> str:
    lines = [
        [name, interval_cell(one["hit_at_5"], one["ci95"]["hit_at_5"]), percent(one["soft"])]
        for name, one in free.items()
    ]
    return table(lines, ["free predictor", "Hit@5 %", "soft Hit@5 %"], "lrr", style)


def _lead_line(name: str, lead: Difference) -> str:
    shown = f"The largest model against {name}: soft Hit@5 {points(lead)} points"
    if lead.low > 0:
        return f"{shown}."
    return (
        f"{shown}; it is not shown to be better, so the verdict says little: improve the model or "
        "its training first."
    )


def _count(documents: float) -> str:
    return f"{documents:,.0f}" if math.isfinite(documents) else "none within reach"


def _cell(result: Any) -> dict[str, Any]:
    """Return a result without its ranks."""
    return asdict(replace(result, rank_Q=np.zeros(0))) | {"rank_Q": None}


def _gains(fitted: Fitted) -> dict[str, Any]:
    gains = {name: asdict(getattr(fitted, name)) for name in ("data", "parameters", "lead")}
    return gains | {
        "exponents": fitted.exponents,
        "mean": fitted.mean_FW,
        "ci95": fitted.interval_FW2,
        "seed_sd": fitted.seed_sd,
        "backtest": None if fitted.backtest is None else asdict(fitted.backtest),
    }


def scaling_figure(scaling: Scaling, plan: Plan, free: Free) -> Figure:
    """Draw Hit@5 above soft Hit@5 against documents, one curve per width, dotted to twice as many.

    The grid must have been trained.
    """
    assert scaling.hit is not None and scaling.soft is not None
    documents, parameters = documents_of(scaling, plan), parameters_of(scaling, plan)
    best = max(free, key=lambda name: free[name]["hit_at_5"])
    scores = (free[best]["hit_at_5"], free[best]["soft"])
    figure, panels = canvas(
        f"More data or a wider model? Verdict: {scaling.verdict.name}",
        "bars: 95 % intervals (gains, being paired, have their own); dotted: twice the data; "
        "dashed: best free predictor",
        leaky=False,
        height_ratios=(1, 1),
    )
    fits = (scaling.hit, scaling.soft)
    names = ("Hit@5, %", "soft Hit@5, %\n(decides)")
    for axes, fitted, score, name in zip(panels, fits, scores, names, strict=True):
        ends = _curves(axes, fitted, documents, dict(zip(plan.widths, parameters, strict=True)))
        axes.axhline(100 * score, color=GREY, linestyle="--", linewidth=1.5)
        axes.set_ylabel(name)
        log_axis(axes, [*documents, 2 * documents[-1]])
        axes.set_xlim(documents[0] / 1.1, 2.2 * documents[-1])
        axes.grid(axis="y", color=LIGHT)
        end_labels(axes, [*ends, (100 * score, best, GREY)], LABELS)
    panels[0].tick_params(axis="x", labelbottom=False)
    panels[1].set_xlabel("train documents (logarithmic)")
    return legible(figure)


def _curves(
    axes: Axes,
    fitted: Fitted,
    documents: Sequence[float],
    parameters: Mapping[int, int],
) -> list[tuple[float, str, str]]:
    """Draw the curves of one score; return their ends with names and colours.

    `parameters` has the number of parameters of each width, widest last.
    """
    most = documents[-1]
    known = np.geomspace(documents[0], most, POINTS)
    beyond = np.geomspace(most, 2 * most, POINTS // 4)
    ends = []
    for place, (width, number) in enumerate(parameters.items()):
        color, z = SERIES[place % len(SERIES)], number / max(parameters.values())
        aside = 1.02 ** (place - len(parameters) / 2)
        at = np.array(documents) * aside
        axes.plot(at, 100 * fitted.mean_FW[:, place], "o", color=color, markersize=8)
        for x, bounds in zip(at, fitted.interval_FW2[:, place], strict=True):
            axes.plot([x, x], 100 * bounds, color=color, linewidth=2, alpha=0.6)
        axes.plot(known, 100 * fitted.at(known / most, z), color=color, linewidth=2)
        axes.plot(beyond, 100 * fitted.at(beyond / most, z), ":", color=color, linewidth=2)
        end = 2 * most * aside
        axes.plot([end, end], 100 * fitted.next_interval_W2[place], color=color, linewidth=4)
        ends.append((100 * float(fitted.at(2.0, z)), f"width {width}", color))
    axes.axvline(most, color=BLACK, linewidth=0.8)
    return ends


def settings_text(values: Mapping[str, Any]) -> str:
    """Return settings as words for a run's name: `lr 0.002 hidden 128`."""
    return " ".join(f"{name} {value:g}" for name, value in values.items())


def trials_table(tuned: Tuned) -> pd.DataFrame:
    """Return a line per trial: number, outcome, epochs, best val Hit@5 (a fraction), settings."""
    lines = []
    for one in tuned.trials:
        hits = list(one.intermediate_values.values())
        told = {"trial": one.number, "outcome": one.state.name.lower(), "epochs": len(hits)}
        lines.append(told | {"val_hit_at_5": max(hits, default=None), **one.user_attrs[VALUES]})
    return pd.DataFrame(lines)


def tuning_report(tuned: Tuned) -> dict[str, Any]:
    """Return the results as JSON values; gains are differences of Hit@5, as fractions."""
    gains = {
        one.split: {
            "hit_at_5": vars(one.plain),
            "corrected_hit_at_5": vars(one.corrected),
            "figures": one.reports,
        }
        for one in tuned.gains
    }
    best = {"trial": tuned.best.number, "settings": tuned.best.user_attrs[VALUES]}
    return {
        "study": tuned.name,
        "trials": trials_table(tuned).to_dict("records"),
        "winner": best | {"run": tuned.run_id, "version": tuned.version},
        "gains": gains,
        "left_on_test": tuned.left,
        "importance": tuned.importance,
        "command": tuned.command,
    }


def tuning_parts(tuned: Tuned, style: str) -> list[str]:
    """Return the parts of the report, the verdict first, as plain text or Markdown."""
    parts = [wrapped(_tuning_verdict(tuned), style), _best_trials(tuned, style)]
    if tuned.gains:
        parts.append(_tuning_gains(tuned, style))
    if tuned.importance:
        shares = ", ".join(f"{name} {percent(share)} %" for name, share in tuned.importance.items())
        num = sum(one.state == TrialState.COMPLETE for one in tuned.trials)
        over = f"over the {num} complete trials (fANOVA{', rough' * (num < ENOUGH_TRIALS)})"
        parts.append(wrapped(f"Share in the variance of val Hit@5 {over}: {shares}.", style))
    command = f"```\n{tuned.command}\n```" if style == MARKDOWN else tuned.command
    parts.append(f"Version {tuned.version}, run {tuned.run_id}, trained by\n\n{command}")
    return parts


def _tuning_verdict(tuned: Tuned) -> str:
    states = [one.state for one in tuned.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    done = ", ".join(f"{number} {state.name.lower()}" for state, number in counts.items())
    head = f"Study {tuned.name}: {len(states)} trials, {done}."
    if not tuned.gains:
        return f"{head} None is better than the default on val."
    val, test = tuned.gains
    what = f"{head} Trial {tuned.best.number} leads the default by {points(val.plain)} points of "
    what += f"Hit@5 on the val queries that chose it, and by {points(test.plain)} on test"
    if tuned.left is not None:
        share = f"{100 * tuned.left:.0f} %" if tuned.left > 0 else "none"
        what += f": {share} of the gain is left"
    order = f"{points(val.corrected)} and {points(test.corrected)}"
    parts = [f"{what}.", f"In the corrected order the two are {order}."]
    if not val.plain.low > 0:
        parts.append("The interval on val includes 0: the share that is left says little.")
    return " ".join(parts)


def _best_trials(tuned: Tuned, style: str) -> str:
    """Return the best trials, the default among them."""
    found = trials_table(tuned).sort_values("val_hit_at_5", ascending=False, kind="stable")
    is_default = found["trial"] == DEFAULT_TRIAL
    shown = found[is_default | (np.arange(len(found)) < SHOWN_TRIALS)]
    options = [name for name in shown.columns if name in tuned.best.user_attrs[VALUES]]
    lines = [
        [
            "default" if line["trial"] == DEFAULT_TRIAL else str(line["trial"]),
            str(line["outcome"]),
            str(line["epochs"]),
            "-" if pd.isna(line["val_hit_at_5"]) else f"{100 * line['val_hit_at_5']:.2f}",
            *(f"{line[name]:g}" for name in options),
        ]
        for line in shown.to_dict("records")
    ]
    headers = ["trial", "outcome", "epochs", "val Hit@5 %", *options]
    return _tuning_table(lines, headers, "ll" + "r" * (len(headers) - 2), style)


def _tuning_gains(tuned: Tuned, style: str) -> str:
    lines = [line for gain in tuned.gains for line in _gain_lines(gain)]
    headers = ["split", "predictor", "score", "Hit@5 %", "- default"]
    return _tuning_table(lines, headers, "lllrr", style)


def _tuning_table(lines: list[list[str]], headers: list[str], alignment: str, style: str) -> str:
    if style == MARKDOWN:
        return page_table(lines, headers, alignment)
    return table(lines, headers, alignment, style)


def _gain_lines(gain: Gain) -> list[list[str]]:
    """Return two lines a predictor: plain and corrected Hit@5 with intervals."""
    lines = []
    for place, (name, report) in enumerate(gain.reports.items()):
        queries = f"{gain.split}, {report['queries']:,} queries" if place == 0 else ""
        gained = (points(gain.plain), points(gain.corrected)) if place == 1 else ("", "")
        free = " (free)" if name == gain.free else ""
        scores = {"plain": report, "corrected": report["corrected"]}
        for order, (score, found) in enumerate(scores.items()):
            (cell,) = hit_cells(found, found["ci95"], ("hit_at_5",))
            first = [queries, name + free] if order == 0 else ["", ""]
            lines.append([*first, score, cell, gained[order]])
    return lines


def tuning_figure(tuned: Tuned) -> Figure:
    """Draw val Hit@5 by trial, with the best so far, above what each option matters."""
    title = f"Tuning: {len(tuned.trials)} trials of study {tuned.name}"
    figure, (above, below) = canvas(title, "val Hit@5 of the queries that choose", False, (3, 2))
    complete = [one for one in tuned.trials if one.state == TrialState.COMPLETE]
    pruned = [one for one in tuned.trials if one.state == TrialState.PRUNED]
    best = np.maximum.accumulate([_hit(one) for one in complete])
    numbers = [one.number for one in complete]
    above.step(numbers, best, where="post", color=GREY, label="best so far")
    above.plot(numbers, [_hit(one) for one in complete], "o", color=BLUE, label="complete")
    above.plot(
        [one.number for one in pruned],
        [_hit(one) for one in pruned],
        "x",
        color=RED,
        label="pruned",
    )
    label(above, "default", (DEFAULT_TRIAL, _hit(complete[0])), (8, -16), color=GREY)
    above.set_xlabel("trial")
    above.set_ylabel("val Hit@5 %")
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.legend(**LEGEND)
    below.set_xlabel("share in the variance of val Hit@5 %")
    if not tuned.importance:
        empty(below, "too few complete trials to tell what matters")
        return legible(figure)
    names = list(tuned.importance)[::-1]
    shares = [100 * tuned.importance[name] for name in names]
    below.barh(names, shares, color=BLUE)
    for place, share in enumerate(shares):
        below.text(share, place, f" {share:.0f}", va="center", fontsize=FONT - 2)
    return legible(figure)


def _hit(one: FrozenTrial) -> float:
    """Return the best val Hit@5 of a trial's epochs in percent."""
    return 100 * max(one.intermediate_values.values(), default=float("nan"))
