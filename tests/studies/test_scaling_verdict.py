"""Verdicts on curves whose limit is known; what more is asked for where none is possible."""

from dataclasses import replace

import numpy as np
import pytest

from lvm.evaluation.metrics import Difference
from lvm.studies.scaling_cells import CellResult
from lvm.studies.scaling_fit import Gain, fit_grid
from lvm.studies.scaling_verdict import (
    DATA,
    INCONCLUSIVE,
    NOT_OPTIMISED,
    Needed,
    Optimised,
    Sample,
    Trials,
    gain_over_seeds,
    judge,
    judge_optimisation,
    needed_to_decide,
    not_optimised,
)
from lvm.system.settings import read_scaling_rules
from tests.studies.curves import CURVES, WEAK, cell_of, draw_cells, draw_grid, exact_grid

RULES = read_scaling_rules()
SEEDS = range(10)
FITTED = fit_grid(exact_grid(lambda x, z: 0.3), resamples=20)


def optimised(step_gain: float = 0.0, half_width: float = 0.003) -> Optimised:
    steps = Difference(step_gain, step_gain - half_width, step_gain + half_width, 1.0, 80)
    return Optimised(600, 8.0, 5, 8, 0.0, steps, (), (), "")


def verdict_of(curve, seed: int, num_seeds: int = 3, **sizes: int) -> str:
    """Return the verdict on a grid whose steps gain nothing, as far as noise lets it be seen."""
    grid = draw_grid(curve, seed, num_seeds=num_seeds, **sizes)
    fitted = fit_grid(grid, resamples=500, extrapolation_sd=RULES.extrapolation_sd)
    fulls, halves = (draw_cells(2 * seed + i, num_seeds, grid.document_Q) for i in (0, 1))
    steps = gain_over_seeds(fulls, halves, grid.document_Q, fitted.seed_sd, fitted.seed_freedom)
    sample = Sample(len(grid.document_Q), len(np.unique(grid.document_Q)), num_seeds)
    return judge(fitted, replace(optimised(), steps=steps), sample, RULES).name


@pytest.mark.slow
@pytest.mark.parametrize("truth", CURVES)
def test_the_limit_is_found_in_nine_of_ten_grids_and_never_another(truth):
    """With five seeds a saturated grid is called so in eight of ten, else inconclusive."""
    found = [verdict_of(CURVES[truth], seed, 6, num_queries=10_000) for seed in SEEDS]
    assert found.count(truth) >= 9, found
    assert set(found) <= {truth, INCONCLUSIVE}


@pytest.mark.slow
@pytest.mark.parametrize("truth", CURVES)
@pytest.mark.parametrize("sizes", [{"num_queries": 400, "num_documents": 20}, {"num_seeds": 2}])
def test_less_evidence_gives_no_wrong_verdict(truth, sizes):
    found = [verdict_of(CURVES[truth], seed, **sizes) for seed in SEEDS]
    assert set(found) <= {truth, INCONCLUSIVE}


@pytest.mark.slow
def test_a_weak_effect_is_inconclusive():
    found = [verdict_of(WEAK, seed, num_queries=300) for seed in SEEDS]
    assert found.count(INCONCLUSIVE) >= 9


def gain(mean: float, half_width: float, shares: tuple[float, float] = (0.5, 0.5)) -> Gain:
    """Return a gain whose variance comes by `shares` from documents and seeds, else from misfit."""
    variance = (half_width / 1.96) ** 2
    by_cause = [share * variance for share in (*shares, 1 - sum(shares))]
    return Gain(mean, mean - half_width, mean + half_width, *by_cause)


def needed(data: Gain, parameters: Gain) -> Needed:
    fitted = replace(FITTED, data=data, parameters=parameters)
    return needed_to_decide(fitted, Sample(1000, 50, 2), RULES)


def test_more_of_one_cause_is_asked_for_where_it_is_enough():
    # Both intervals must shrink to 0.8 of their width: to 0.64 of their variance.
    found = needed(gain(0.016, 0.01), gain(0.0, 0.01))
    assert found.documents == pytest.approx(50 * 0.5 / (0.64 - 0.5), abs=1)
    assert found.seeds == pytest.approx(2 * 0.5 / (0.64 - 0.5), abs=1)
    assert found.documents_with_seeds == (79, 4)


def test_both_are_asked_for_where_one_is_not_enough():
    found = needed(gain(0.01, 0.01), gain(0.0, 0.01))
    assert (found.documents, found.seeds) == (None, None)
    assert found.documents_with_seeds == (200, 8)


