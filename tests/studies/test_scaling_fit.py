"""Surfaces whose coefficients are known."""

from dataclasses import replace

import numpy as np
import pytest

from lvm.studies.scaling_fit import (
    GridValues,
    Surface,
    data_for,
    fit_grid,
    growth,
    measure_noise,
    score_of,
)
from tests.studies.curves import CURVES, DATA_F, PARAMETERS_W, draw_grid, exact_grid


def power_laws(x: float, z: float) -> float:
    return 0.5 - 0.05 * x**-0.5 - 0.02 * (z / 3.2) ** -0.3


def test_exact_power_laws_of_the_misses_give_their_own_gains():
    fitted = fit_grid(exact_grid(power_laws), resamples=20)
    assert fitted.exponents == pytest.approx((0.5, 0.3), abs=0.02)
    now = score_of(power_laws(1, 3.2))
    assert fitted.data.mean == pytest.approx(score_of(power_laws(2, 3.2)) - now, abs=1e-4)
    assert fitted.parameters.mean == pytest.approx(score_of(power_laws(1, 6.4)) - now, abs=1e-4)
    assert fitted.lead.mean == pytest.approx(fitted.data.mean - fitted.parameters.mean)
    assert fitted.at(0.25, 1 / 3.2) == pytest.approx(score_of(power_laws(0.25, 1)), abs=1e-4)
    assert fitted.backtest.mean == pytest.approx(0, abs=1e-3)


def test_a_score_near_its_ceiling_gains_what_is_left_of_it():
    """Misses that halve with every doubling of the data: 90 % become 95 %, and no more."""
    fitted = fit_grid(exact_grid(lambda x, z: np.log(10 * x)), resamples=20)
    assert fitted.data.mean == pytest.approx(0.05, abs=1e-3)
    far = replace(exact_grid(lambda x, z: 1 + 0.5 * np.log(z / 3.2)))
    near = replace(far, parameters_W=np.array([0.9, 0.95, 1.0]))
    narrow = fit_grid(near, resamples=20)
    assert narrow.at(1.0, 1.0) + narrow.parameters.mean <= 1


def test_data_may_pay_at_large_widths_only():
    fitted = fit_grid(exact_grid(lambda x, z: 0.3 + 0.02 * np.log(x) * np.log(z + 1)), resamples=20)
    more = 0.3 + 0.02 * np.log(2) * np.log(4.2)
    assert fitted.data.mean == pytest.approx(score_of(more) - score_of(0.3), rel=0.1)


def test_a_jump_that_no_smooth_curve_foretells_is_in_the_intervals():
    """The score stands still until the last fraction."""
    fitted = fit_grid(exact_grid(lambda x, z: 0.3 + 0.05 * (x >= 1)), resamples=200)
    assert fitted.backtest.mean == pytest.approx(score_of(0.35) - score_of(0.3), abs=2e-3)
    assert fitted.data.misfit_variance > 10 * fitted.data.seed_variance
    assert fitted.data.low < 0.0 < fitted.data.high


def test_the_error_of_the_law_widens_what_lies_beyond_the_grid_alone():
    sure, fitted = (
        fit_grid(exact_grid(power_laws), extrapolation_sd=sd, resamples=2000) for sd in (0.0, 0.3)
    )
    for name in ("data", "parameters"):
        gain, exact = getattr(fitted, name), getattr(sure, name)
        assert gain.mean == exact.mean
        ends = np.array([gain.low, gain.high]) / exact.low  # of small gains: the factor's quantiles
        assert ends == pytest.approx(np.exp([-1.96 * 0.3, 1.96 * 0.3]), rel=0.06)
        assert [gain.document_variance, gain.seed_variance] == pytest.approx([0, 0], abs=1e-12)
        assert gain.misfit_variance > 0
    assert (fitted.interval_FW2 == sure.interval_FW2).all()
    assert fitted.backtest == sure.backtest
    width_W = np.diff(fitted.next_interval_W2)[:, 0]
    assert width_W == pytest.approx(fitted.data.high - fitted.data.low, rel=0.2), "at every width"


@pytest.mark.slow
def test_four_times_the_documents_quarter_their_variance():
    few, many = (
        np.mean([fit_grid(draw_grid(CURVES["both"], s, **size), s, 300).data.document_variance
                 for s in range(3)])
        for size in (
            {"num_queries": 1500, "num_documents": 40}, {"num_queries": 6000, "num_documents": 160}
        )
    )  # fmt: skip
    assert 0.15 < many / few < 0.4


def test_resampled_fits_agree_with_the_searched_exponents():
    x_F, z_W = DATA_F, PARAMETERS_W / PARAMETERS_W[-1]
    surface = Surface(x_F, z_W)
    mean_C = np.array([power_laws(x, 3.2 * z) for x in x_F for z in z_W])
    _, coefficient_P = surface.point(mean_C)
    found = surface.fit(mean_C[None])
    # The grid of exponents is coarse; the gain that it gives is not.
    now, more = score_of(power_laws(1, 3.2)), score_of(power_laws(2, 3.2))
    assert found["data"][0] == pytest.approx(more - now, rel=0.03)
    assert coefficient_P[0] == pytest.approx(power_laws(1, 3.2), abs=1e-4)


