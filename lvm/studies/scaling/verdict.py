"""The verdict on a grid: what limits, or how much more must be asked to know it."""

import math
from dataclasses import dataclass

from lvm.evaluation.intervals import points
from lvm.studies.scaling.fit import Fitted, Gain
from lvm.studies.scaling.optimised import Optimised
from lvm.system.thresholds import ScalingRules

DATA, CAPACITY, BOTH = "data-limited", "capacity-limited", "both"
SATURATED, NOT_OPTIMISED, INCONCLUSIVE = "saturated", "not optimised", "inconclusive"
LEAST_SHRINKING = 0.9  # intervals are not symmetric: the estimate may say that nothing is missing
MOST_TIMES = 100.0  # beyond, more of the same is no advice


@dataclass(frozen=True)
class Needed:
    """What would decide if the gains stay: more documents asked, or more seeds, or both.

    Documents are those of the measured queries, at as many queries a document as now. Each is None
    where it cannot be enough alone, or takes more than a hundred times what was used.
    """

    documents: int | None
    seeds: int | None
    documents_with_seeds: tuple[int, int] | None


@dataclass(frozen=True)
class Asked:
    """What a grid was measured with: queries, their documents, seeds a cell."""

    queries: int
    documents: int
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """One of the names above with the sentence that explains it."""

    name: str
    sentence: str
    needed: Needed | None = None


def not_optimised(found: Optimised) -> Verdict:
    """Return the verdict that stops before the grid."""
    why = "; ".join(found.reasons)
    return Verdict(NOT_OPTIMISED, f"Not optimised: {why}. Do first: {found.advice}.")


def judge(fitted: Fitted, optimised: Optimised, asked: Asked, rules: ScalingRules) -> Verdict:
    """Return what limits, by the intervals of the gains.

    Saturated: the intervals of both gains within +- `saturated_gain`, and no gain from the steps
    beyond it. Both: both intervals above `both_gain`. Data: the interval of the data's gain lies
    above zero and above that of the parameters' gain; capacity likewise. Where more steps certainly
    gain more than either, the grid was not optimised. Else: inconclusive.
    """
    data, parameters, steps = fitted.data, fitted.parameters, optimised.steps
    gains = f"twice the data: {points(data)}; twice the parameters: {points(parameters)}"
    if steps.low > max(data.mean, parameters.mean, rules.saturated_gain):
        return Verdict(
            NOT_OPTIMISED,
            f"Not optimised: the second half of the optimiser steps gained "
            f"{100 * steps.mean:+.1f} points, more than what is foretold for {gains}. "
            f"Do first: max_steps={2 * optimised.num_steps}.",
        )
    if _flat(data, rules) and _flat(parameters, rules):
        if steps.mean <= rules.saturated_gain:
            return Verdict(SATURATED, f"Saturated: neither pays ({gains}).")
        why = f"the second half of the optimiser steps gained {100 * steps.mean:+.1f} points"
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
    needed = needed_to_decide(fitted, asked, rules)
    advice = _advice(needed, asked)
    return Verdict(INCONCLUSIVE, f"Inconclusive ({gains}): {advice}.", needed)


def needed_to_decide(fitted: Fitted, asked: Asked, rules: ScalingRules) -> Needed:
    """Return what would shrink the intervals enough for a verdict, were the gains as estimated.

    The variance of a gain is V_d / d + V_s / s + V_m with d times the documents asked, s times the
    seeds; V_m is what the surface misses with the error of the law, which neither lowers.
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
    count, seed_count = _count(together, asked.documents), _count(together, asked.seeds)
    return Needed(
        _count(documents, asked.documents),
        _count(seeds, asked.seeds),
        None if count is None or seed_count is None else (count, seed_count),
    )


def _flat(gain: Gain, rules: ScalingRules) -> bool:
    return -rules.saturated_gain <= gain.low and gain.high <= rules.saturated_gain


def _needed_shrinking(fitted: Fitted, rules: ScalingRules) -> float:
    """Return the largest share of the intervals' widths at which some verdict would hold."""
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
    """Return how far the interval reaches below and above the estimate."""
    return max(gain.mean - gain.low, 1e-9), max(gain.high - gain.mean, 1e-9)


def _times(gain: Gain, square: float, causes: tuple[str, ...]) -> float:
    """Return how many times as much of `causes` brings the variance down to `square` of it."""
    by_cause = {"document": gain.document_variance, "seed": gain.seed_variance}
    shrinks = sum(by_cause[cause] for cause in causes)
    stays = sum(by_cause.values()) + gain.misfit_variance - shrinks
    left = square * (shrinks + stays) - stays
    return max(1.0, shrinks / left) if left > 0 else math.inf


def _count(times: float, now: int) -> int | None:
    return math.ceil(times * now) if times <= MOST_TIMES else None


def _advice(needed: Needed, asked: Asked) -> str:
    rate = asked.queries / asked.documents
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
