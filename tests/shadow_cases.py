"""Hand-made shadow results in which one thing can be changed at a time."""

import dataclasses
from typing import Any

import pandas as pd

from lvm.evaluation.metrics import Difference
from lvm.shadow.comparison import Comparison, LaneChange, Outcome, ShadowResult


def difference(
    mean: float, low: float, high: float, p: float = 0.001, docs: int = 40
) -> Difference:
    return Difference(mean=mean, low=low, high=high, p_value=p, num_documents=docs)


CLEAR_GAIN = difference(0.04, 0.02, 0.06)
CLEAR_FALL = difference(-0.04, -0.06, -0.02)
NO_GAIN = difference(0.01, -0.01, 0.03, p=0.3)
TIE = difference(0.0, 0.0, 0.0, p=1.0)


def outcome(name: str, kind: str, hit_at_5: float, **changes: Any) -> Outcome:
    """Return a scored outcome whose interval is +- 2 points; it is served as it is ranked."""
    figures = {
        "hit_at_1": hit_at_5 / 2,
        "hit_at_5": hit_at_5,
        "hit_at_10": hit_at_5 * 1.5,
        "mrr_at_10": hit_at_5 / 1.5,
        "median_rank": 120.0,
    }
    ci95 = {key: [value - 0.02, value + 0.02] for key, value in figures.items()}
    one = Outcome(
        name=name,
        kind=kind,
        version=None,
        ctx=100,
        latency_ms={"p50": 4.0, "p95": 8.0},
        origin="measured now",
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=12.34,
        figures=figures,
        ci95=ci95,
        raw=figures,
        corrected={key: value * 1.2 for key, value in figures.items()},
        corrected_ci95=ci95,
        served=figures,
        served_ci95=ci95,
        val_hit_at_5=hit_at_5,
    )
    return dataclasses.replace(one, **changes)


def unscored(name: str, **changes: Any) -> Outcome:
    """Return a trained candidate without figures, the best one on val."""
    empty: dict[str, Any] = {"val_hit_at_5": 0.9}
    empty |= {key: {} for key in ("figures", "ci95", "raw", "corrected")}
    empty |= {key: {} for key in ("corrected_ci95", "served", "served_ci95", "latency_ms")}
    return dataclasses.replace(outcome(name, "trained", 0.0), **empty, **changes)


def compared(
    candidate: str,
    reference: str,
    change: Difference,
    plain: Difference | None = None,
    **lanes: Difference,
) -> Comparison:
    """Return a comparison; `lanes` name the change in each lane, 300 queries each."""
    changes = tuple(LaneChange(lane, 300, by) for lane, by in lanes.items())
    return Comparison(candidate, reference, change, change, plain or change, 0.015, changes)


def shadow_result(
    outcomes: list[Outcome],
    comparisons: list[Comparison],
    baseline_name: str | None,
    **changes: Any,
) -> ShadowResult:
    """Return a replay of 2,000 queries; the first scored free outcome is the best free one."""
    free = [one.name for one in outcomes if one.kind == "free" and one.is_scored]
    result = ShadowResult(
        bank_sha256="b" * 64,
        windows_sha256="w" * 64,
        leaky=False,
        num_rows=40_000,
        num_answers=39_000,
        num_queries=2_000,
        num_documents=60,
        removed_ctx=100,
        seed=0,
        baseline_name=baseline_name,
        best_free=free[0] if free else None,
        outcomes=tuple(outcomes),
        comparisons=tuple(comparisons),
        per_query=pd.DataFrame(),
        queries_sha256="a" * 64,
    )
    return dataclasses.replace(result, **changes)


def winning_case(**changes: Any) -> ShadowResult:
    """Return a replay in which `model` beats the baseline `old` as well as the best free `ema`."""
    outcomes = [
        outcome("model", "trained", 0.20),
        outcome("old", "trained", 0.17),
        outcome("ema", "free", 0.16),
        outcome("copy-last", "free", 0.12),
    ]
    comparisons = [
        compared("model", "old", CLEAR_GAIN, law=CLEAR_GAIN, art=NO_GAIN),
        compared("ema", "old", NO_GAIN),
        compared("copy-last", "old", CLEAR_FALL),
        compared("model", "ema", CLEAR_GAIN),
        compared("old", "ema", NO_GAIN),
    ]
    return dataclasses.replace(shadow_result(outcomes, comparisons, "old"), **changes)
