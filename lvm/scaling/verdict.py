"""The verdict on a grid: what limits, or how much more must be asked to know it."""

import math
from dataclasses import dataclass

from lvm.rules import ScalingRules
from lvm.scaling.fit import Fitted, Gain
from lvm.scaling.optimised import Optimised

DATA, CAPACITY, BOTH = "data-limited", "capacity-limited", "both"
SATURATED, NOT_OPTIMISED, INCONCLUSIVE = "saturated", "not optimised", "inconclusive"
LEAST_SHRINKING = 0.9  # intervals are not symmetric: the estimate may say that nothing is missing
MOST_TIMES = 100.0  # beyond, more of the same is no advice


@dataclass(frozen=True)
class Needed:
    """What would decide if the gains stay as they are: more queries, or more seeds, or both.

    Each is None where it cannot be enough alone, or takes more than a hundred times what was used.
    """

    queries: int | None
    seeds: int | None
    queries_with_seeds: tuple[int, int] | None


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


def judge(
    fitted: Fitted, optimised: Optimised, num_queries: int, num_seeds: int, rules: ScalingRules
) -> Verdict:
    """Return what limits, by the intervals of the two gains.

    Saturated: both intervals within +- `saturated_gain`, and no gain from the steps beyond it.
    Both: both intervals above zero, both gains above `both_gain`. Data: the interval of the data's
    gain lies above zero and above that of the parameters' gain; capacity likewise. Where more
    steps certainly gain more than either, the grid was not optimised. Else: inconclusive.
    """
    data, parameters, steps = fitted.data, fitted.parameters, optimised.steps
    gains = f"twice the data: {points(data)}; twice the parameters: {points(parameters)}"
    if steps.low > 0 and steps.mean > max(data.mean, parameters.mean, rules.saturated_gain):
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
    if _pays(data, rules) and _pays(parameters, rules):
        return Verdict(BOTH, f"Both data and capacity limit ({gains}).")
    if data.low > max(0.0, parameters.high):
        return Verdict(DATA, f"Data-limited: more data pay more than a wider model ({gains}).")
    if parameters.low > max(0.0, data.high):
        return Verdict(
            CAPACITY, f"Capacity-limited: a wider model pays more than more data ({gains})."
        )
    needed = needed_to_decide(data, parameters, num_queries, num_seeds, rules)
    return Verdict(INCONCLUSIVE, f"Inconclusive ({gains}): {_advice(needed)}.", needed)


def needed_to_decide(
    data: Gain, parameters: Gain, num_queries: int, num_seeds: int, rules: ScalingRules
) -> Needed:
    """Return what would shrink the intervals enough for a verdict, were the gains as estimated.

    The variance of a gain is V_q / q + V_s / r with q times the queries, r times the seeds.
    """
    share = _needed_shrinking(data, parameters, rules)
    if share <= 0:
        return Needed(None, None, None)
    square = min(LEAST_SHRINKING, share) ** 2
    queries = max(_times(g.query_variance, g.seed_variance, square) for g in (data, parameters))
    seeds = max(_times(g.seed_variance, g.query_variance, square) for g in (data, parameters))
    together = None
    if 1 / square <= MOST_TIMES:
        together = math.ceil(num_queries / square), math.ceil(num_seeds / square)
    return Needed(_count(queries, num_queries), _count(seeds, num_seeds), together)


def points(gain: Gain) -> str:
    """Write a gain in points with its interval: `+1.2 [+0.4, +2.0]`."""
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _flat(gain: Gain, rules: ScalingRules) -> bool:
    return -rules.saturated_gain <= gain.low and gain.high <= rules.saturated_gain


def _pays(gain: Gain, rules: ScalingRules) -> bool:
    return gain.low > 0 and gain.mean > rules.both_gain


def _needed_shrinking(data: Gain, parameters: Gain, rules: ScalingRules) -> float:
    """Return the largest share of the intervals' widths at which some verdict would hold."""
    d, p = data.mean, parameters.mean
    wide_d, wide_p = (max(g.high - g.mean, g.mean - g.low, 1e-9) for g in (data, parameters))
    band = rules.saturated_gain
    shares = [
        min((band - abs(d)) / wide_d, (band - abs(p)) / wide_p),
        min(d / wide_d, (d - p) / (wide_d + wide_p)),
        min(p / wide_p, (p - d) / (wide_d + wide_p)),
    ]
    if min(d, p) > rules.both_gain:
        shares.append(min(d / wide_d, p / wide_p))
    return max(shares)


def _times(shrinks: float, stays: float, square: float) -> float:
    """Return how many times as much of one cause is needed while the other stays."""
    left = square * (shrinks + stays) - stays
    return max(1.0, shrinks / left) if left > 0 else math.inf


def _count(times: float, now: int) -> int | None:
    return math.ceil(times * now) if times <= MOST_TIMES else None


def _advice(needed: Needed) -> str:
    options = []
    if needed.queries is not None:
        options.append(f"about {needed.queries:,} queries")
    if needed.seeds is not None:
        options.append(f"about {needed.seeds:,} seeds")
    if not options and needed.queries_with_seeds is not None:
        queries, seeds = needed.queries_with_seeds
        options.append(f"about {queries:,} queries together with {seeds:,} seeds")
    if not options:
        return "the gains are too alike for any number of queries within reach to part them"
    return f"{' or '.join(options)} would decide, were the gains as estimated"
