"""Say what limits a model: first whether its training is optimised, then the verdict on a grid.

Shapes: Q queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lvm.evaluation.metrics import LEVEL, Difference, paired_difference, points, soft_hit_at
from lvm.studies.scaling_cells import CellResult
from lvm.studies.scaling_fit import Fitted, Gain
from lvm.system.settings import ScalingRules

K = 5
DATA, CAPACITY, BOTH = "data-limited", "capacity-limited", "both"
SATURATED, NOT_OPTIMISED, INCONCLUSIVE = "saturated", "not optimised", "inconclusive"
LEAST_SHRINKING = 0.9  # intervals are asymmetric, so the estimate may say that nothing is missing
MOST_TIMES = 100.0  # more than this many times the data is no useful advice


@dataclass(frozen=True)
class Optimised:
    """Whether the training at the largest data and width is optimised; if so, `reasons` is empty.

    Attributes:
        passes: passes over the train rows.
        loss_change: relative change of the train loss over the last quarter of the rounds.
        steps: gain in soft Hit@5 of all optimizer steps over half of them.
        rates: the other learning rates, each with its gain in soft Hit@5.
        reasons: what is wrong with the training; `advice` says what to change.
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
    """Trainings of the largest data and width, each for one seed or more, in the same order.

    `half` has half the steps of `full`; `rates` have those steps at other learning rates.
    """

    full: Sequence[CellResult]
    half: Sequence[CellResult]
    rates: Sequence[Sequence[CellResult]]


def judge_optimisation(
    trials: Trials, passes: float, document_Q: ArrayLike, rules: ScalingRules
) -> Optimised:
    """Compare a training with one of half its steps, and that one with other learning rates.

    A cosine schedule flattens the end of any training, so its own loss curve does not show whether
    more steps would help. A shorter training with its own schedule does.
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
    """Tell whether a plan fails only in comparisons of trainings, not by its number of steps."""
    return bool(found.reasons) and not _too_short(found.num_steps, found.passes, rules)


def pays(change: Difference, rules: ScalingRules) -> bool:
    """Tell whether a gain is large and certain enough to stop before the grid."""
    return change.low > 0 and change.mean > rules.step_gain


def gain_over_seeds(
    better: Sequence[CellResult],
    worse: Sequence[CellResult],
    document_Q: ArrayLike,
    seed_sd: float,
    seed_freedom: int,
) -> Difference:
    """Return the gain in soft Hit@5 as the mean over seeds.

    The interval over documents is widened by `seed_sd`, the standard deviation of such a mean of
    one cell, with `seed_freedom` degrees of freedom.
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
    """Return the gain over the seeds that both have; with one seed, its noise is unknown."""
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
    """Return why a training is too short to be judged, each reason with the steps it needs."""
    found = {}
    if num_steps < rules.min_steps:
        reason = f"{num_steps} optimizer steps are fewer than {rules.min_steps}"
        found[reason] = rules.min_steps
    if passes < rules.min_passes:
        reason = f"{passes:.1f} passes over the data are fewer than {rules.min_passes:g}"
        found[reason] = int(np.ceil(num_steps * rules.min_passes / passes))
    return found


