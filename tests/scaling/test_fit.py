"""Surfaces whose coefficients are known."""

from dataclasses import replace

import numpy as np
import pytest

from lvm.scaling.fit import GridValues, Surface, data_for, fit_grid, growth, seed_variance
from tests.scaling.curves import CURVES, DATA_F, PARAMETERS_W, draw_grid, exact_grid


def power_laws(x: float, z: float) -> float:
    return 0.5 - 0.05 * x**-0.5 - 0.02 * (z / 3.2) ** -0.3


def test_exact_power_laws_give_their_own_gains():
    fitted = fit_grid(exact_grid(power_laws), resamples=20)
    assert fitted.exponents == pytest.approx((0.5, 0.3), abs=0.02)
    assert fitted.data.mean == pytest.approx(0.05 * (1 - 2**-0.5), abs=1e-4)
    assert fitted.parameters.mean == pytest.approx(0.02 * (1 - 2**-0.3), abs=1e-4)
    assert fitted.lead.mean == pytest.approx(fitted.data.mean - fitted.parameters.mean)
    assert fitted.at(2.0, 1.0) == pytest.approx(power_laws(2, 3.2), abs=1e-4)
    assert fitted.at(0.25, 1 / 3.2) == pytest.approx(power_laws(0.25, 1), abs=1e-4)
    assert fitted.backtest == pytest.approx(0, abs=1e-3)


def test_a_gain_is_no_larger_than_what_is_missing_to_one():
    grid = exact_grid(lambda x, z: 0.6 + 0.2 * np.log(z / 3.2) / np.log(3.2 / 0.3))
    near = replace(grid, parameters_W=np.array([0.9, 0.95, 1.0]))
    fitted = fit_grid(near, resamples=20)
    assert fitted.parameters.mean == pytest.approx(0.4, abs=0.01)
    assert fitted.parameters.high == pytest.approx(0.4, abs=0.01)


def test_data_may_pay_at_large_widths_only():
    fitted = fit_grid(exact_grid(lambda x, z: 0.3 + 0.02 * np.log(x) * np.log(z + 1)), resamples=20)
    assert fitted.data.mean == pytest.approx(0.02 * np.log(2) * np.log(4.2), rel=0.1)


def test_resampled_fits_agree_with_the_searched_exponents():
    x_F, z_W = DATA_F, PARAMETERS_W / PARAMETERS_W[-1]
    surface = Surface(x_F, z_W)
    mean_C = np.array([power_laws(x, 3.2 * z) for x in x_F for z in z_W])
    _, coefficient_P = surface.point(mean_C)
    found = surface.fit(mean_C[None])
    # The grid of exponents is coarse; the gain that it gives is not.
    assert found["data"][0] == pytest.approx(0.05 * (1 - 2**-0.5), rel=0.03)
    assert coefficient_P[0] == pytest.approx(power_laws(1, 3.2), abs=1e-4)


def test_growth_is_the_logarithm_for_small_exponents():
    assert growth(2.0, 1e-6) == pytest.approx(np.log(2), rel=1e-5)
    assert growth(1.0, 3.0) == 0


@pytest.mark.slow
def test_the_interval_holds_the_true_gain():
    """Nineteen of twenty intervals should; sixteen of them are required."""
    slopes = DATA_F, lambda x: 0.2 - 0.03 * x**-0.4
    truth = 0.03 * (1 - 2**-0.4)
    held = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        effect_M = random.normal(0, 0.01, 40)
        mean_F = slopes[1](slopes[0])
        value = mean_F[:, None, None, None] + effect_M[np.arange(400) % 40]
        value = value + random.normal(0, 0.002, (4, 3, 2, 1)) + np.zeros((4, 3, 2, 400))
        fitted = fit_grid(GridValues(DATA_F, PARAMETERS_W, value, np.arange(400) % 40), seed, 400)
        held += fitted.data.low <= truth <= fitted.data.high
    assert held >= 16


def test_the_same_seed_gives_the_same_intervals_whatever_the_order_of_queries():
    grid = draw_grid(CURVES["both"], seed=0, num_queries=500)
    first, again = fit_grid(grid, resamples=50), fit_grid(grid, resamples=50)
    assert first.data == again.data
    turned = replace(grid, value_FWSQ=grid.value_FWSQ[..., ::-1], document_Q=grid.document_Q[::-1])
    other = fit_grid(turned, resamples=50)
    assert other.data.low == pytest.approx(first.data.low, abs=1e-6)


def test_noise_of_seeds_pools_spread_and_misfit_unless_the_surface_does_not_fit():
    mean_FWS = np.zeros((4, 3, 2))
    mean_FWS[..., 1] = 0.2
    assert seed_variance(mean_FWS, np.zeros(12)) == (pytest.approx(0.01 * 12 / 18), 18)
    assert seed_variance(mean_FWS, np.ones(12)) == (pytest.approx(2.0), 6)
    assert seed_variance(mean_FWS[..., :1], np.ones(12)) == (pytest.approx(2.0), 6)


def test_data_for_a_gain_inverts_the_curve():
    times = data_for(0.01, 0.02, 0.5)
    assert 0.02 * growth(times, 0.5) == pytest.approx(0.01)
    assert data_for(0.05, 0.02, 0.5) == np.inf, "the curve ends 4 points higher"
    assert data_for(0.01, -0.02, 0.5) == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_F": DATA_F[:2]}, "fractions: 2 given; a curve needs at least 3"),
        ({"parameters_W": PARAMETERS_W[:1]}, "widths: 1 given"),
        ({"document_Q": np.zeros(20, int)}, "queries: all are from one document"),
    ],
)
def test_grids_without_a_curve_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit_grid(replace(exact_grid(power_laws), **change))
