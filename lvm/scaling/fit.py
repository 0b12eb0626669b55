"""Gains from twice the data or twice the parameters, fitted to a grid of trained models.

Shapes: F fractions, W widths, S seeds, Q queries, M documents, C = F W cells, B resamples,
G pairs of exponents, P = 4 coefficients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from lvm.seeding import generator

FloatArray = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.05
LOWEST, HIGHEST = 0.01, 4.0  # exponents: from growth with the logarithm to a curve that has ended
EXPONENTS = np.concatenate([[LOWEST], np.geomspace(0.1, HIGHEST, 17)])
STARTS = 8
NUM_COEFFICIENTS = 4
NUM_FITTED = NUM_COEFFICIENTS + 2
MIN_SIZES = 3  # a power law has three unknowns along each axis


@dataclass(frozen=True, eq=False)
class GridValues:
    """What a grid measured: `value_FWSQ`, one value a query, the same queries in every cell.

    `data_F` are amounts of training data, `parameters_W` numbers of parameters, both ascending, in
    any unit. `document_Q` names the document of each query.
    """

    data_F: FloatArray
    parameters_W: FloatArray
    value_FWSQ: FloatArray
    document_Q: NDArray[np.integer]


@dataclass(frozen=True)
class Gain:
    """A gain with its 95 % interval; variances by cause: the queries' documents, the seeds."""

    mean: float
    low: float
    high: float
    query_variance: float
    seed_variance: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """The surface through a grid, with what it says at the largest data and width.

    `data` is the gain from twice the data, `parameters` that from twice the parameters, `lead` the
    first minus the second, on the same resamples. `mean_FW` are the measured means over seeds with
    `interval_FW2`; `next_interval_W2` is that of the surface at twice the data. `seed_sd` is the
    standard deviation of a cell's mean over its seeds, `backtest` the surface's error, measured -
    foretold, at the largest data when fitted without it (NaN with fewer than four fractions).
    `slope_B` and `exponent_B` are the resampled a and alpha.
    """

    data: Gain
    parameters: Gain
    lead: Gain
    exponents: tuple[float, float]
    coefficient_P: FloatArray
    mean_FW: FloatArray
    interval_FW2: FloatArray
    next_interval_W2: FloatArray
    seed_sd: float
    backtest: float
    slope_B: FloatArray
    exponent_B: FloatArray

    def at(self, x: FloatArray | float, z: float) -> FloatArray:
        """Return the surface at x times the largest data, z times the largest parameters."""
        data, width = growth(x, self.exponents[0]), growth(z, self.exponents[1])
        c, a, b, e = self.coefficient_P
        return c + a * data + b * width + e * data * width


def fit_grid(grid: GridValues, seed: int = 0, resamples: int = RESAMPLES) -> Fitted:
    """Fit y = c + a u(x, alpha) + b u(z, beta) + e u(x, alpha) u(z, beta) by least squares.

    x and z are data and parameters over their largest, u(x, k) = (1 - x^-k) / k, so that a u(2) is
    the gain from twice the data at the largest width, b u(2) that from twice the parameters at the
    largest data. Intervals: bootstrap over documents (the same queries in every cell) plus the
    noise of the means over seeds, drawn from Student's distribution.

    Raises ValueError with fewer than three fractions or widths, or queries of one document.
    """
    _check(grid)
    random = generator(seed, "scaling")
    x_F, z_W = grid.data_F / grid.data_F[-1], grid.parameters_W / grid.parameters_W[-1]
    surface = Surface(x_F, z_W)
    mean_FWS = grid.value_FWSQ.mean(axis=3)
    mean_FW = mean_FWS.mean(axis=2)
    pair, coefficient_P = surface.point(mean_FW.ravel())
    residual_C = mean_FW.ravel() - surface.design(*pair) @ coefficient_P
    variance, freedom = seed_variance(mean_FWS, residual_C)
    query_BC = _resampled_means(grid, random, resamples)
    draw_BC = random.standard_t(freedom, size=query_BC.shape) * np.sqrt(variance)
    both = surface.fit(query_BC + draw_BC)
    by_cause = [surface.fit(query_BC), surface.fit(mean_FW.ravel() + draw_BC)]
    gains = [
        _gain(point, *(one[name] for one in (both, *by_cause)))
        for name, point in _gains(pair, coefficient_P).items()
    ]
    return Fitted(
        data=gains[0],
        parameters=gains[1],
        lead=gains[2],
        exponents=pair,
        coefficient_P=coefficient_P,
        mean_FW=mean_FW,
        interval_FW2=_interval(query_BC + draw_BC).reshape(*mean_FW.shape, 2),
        next_interval_W2=_interval(both["next"]),
        seed_sd=float(np.sqrt(variance)),
        backtest=_backtest(x_F, z_W, mean_FW),
        slope_B=both["slope"],
        exponent_B=both["exponent"],
    )


