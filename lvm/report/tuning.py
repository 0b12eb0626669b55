"""Report of `tune`: its trials, what each option matters, what is left of the gain on test."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from lvm.evaluation.metrics import points
from lvm.report.canvas import BLUE, FONT, GREY, LEGEND, RED, canvas, empty, label, legible
from lvm.report.tables import MARKDOWN, hit_cells, page_table, percent, table, wrapped
from lvm.studies.tuning import DEFAULT_TRIAL, VALUES, Gain, Tuned

SHOWN_TRIALS = 10
ENOUGH_TRIALS = 20  # complete ones, for shares that are more than a hint


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
    parts = [wrapped(_verdict(tuned), style), _trials(tuned, style)]
    if tuned.gains:
        parts.append(_gains(tuned, style))
    if tuned.importance:
        shares = ", ".join(f"{name} {percent(share)} %" for name, share in tuned.importance.items())
        num = sum(one.state == TrialState.COMPLETE for one in tuned.trials)
        over = f"over the {num} complete trials (fANOVA{', rough' * (num < ENOUGH_TRIALS)})"
        parts.append(wrapped(f"Share in the variance of val Hit@5 {over}: {shares}.", style))
    command = f"```\n{tuned.command}\n```" if style == MARKDOWN else tuned.command
    parts.append(f"Version {tuned.version}, run {tuned.run_id}, trained by\n\n{command}")
    return parts


def _verdict(tuned: Tuned) -> str:
    states = [one.state for one in tuned.trials]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    done = ", ".join(f"{number} {state.name.lower()}" for state, number in counts.items())
    head = f"Study {tuned.name}: {len(states)} trials, {done}."
    if not tuned.gains:
        return f"{head} None is better than the default on val."
    val, test = tuned.gains
    what = f"{head} Trial {tuned.best.number} leads the default by {points(val.plain)} points of "
    what += f"Hit@5 on the val queries that chose it, and by {points(test.plain)} on test"
    what += "." if tuned.left is None else f": {100 * tuned.left:.0f} % of the gain is left."
    order = f"{points(val.corrected)} and {points(test.corrected)}"
    parts = [what, f"In the corrected order the two are {order}."]
    if not val.plain.low > 0:
        parts.append("The interval on val includes 0: the share that is left says little.")
    return " ".join(parts)


def _trials(tuned: Tuned, style: str) -> str:
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
    return _table(lines, headers, "ll" + "r" * (len(headers) - 2), style)


def _gains(tuned: Tuned, style: str) -> str:
    lines = [line for gain in tuned.gains for line in _gain_lines(gain)]
    headers = ["split", "predictor", "score", "Hit@5 %", "- default"]
    return _table(lines, headers, "lllrr", style)


def _table(lines: list[list[str]], headers: list[str], alignment: str, style: str) -> str:
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
