"""Whether a training is optimised at all, without which data or width cannot be judged.

Shapes: Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lvm.evaluation.intervals import LEVEL, Difference, paired_difference, points
from lvm.evaluation.metrics import soft_hit_at
from lvm.studies.scaling.cells import CellResult
from lvm.system.thresholds import ScalingRules

K = 5


@dataclass(frozen=True)
class Optimised:
    """What the trials at the largest data and width showed; `reasons` are empty where all is well.

    `steps` is the gain of all optimiser steps over half of them, `rates` that of each other
    learning rate, both in soft Hit@5; `advice` says what to do. `loss_change` is that of the train
    loss over the last quarter of the rounds, as a share.
    """

    num_steps: int
    passes: float
    best_round: int
    rounds: int
    loss_change: float
    steps: Difference
    rates: tuple[tuple[float, Difference], ...]
    reasons: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class Trials:
    """Trainings of the largest data and width, each for one seed or more, the same ones first.

    `half` has half the steps of `full`, `rates` those steps at other learning rates.
    """

    full: Sequence[CellResult]
    half: Sequence[CellResult]
    rates: Sequence[Sequence[CellResult]]


def judge_optimisation(
    trials: Trials, passes: float, document_Q: ArrayLike, rules: ScalingRules
) -> Optimised:
    """Compare a training with one of half its steps, and that one with other learning rates.

    A cosine schedule flattens the end of any training, so that its own loss curve cannot tell
    whether more steps would pay; a shorter training with a schedule of its own can.
    """
    full, half = trials.full[0], trials.half[0]
    steps = _gain(trials.full, trials.half, document_Q)
    by_rate = tuple((r[0].cell.lr, _gain(r, trials.half, document_Q)) for r in trials.rates)
    num_steps, advice = full.cell.steps, []
    too_short = _too_short(num_steps, passes, rules)
    reasons, more_steps = list(too_short), list(too_short.values())
    over = f" over {len(trials.half)} seeds" if len(trials.half) > 1 else ""
    if pays(steps, rules):
        reasons.append(f"the second half of the steps gained {points(steps)} points{over}")
        more_steps.append(2 * num_steps)
    if more_steps:
        advice.append(f"max_steps={max(more_steps)}")
    better = max(by_rate, key=lambda one: one[1].mean, default=None)
    if better is not None and pays(better[1], rules):
        reasons.append(
            f"lr {better[0]:g} is {points(better[1])} points better than {half.cell.lr:g}{over}"
        )
        advice.append(f"lr={better[0]:g}")
    return Optimised(
        num_steps=num_steps,
        passes=passes,
        best_round=full.best_round,
        rounds=full.rounds,
        loss_change=_loss_change([record["train/loss"] for record in full.history]),
        steps=steps,
        rates=by_rate,
        reasons=tuple(reasons),
        advice=", ".join(advice),
    )


def is_in_doubt(found: Optimised, rules: ScalingRules) -> bool:
    """Tell whether only comparisons of trainings speak against a plan, not its very size."""
    return bool(found.reasons) and not _too_short(found.num_steps, found.passes, rules)


def pays(change: Difference, rules: ScalingRules) -> bool:
    """Tell whether a gain is one for which a grid is not begun."""
    return change.low > 0 and change.mean > rules.step_gain


def gain_over_seeds(
    better: Sequence[CellResult],
    worse: Sequence[CellResult],
    document_Q: ArrayLike,
    seed_sd: float,
    seed_freedom: int,
) -> Difference:
    """Return the gain in soft Hit@5 as the mean over seeds.

    `seed_sd` is the standard deviation of such a mean of one cell, known with `seed_freedom`, by
    which the interval over documents is widened.
    """
    mean_Q, other_Q = (
        np.mean([soft_hit_at(one.rank_Q, K) for one in cells], axis=0) for cells in (better, worse)
    )
    found = paired_difference(mean_Q, other_Q, document_Q, seed=0)
    noise = stats.t.ppf(1 - LEVEL / 2, seed_freedom) * np.sqrt(2) * seed_sd
    low = found.mean - np.hypot(found.mean - found.low, noise)
    high = found.mean + np.hypot(found.high - found.mean, noise)
    return replace(found, low=float(low), high=float(high))


def _gain(
    better: Sequence[CellResult], worse: Sequence[CellResult], document_Q: ArrayLike
) -> Difference:
    """Return the gain over the seeds that both have; of one seed, its noise is not known."""
    seeds = min(len(better), len(worse))
    better, worse = better[:seeds], worse[:seeds]
    if seeds == 1:
        return gain_over_seeds(better, worse, document_Q, seed_sd=0.0, seed_freedom=1)
    variances = [np.var([_score(one) for one in cells], ddof=1) for cells in (better, worse)]
    seed_sd = float(np.sqrt(np.mean(variances) / seeds))
    return gain_over_seeds(better, worse, document_Q, seed_sd, 2 * (seeds - 1))


def _score(result: CellResult) -> float:
    return float(soft_hit_at(result.rank_Q, K).mean())


def _too_short(num_steps: int, passes: float, rules: ScalingRules) -> dict[str, int]:
    """Return why a training is too short for a judgement, with the steps that would do."""
    found = {}
    if num_steps < rules.min_steps:
        reason = f"{num_steps} optimiser steps are fewer than {rules.min_steps}"
        found[reason] = rules.min_steps
    if passes < rules.min_passes:
        reason = f"{passes:.1f} passes over the data are fewer than {rules.min_passes:g}"
        found[reason] = int(np.ceil(num_steps * rules.min_passes / passes))
    return found


def _loss_change(losses: Sequence[float]) -> float:
    """Return how far the train loss fell over the last quarter of the rounds, as a share of it."""
    before = losses[-1 - max(1, len(losses) // 4)] if len(losses) > 1 else losses[-1]
    return (losses[-1] - before) / abs(before) if before else 0.0