class Surface:
    """The least-squares surface over a grid: linear in four coefficients given two exponents.

    Variable projection (Golub & Pereyra, SIAM J. Numer. Anal. 1973): for each pair of exponents the
    coefficients are solved for, so that only the pair is searched.
    """

    def __init__(self, x_F: FloatArray, z_W: FloatArray) -> None:
        self._x_C, self._z_C = (side.ravel() for side in np.meshgrid(x_F, z_W, indexing="ij"))
        self._num_widths = len(z_W)
        self._pairs = [(alpha, beta) for alpha in EXPONENTS for beta in EXPONENTS]
        designs = [_scaled(self.design(*pair)) for pair in self._pairs]
        self._basis_GCP = np.stack([np.linalg.qr(design)[0] for design, _ in designs])
        self._inverse_GPC = np.stack([np.linalg.pinv(d) / scale[:, None] for d, scale in designs])

    def design(self, alpha: float, beta: float) -> FloatArray:
        """Return what the four coefficients multiply in each cell, (C, P)."""
        data_C, width_C = growth(self._x_C, alpha), growth(self._z_C, beta)
        return np.stack([np.ones_like(data_C), data_C, width_C, data_C * width_C], axis=1)

    def point(self, mean_C: FloatArray) -> tuple[tuple[float, float], FloatArray]:
        """Return the best exponents with their coefficients, from the best STARTS of the grid."""
        error_G = self._errors(mean_C[None])[:, 0]
        scale = np.std(mean_C) or 1.0  # the search stops at absolute steps, too
        best = min(
            (
                optimize.least_squares(
                    lambda pair: self._solve(pair, mean_C)[1] / scale,
                    self._pairs[start],
                    bounds=(LOWEST - 1e-9, HIGHEST + 1e-9),
                )
                for start in np.argsort(error_G)[:STARTS]
            ),
            key=lambda found: float(found.cost),
        )
        pair = float(best.x[0]), float(best.x[1])
        return pair, self._solve(pair, mean_C)[0]

    def fit(self, mean_BC: FloatArray) -> dict[str, FloatArray]:
        """Return, for each resample, gains, slope, exponent and the surface at twice the data."""
        best_B = self._errors(mean_BC).argmin(axis=0)
        coefficient_BP = np.einsum("bpc,bc->bp", self._inverse_GPC[best_B], mean_BC)
        pair_B2 = np.array(self._pairs)[best_B]
        found = _gains((pair_B2[:, 0], pair_B2[:, 1]), coefficient_BP.T)
        z_W = self._z_C[: self._num_widths]
        data_B, width_BW = growth(2.0, pair_B2[:, 0]), growth(z_W, pair_B2[:, 1:])
        c_B, a_B, b_B, e_B = coefficient_BP.T
        next_BW = (c_B + a_B * data_B)[:, None] + (b_B + e_B * data_B)[:, None] * width_BW
        return found | {"next": next_BW, "slope": a_B, "exponent": pair_B2[:, 0]}

    def _errors(self, mean_BC: FloatArray) -> FloatArray:
        """Return the squared error of each pair of exponents, (G, B)."""
        inside_GBP = np.einsum("gcp,bc->gbp", self._basis_GCP, mean_BC)
        return (mean_BC**2).sum(axis=1) - (inside_GBP**2).sum(axis=2)

    def _solve(
        self, pair: tuple[float, float], mean_C: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return the coefficients (P,), what they leave over (C,)."""
        design_CP, scale_P = _scaled(self.design(*pair))
        solved_P = np.linalg.lstsq(design_CP, mean_C)[0]
        return solved_P / scale_P, design_CP @ solved_P - mean_C


def growth(x: FloatArray | float, exponent: FloatArray | float) -> FloatArray:
    """Return (1 - x^-k) / k: 0 at x = 1, ln x for k towards 0."""
    return (1 - np.asarray(x) ** -np.asarray(exponent)) / exponent


def seed_variance(mean_FWS: FloatArray, residual_C: FloatArray) -> tuple[float, float]:
    """Return the variance of a cell's mean over seeds with its degrees of freedom.

    Two estimates, the spread of the seeds and what the surface leaves over, are pooled; where the
    second is larger than chance has it (F test of the lack of fit), it stands alone.
    """
    num_seeds = mean_FWS.shape[2]
    over = max(1, len(residual_C) - NUM_FITTED)
    misfit = float((residual_C**2).sum()) / over
    if num_seeds == 1:
        return misfit, over
    within = len(residual_C) * (num_seeds - 1)
    spread = float(mean_FWS.var(axis=2, ddof=1).mean()) / num_seeds
    if misfit > spread * stats.f.ppf(1 - LEVEL, over, within):
        return misfit, over
    return (misfit * over + spread * within) / (over + within), over + within


def data_for(gain: float, slope: FloatArray | float, exponent: FloatArray | float) -> FloatArray:
    """Return how many times the data are needed for `gain`; infinite where the curve ends below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        left = 1 - gain * np.asarray(exponent) / slope
        times = np.where(left > 0, left, 0.0) ** (-1 / np.asarray(exponent))
    return np.where(np.asarray(slope) > 0, times, np.inf)


def _gains(
    pair: tuple[FloatArray | float, FloatArray | float], coefficient_P: FloatArray
) -> dict[str, FloatArray]:
    """Return gains that a score from 0 to 1 has room for: a narrow grid foretells any number."""
    top = coefficient_P[0]
    data = np.clip(coefficient_P[1] * growth(2.0, pair[0]), -top, 1 - top)
    parameters = np.clip(coefficient_P[2] * growth(2.0, pair[1]), -top, 1 - top)
    return {"data": data, "parameters": parameters, "lead": data - parameters}


def _gain(point: FloatArray, both_B: FloatArray, query_B: FloatArray, seed_B: FloatArray) -> Gain:
    low, high = _interval(both_B)
    return Gain(float(point), float(low), float(high), float(query_B.var()), float(seed_B.var()))


def _interval(value_BX: FloatArray) -> FloatArray:
    return np.quantile(value_BX, [LEVEL / 2, 1 - LEVEL / 2], axis=0).T


def _scaled(design_CP: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the columns at unit length with their lengths: x^-4 is large at an eighth."""
    scale_P = np.linalg.norm(design_CP, axis=0)
    return design_CP / scale_P, scale_P


def _resampled_means(grid: GridValues, random: np.random.Generator, resamples: int) -> FloatArray:
    """Return the mean of each cell over resampled documents, (B, C); documents are whole."""
    _, code_Q = np.unique(grid.document_Q, return_inverse=True)
    size_M = np.bincount(code_Q).astype(np.float64)
    value_CQ = grid.value_FWSQ.mean(axis=2).reshape(-1, len(code_Q))
    sum_MC = np.stack([np.bincount(code_Q, value_Q) for value_Q in value_CQ], axis=1)
    num = len(size_M)
    weight_BM = random.multinomial(num, np.full(num, 1 / num), size=resamples).astype(np.float64)
    return (weight_BM @ sum_MC) / (weight_BM @ size_M)[:, None]


def _backtest(x_F: FloatArray, z_W: FloatArray, mean_FW: FloatArray) -> float:
    """Return the measured minus the foretold mean of the largest data and width."""
    if len(x_F) <= MIN_SIZES:
        return float("nan")
    known = Surface(x_F[:-1] / x_F[-2], z_W)
    pair, coefficient_P = known.point(mean_FW[:-1].ravel())
    foretold = coefficient_P[0] + coefficient_P[1] * growth(x_F[-1] / x_F[-2], pair[0])
    return float(mean_FW[-1, -1] - foretold)


def _check(grid: GridValues) -> None:
    for name, sizes in (("fractions", grid.data_F), ("widths", grid.parameters_W)):
        if len(sizes) < MIN_SIZES:
            raise ValueError(f"{name}: {len(sizes)} given; a curve needs at least {MIN_SIZES}")
    if len(np.unique(grid.document_Q)) < 2:
        raise ValueError("queries: all are from one document; an interval needs at least two")
