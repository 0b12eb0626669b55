"""Tables of a grid of trainings with its verdict."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lvm.evaluation.intervals import Difference, points
from lvm.report.tables import (
    MARKDOWN,
    TEXT,
    bullet,
    interval_cell,
    percent,
    table,
)
from lvm.studies.scaling.fit import Fitted, Gain
from lvm.studies.scaling.grid import BreakEven, Plan, Scaling

LEAST_SPAN = 3.0
Free = Mapping[str, Mapping[str, Any]]


def scaling_report(scaling: Scaling, plan: Plan, free: Free, num_queries: int) -> dict[str, Any]:
    """Return all that was found, as JSON values (arrays and infinities are left to the writer)."""
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
    """Return the verdict's sentence, then the tables, for a terminal."""
    return "\n\n".join(_parts(scaling, plan, free, num_queries, TEXT))


def scaling_note(scaling: Scaling) -> str:
    """Return the verdict with the gains, where the grid was run, as the run's description."""
    parts = [f"**{scaling.verdict.name}**: {scaling.verdict.sentence}"]
    if scaling.soft is not None and scaling.hit is not None:
        parts.append(_gain_table(scaling.soft, scaling.hit, MARKDOWN))
    return "\n\n".join(parts)


def scaling_page(scaling: Scaling, plan: Plan, free: Free, num_queries: int, bank: str) -> str:
    """Return the same as one page of Markdown."""
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
        parts.append("\n".join(bullet(style) + line for line in notes))
    free_lines = [_free_table(free, style)]
    if scaling.lead is not None:
        free_lines.append(_lead_line(*scaling.lead))
    return [*parts, *free_lines]


def _optimised_lines(scaling: Scaling, style: str) -> str:
    found = scaling.optimised
    lines = [
        f"{found.num_steps} optimiser steps; {found.passes:.1f} passes over the data; best round "
        f"{found.best_round} of {found.rounds}; train loss {100 * found.loss_change:+.1f} % over "
        "the last quarter",
        f"second half of the steps: soft Hit@5 {points(found.steps)} points",
        *(f"lr {lr:g} instead: {points(d)} points" for lr, d in found.rates),
    ]
    return "\n".join(["Is it optimised?", "", *(bullet(style) + line for line in lines)])


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
            ("the first minus the second", "lead"),
        )
    ]
    headers = ["gain at the largest data and width", "soft Hit@5, points", "Hit@5, points"]
    return table(lines, headers, "lrr", style)


def _notes(soft: Fitted, hit: Fitted, even: BreakEven, num_queries: int) -> list[str]:
    data, width = soft.exponents
    lines = [
        f"train documents to add for {100 * even.gain:g} point of Hit@5: {_count(even.documents)} "
        f"[{_count(even.low)}, {_count(even.high)}]",
        f"fit: exponents {data:.2f} of the data, {width:.2f} of the parameters; a cell's mean over "
        f"seeds varies by {100 * soft.seed_sd:.2f} points",
        f"{num_queries:,} queries; soft Hit@5 = mean of 1 / (1 + (rank / 5)^2) decides",
    ]
    if soft.backtest is not None and hit.backtest is not None:
        error = f"{points(soft.backtest)} ({points(hit.backtest)} of Hit@5)"
        lines.append(f"the largest data foretold from the smaller ones: off by {error} points")
    return lines


def _span_warning(parameters: list[int]) -> list[str]:
    span = parameters[-1] / parameters[0]
    if span >= LEAST_SPAN:
        return []
    return [
        f"warning: the largest model has only {span:.1f} x the parameters of the smallest, so that "
        "twice as many are far outside the grid; use widths further apart"
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
    return f"{shown}; it is not shown to be better, so that the verdict is about little."


def _count(documents: float) -> str:
    return f"{documents:,.0f}" if math.isfinite(documents) else "none within reach"


def _cell(result: Any) -> dict[str, Any]:
    """Return a result without its ranks."""
    return asdict(replace(result, rank_Q=np.zeros(0))) | {"rank_Q": None}


def _gains(fitted: Fitted) -> dict[str, Any]:
    gains: dict[str, Gain] = {
        "data": fitted.data,
        "parameters": fitted.parameters,
        "lead": fitted.lead,
    }
    return {name: asdict(gain) for name, gain in gains.items()} | {
        "exponents": fitted.exponents,
        "mean": fitted.mean_FW,
        "ci95": fitted.interval_FW2,
        "seed_sd": fitted.seed_sd,
        "backtest": None if fitted.backtest is None else asdict(fitted.backtest),
    }
