"""Verdicts on curves whose limit is known; what more is asked for where none is possible."""

import numpy as np
import pytest

from lvm.rules import read_scaling_rules
from lvm.scaling.cells import Cell, CellResult
from lvm.scaling.fit import Gain, fit_grid
from lvm.scaling.optimised import Optimised, judge_optimisation
from lvm.scaling.verdict import INCONCLUSIVE, NOT_OPTIMISED, judge, needed_to_decide, not_optimised
from lvm.statistics import Difference
from tests.scaling.curves import CURVES, WEAK, draw_grid

RULES = read_scaling_rules()
SEEDS = range(10)


def optimised(step_gain: float = 0.0, half_width: float = 0.003) -> Optimised:
    steps = Difference(step_gain, step_gain - half_width, step_gain + half_width, 1.0, 80)
    return Optimised(600, 600, 8.0, 5, 8, 0.0, steps, (), (), "")


def verdict_of(curve, seed: int, **sizes: int) -> str:
    fitted = fit_grid(draw_grid(curve, seed, **sizes), resamples=500)
    return judge(fitted, optimised(), sizes.get("num_queries", 6000), 2, RULES).name


@pytest.mark.slow
@pytest.mark.parametrize("truth", CURVES)
def test_the_limit_is_found_in_nine_of_ten_grids_and_never_another(truth):
    """With two seeds a saturated grid is called so in five to eight of ten, else inconclusive."""
    found = [verdict_of(CURVES[truth], seed, num_seeds=3) for seed in SEEDS]
    assert found.count(truth) >= 9, found
    assert set(found) <= {truth, INCONCLUSIVE}


@pytest.mark.slow
@pytest.mark.parametrize("truth", CURVES)
def test_few_queries_give_no_wrong_verdict(truth):
    found = [verdict_of(CURVES[truth], seed, num_queries=400, num_documents=20) for seed in SEEDS]
    assert set(found) <= {truth, INCONCLUSIVE}


def test_a_weak_effect_is_inconclusive():
    found = [verdict_of(WEAK, seed, num_queries=1000) for seed in SEEDS]
    assert found.count(INCONCLUSIVE) >= 9


def gain(mean: float, half_width: float, query_share: float = 0.5) -> Gain:
    variance = (half_width / 1.96) ** 2
    low, high = mean - half_width, mean + half_width
    return Gain(mean, low, high, query_share * variance, (1 - query_share) * variance)


def test_more_of_one_cause_is_asked_for_where_it_is_enough():
    # Both intervals must shrink to 0.8 of their width: to 0.64 of their variance.
    data, parameters = gain(0.016, 0.01), gain(0.0, 0.01)
    needed = needed_to_decide(data, parameters, 1000, 2, RULES)
    assert needed.queries == pytest.approx(1000 * 0.5 / (0.64 - 0.5), abs=2)
    assert needed.seeds == pytest.approx(2 * 0.5 / (0.64 - 0.5), abs=1)
    assert needed.queries_with_seeds == (1563, 4)


def test_both_are_asked_for_where_one_is_not_enough():
    needed = needed_to_decide(gain(0.01, 0.01), gain(0.0, 0.01), 1000, 2, RULES)
    assert (needed.queries, needed.seeds) == (None, None)
    assert needed.queries_with_seeds == (4000, 8)


def test_nothing_is_asked_for_where_nothing_would_do():
    needed = needed_to_decide(gain(0.004, 0.01), gain(0.004, 0.01), 1000, 2, RULES)
    assert needed.queries_with_seeds is None


def test_steps_that_gain_more_than_either_mean_not_optimised():
    fitted = fit_grid(draw_grid(CURVES["saturated"], 0), resamples=200)
    verdict = judge(fitted, optimised(0.008), 6000, 2, RULES)
    assert verdict.name == NOT_OPTIMISED and "max_steps=1200" in verdict.sentence


def test_saturation_is_not_claimed_while_steps_may_still_pay():
    fitted = fit_grid(draw_grid(CURVES["saturated"], 1, num_seeds=3), resamples=200)
    verdict = judge(fitted, optimised(0.004, 0.006), 6000, 2, RULES)
    assert verdict.name == INCONCLUSIVE and "max_steps=1200 would tell" in verdict.sentence


def result(shift: float, steps: int = 600, lr: float = 1e-3) -> CellResult:
    """Ranks whose logarithm is `shift` lower than those of shift 0."""
    base_Q = np.random.default_rng(0).normal(3, 2, 2000)
    history = [{"train/loss": 5.0 - 0.1 * epoch} for epoch in range(8)]
    rank_Q = np.maximum(1, np.exp(base_Q - shift))
    return CellResult(
        Cell(1.0, 64, 0, steps, lr), rank_Q, 1000, 900, 40, steps, 5, 8, history, False
    )


def judged(full: CellResult, rates: list[CellResult], passes: float = 9.0) -> Optimised:
    document_Q = np.arange(2000) % 40
    return judge_optimisation(full, result(0.0, 300), rates, passes, document_Q, RULES)


def test_an_optimised_training_has_no_reasons_against_it():
    found = judged(result(0.01), [result(0.0, 300, 5e-4), result(-0.1, 300, 2e-3)])
    assert found.reasons == () and found.loss_change < 0
    assert found.rates[1][1].mean < 0


@pytest.mark.parametrize(
    ("full", "rates", "passes", "reason", "advice"),
    [
        (result(0.5), [], 9.0, "the second half of the steps gained", "max_steps=1200"),
        (result(0.0), [result(0.5, 300, 2e-3)], 9.0, "lr 0.002 is", "lr=0.002"),
        (result(0.0, 100), [], 9.0, "100 optimiser steps are fewer", "max_steps=200 or more"),
        (result(0.0), [], 0.5, "0.5 passes over the data", "max_steps=2400"),
    ],
)
def test_each_sign_of_a_training_cut_short_stops_the_grid(full, rates, passes, reason, advice):
    found = judged(full, rates, passes)
    assert len(found.reasons) == 1 and reason in found.reasons[0]
    verdict = not_optimised(found)
    assert verdict.name == NOT_OPTIMISED and advice in verdict.sentence