def test_seeds_are_not_asked_for_where_the_surface_misses():
    found = needed(gain(0.016, 0.01, (0.0, 0.2)), gain(0.0, 0.01, (0.0, 0.2)))
    assert (found.documents, found.seeds, found.documents_with_seeds) == (None, None, None)


def test_nothing_is_asked_for_where_nothing_would_do():
    found = needed(gain(0.004, 0.01), gain(0.004, 0.01))
    assert found.documents_with_seeds is None


ASKED = Sample(6000, 80, 3)


def test_steps_that_gain_more_than_either_mean_not_optimised():
    fitted = fit_grid(draw_grid(CURVES["saturated"], 0), resamples=200)
    verdict = judge(fitted, optimised(0.008), ASKED, RULES)
    assert verdict.name == NOT_OPTIMISED and "max_steps=1200" in verdict.sentence


def test_saturation_is_not_claimed_while_steps_may_still_pay():
    fitted = replace(FITTED, data=gain(0.0, 0.002), parameters=gain(0.0, 0.002))
    verdict = judge(fitted, optimised(0.004, 0.006), ASKED, RULES)
    assert verdict.name == INCONCLUSIVE and "max_steps=1200 would tell" in verdict.sentence


def test_a_small_certain_gain_of_the_other_does_not_make_both():
    sure = replace(FITTED, data=gain(0.1, 0.01), parameters=gain(0.006, 0.005))
    assert judge(sure, optimised(), ASKED, RULES).name == DATA


def test_the_noise_of_seeds_widens_the_gain_of_the_steps():
    document_Q = np.arange(6000) % 80
    cells = [draw_cells(seed, 3, document_Q) for seed in (0, 1)]
    exact, wide = (gain_over_seeds(*cells, document_Q, sd, 100_000) for sd in (0.0, 0.01))
    assert wide.mean == exact.mean
    expected = np.hypot(exact.mean - exact.low, 1.96 * np.sqrt(2) * 0.01)
    assert wide.mean - wide.low == pytest.approx(expected, rel=1e-3)


LUCKY, BETTER = (0.4, -0.3, 0.1), (0.4, 0.35, 0.45)


def result(shift: float, steps: int = 600, lr: float = 1e-3) -> CellResult:
    """Ranks whose logarithm is `shift` lower than those of shift 0."""
    base_Q = np.random.default_rng(0).normal(3, 2, 2000)
    return cell_of(np.maximum(1, np.exp(base_Q - shift)), steps, lr)


def judged(full: CellResult, rates: list[CellResult], passes: float = 9.0) -> Optimised:
    document_Q = np.arange(2000) % 40
    trials = Trials([full], [result(0.0, 300)], [[rate] for rate in rates])
    return judge_optimisation(trials, passes, document_Q, RULES)


def test_an_optimised_training_has_no_reasons_against_it():
    found = judged(result(0.01), [result(0.0, 300, 5e-4), result(-0.1, 300, 2e-3)])
    assert found.reasons == () and found.loss_change < 0
    assert found.rates[1][1].mean < 0


@pytest.mark.parametrize(
    ("full", "rates", "passes", "reason", "advice"),
    [
        (result(0.5), [], 9.0, "the second half of the steps gained", "max_steps=1200"),
        (result(0.0), [result(0.5, 300, 2e-3)], 9.0, "lr 0.002 is", "lr=0.002"),
        (result(0.0, 100), [], 9.0, "100 optimizer steps are fewer", "max_steps=300"),
        (result(0.0), [], 0.5, "0.5 passes over the data", "max_steps=2400"),
    ],
)
def test_each_sign_of_a_training_cut_short_stops_the_grid(full, rates, passes, reason, advice):
    found = judged(full, rates, passes)
    assert len(found.reasons) == 1 and reason in found.reasons[0]
    verdict = not_optimised(found)
    assert verdict.name == NOT_OPTIMISED and advice in verdict.sentence


def test_a_rate_that_is_better_for_one_seed_alone_is_not_better():
    document_Q = np.arange(2000) % 40
    half = [result(0.0, 300)] * 3
    lucky, better = ([result(shift, 300, 2e-3) for shift in shifts] for shifts in (LUCKY, BETTER))
    for rate, is_reason in ((lucky, False), (better, True)):
        alone, together = (
            judge_optimisation(Trials([result(0.0)], half[:n], [rate[:n]]), 9.0, document_Q, RULES)
            for n in (1, 3)
        )
        assert alone.advice == "lr=0.002"
        assert (together.advice == "lr=0.002") is is_reason
    assert "over 3 seeds" in together.reasons[0]