def test_growth_is_the_logarithm_for_small_exponents():
    assert growth(2.0, 1e-6) == pytest.approx(np.log(2), rel=1e-5)
    assert growth(1.0, 3.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part_sd", [0.0, 0.004])
def test_the_interval_holds_the_true_gain(part_sd):
    """Nineteen of twenty intervals should; thirty-six of forty are required.

    `part_sd`: how far a score varies by the part of the data, which all widths of a seed share.
    """
    mean_F = 0.2 - 0.03 * DATA_F**-0.4
    truth = 0.03 * (1 - 2**-0.4)
    held = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        effect_M = random.normal(0, 0.01, 40)
        value = mean_F[:, None, None, None] + effect_M[np.arange(400) % 40]
        value = value + random.normal(0, 0.002, (4, 3, 3, 1)) + np.zeros((4, 3, 3, 400))
        value += random.normal(0, part_sd, (4, 1, 3, 1)) * (DATA_F < 1)[:, None, None, None]
        fitted = fit_grid(GridValues(DATA_F, PARAMETERS_W, value, np.arange(400) % 40), seed, 400)
        held += fitted.data.low <= truth <= fitted.data.high
    assert held >= 36


def test_the_same_seed_gives_the_same_intervals_whatever_the_order_of_queries():
    grid = draw_grid(CURVES["both"], seed=0, num_queries=500)
    first, again = fit_grid(grid, resamples=50), fit_grid(grid, resamples=50)
    assert first.data == again.data
    turned = replace(grid, value_FWSQ=grid.value_FWSQ[..., ::-1], document_Q=grid.document_Q[::-1])
    other = fit_grid(turned, resamples=50)
    assert other.data.low == pytest.approx(first.data.low, abs=1e-6)


def test_the_noise_of_seeds_is_parted_into_cells_and_fractions():
    random = np.random.default_rng(0)
    cell_FWS = random.normal(0, 0.3, (400, 4, 3))
    common_FWS = random.normal(0, 0.4, (400, 1, 3))
    noise = measure_noise(cell_FWS + common_FWS, np.zeros((400, 4)), np.ones((1600, 1)))
    assert noise.cell == pytest.approx(0.3**2 / 3, rel=0.1)
    assert noise.fraction == pytest.approx(0.4**2 / 3, rel=0.1)
    assert noise.seeds == pytest.approx(noise.cell + noise.fraction)
    assert noise.misfit == 0
    seed_BC, misfit_BC = noise.draw(random, 4000, (2, 3))
    assert not misfit_BC.any()
    covariance_CC = np.cov(seed_BC.T)
    assert covariance_CC[0, 0] == pytest.approx(noise.seeds, rel=0.2)
    assert covariance_CC[0, 1] == pytest.approx(noise.fraction, rel=0.2)
    assert covariance_CC[0, 3] == pytest.approx(0, abs=0.1 * noise.seeds)


def test_what_the_surface_misses_is_no_noise_of_seeds():
    random = np.random.default_rng(0)
    mean_FWS, tangent_CP = random.normal(0, 0.01, (4, 3, 3)), random.normal(size=(12, 6))
    misfit = measure_noise(mean_FWS, np.full((4, 3), 0.1), tangent_CP)
    assert misfit.misfit == pytest.approx(0.1**2 * 12 / 6, rel=0.05)
    assert measure_noise(mean_FWS, np.full((4, 3), 0.004), tangent_CP).misfit == 0


@pytest.mark.parametrize("part_sd", [0.0, 0.012])
def test_widths_off_the_curve_show_however_much_the_documents_of_a_seed_matter(part_sd):
    """The surface follows what all widths of a fraction share; it cannot hide a misfit there."""
    off_W = np.array([0.006, -0.006, 0.006, -0.006])
    random = np.random.default_rng(0)
    value = 0.2 + off_W[None, :, None, None] + random.normal(0, 0.0007, (3, 4, 3, 1))
    value = value + random.normal(0, part_sd, (3, 1, 3, 1)) + np.zeros((3, 4, 3, 100))
    grid = GridValues(DATA_F[:3], np.array([0.1, 0.3, 1.0, 3.0]), value, np.arange(100) % 20)
    gain = fit_grid(grid, resamples=300).parameters
    assert gain.misfit_variance > 10 * gain.seed_variance
    assert gain.low < -0.001 and gain.high > 0.001


def test_data_for_a_gain_inverts_the_curve():
    times = data_for(0.01, 0.3, 0.02, 0.5)
    now = score_of(0.3)
    assert score_of(0.3 + 0.02 * growth(times, 0.5)) - now == pytest.approx(0.01)
    assert data_for(0.05, 0.3, 0.02, 0.5) == np.inf, "the curve ends lower"
    assert data_for(0.8, 0.3, 0.02, 0.01) == np.inf, "no score has room for it"
    assert data_for(0.01, 0.3, -0.02, 0.5) == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_F": DATA_F[:2]}, "fractions: 2 given; a curve needs at least 3"),
        ({"parameters_W": PARAMETERS_W[:1]}, "widths: 1 given"),
        ({"value_FWSQ": np.full((4, 3, 1, 20), 0.3)}, "seeds: 1 given"),
        ({"document_Q": np.zeros(20, int)}, "queries: all are from one document"),
    ],
)
def test_grids_without_a_curve_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fit_grid(replace(exact_grid(power_laws), **change))