def _loss_change(losses: Sequence[float]) -> float:
    """Return the relative change of the train loss over the last quarter of the rounds."""
    before = losses[-1 - max(1, len(losses) // 4)] if len(losses) > 1 else losses[-1]
    return (losses[-1] - before) / abs(before) if before else 0.0


@dataclass(frozen=True)
class Needed:
    """What would decide if the gains stay as estimated: more documents, more seeds, or both.

    Documents are those of the measured queries, with as many queries per document as now. Each is
    None if it is not enough alone, or takes more than MOST_TIMES what was used.
    """

    documents: int | None
    seeds: int | None
    documents_with_seeds: tuple[int, int] | None


@dataclass(frozen=True)
class Sample:
    """What a grid was measured with: queries, their documents, seeds per cell."""

    queries: int
    documents: int
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """One of the names above, with the sentence that explains it."""

    name: str
    sentence: str
    needed: Needed | None = None


def not_optimised(found: Optimised) -> Verdict:
    """Return the verdict that stops before the grid."""
    why = "; ".join(found.reasons)
    return Verdict(NOT_OPTIMISED, f"Not optimised: {why}. Do first: {found.advice}.")


def judge(fitted: Fitted, optimised: Optimised, sample: Sample, rules: ScalingRules) -> Verdict:
    """Return the verdict on a grid, by the intervals of its gains.

    * not optimised: more steps certainly gain more than more data or a wider model.
    * saturated: both intervals lie within +- `saturated_gain`, and so does the gain of the steps.
    * both: both intervals lie above `both_gain`.
    * data-limited: the interval of the data's gain lies above zero and above that of the
      parameters' gain; capacity-limited likewise.
    * inconclusive: anything else.
    """
    data, parameters, steps = fitted.data, fitted.parameters, optimised.steps
    gains = f"twice the data: {points(data)}; twice the parameters: {points(parameters)}"
    if steps.low > max(data.mean, parameters.mean, rules.saturated_gain):
        return Verdict(
            NOT_OPTIMISED,
            f"Not optimised: the second half of the optimizer steps gained "
            f"{100 * steps.mean:+.1f} points, more than what is predicted for {gains}. "
            f"Do first: max_steps={2 * optimised.num_steps}.",
        )
    if _flat(data, rules) and _flat(parameters, rules):
        if steps.mean <= rules.saturated_gain:
            return Verdict(SATURATED, f"Saturated: neither pays ({gains}).")
        why = f"the second half of the optimizer steps gained {100 * steps.mean:+.1f} points"
        more = f"max_steps={2 * optimised.num_steps} would tell"
        return Verdict(INCONCLUSIVE, f"Inconclusive ({gains}): neither pays, but {why}; {more}.")
    if min(data.low, parameters.low) > rules.both_gain:
        return Verdict(BOTH, f"Both data and capacity limit ({gains}).")
    if data.low > max(0.0, parameters.high):
        return Verdict(DATA, f"Data-limited: more data pay more than a wider model ({gains}).")
    if parameters.low > max(0.0, data.high):
        return Verdict(
            CAPACITY, f"Capacity-limited: a wider model pays more than more data ({gains})."
        )
    needed = needed_to_decide(fitted, sample, rules)
    advice = _advice(needed, sample)
    return Verdict(INCONCLUSIVE, f"Inconclusive ({gains}): {advice}.", needed)


def needed_to_decide(fitted: Fitted, sample: Sample, rules: ScalingRules) -> Needed:
    """Return what would shrink the intervals enough for a verdict, if the gains are as estimated.

    The variance of a gain is V_d / d + V_s / s + V_m with d times the documents and s times the
    seeds. V_m, the misfit of the surface with the error of the law, stays.
    """
    share = _needed_shrinking(fitted, rules)
    if share <= 0:
        return Needed(None, None, None)
    square = min(LEAST_SHRINKING, share) ** 2
    gains = (fitted.data, fitted.parameters)
    documents, seeds, together = (
        max(_times(gain, square, causes) for gain in gains)
        for causes in (("document",), ("seed",), ("document", "seed"))
    )
    count, seed_count = _count(together, sample.documents), _count(together, sample.seeds)
    return Needed(
        _count(documents, sample.documents),
        _count(seeds, sample.seeds),
        None if count is None or seed_count is None else (count, seed_count),
    )


def _flat(gain: Gain, rules: ScalingRules) -> bool:
    return -rules.saturated_gain <= gain.low and gain.high <= rules.saturated_gain


def _needed_shrinking(fitted: Fitted, rules: ScalingRules) -> float:
    """Return the largest factor on the intervals' widths at which some verdict would hold."""
    d, p = fitted.data.mean, fitted.parameters.mean
    (below_d, above_d), (below_p, above_p) = map(_reach, (fitted.data, fitted.parameters))
    band, least = rules.saturated_gain, rules.both_gain
    return max(
        min((band - abs(d)) / max(below_d, above_d), (band - abs(p)) / max(below_p, above_p)),
        min(d / below_d, (d - p) / (below_d + above_p)),
        min(p / below_p, (p - d) / (below_p + above_d)),
        min((d - least) / below_d, (p - least) / below_p),
    )


def _reach(gain: Gain) -> tuple[float, float]:
    """Return the lengths of the interval below and above the estimate."""
    return max(gain.mean - gain.low, 1e-9), max(gain.high - gain.mean, 1e-9)


def _times(gain: Gain, square: float, causes: tuple[str, ...]) -> float:
    """Return the multiple of `causes` that brings the variance down to `square` times it."""
    by_cause = {"document": gain.document_variance, "seed": gain.seed_variance}
    shrinks = sum(by_cause[cause] for cause in causes)
    stays = sum(by_cause.values()) + gain.misfit_variance - shrinks
    left = square * (shrinks + stays) - stays
    return max(1.0, shrinks / left) if left > 0 else math.inf


def _count(times: float, now: int) -> int | None:
    return math.ceil(times * now) if times <= MOST_TIMES else None


def _advice(needed: Needed, sample: Sample) -> str:
    rate = sample.queries / sample.documents
    options = []
    if needed.documents is not None:
        number = math.ceil(rate * needed.documents)
        options.append(f"about {number:,} queries from {needed.documents:,} documents")
    if needed.seeds is not None:
        options.append(f"about {needed.seeds:,} seeds")
    if not options and needed.documents_with_seeds is not None:
        documents, seeds = needed.documents_with_seeds
        number = math.ceil(rate * documents)
        options.append(
            f"about {number:,} queries from {documents:,} documents together with {seeds:,} seeds"
        )
    if not options:
        return "the gains are too alike, or the surface fits too badly, for more to part them"
    return f"{' or '.join(options)} would decide, were the gains as estimated"
