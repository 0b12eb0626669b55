"""Fit a surface to a grid of trained models: its noise, the gains from twice the data or size.

Shapes: F fractions, W widths, S seeds, Q queries, M documents, C = F W cells, B resamples,
G pairs of exponents, P = 4 coefficients.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from lvm.evaluation.metrics import LEVEL, Float64Array
from lvm.system.seeding import generator

FEWEST_MISSES = 1e-6
RESAMPLES = 2000
LOWEST, HIGHEST = 0.01, 4.0  # exponents, from logarithmic growth to a curve that is flat
EXPONENTS = np.concatenate([[LOWEST], np.geomspace(0.1, HIGHEST, 17)])
STARTS = 8
MIN_SIZES = 3  # a power law has three parameters along each axis
MIN_SEEDS = 2  # one seed says nothing about the noise between seeds
STEP = 1e-4  # of an exponent, for numerical derivatives


@dataclass(frozen=True)
class Noise:
    """Variances of a cell's mean over seeds, on the scale of `log_misses`.

    `cell` is the variance of a cell alone, `fraction` the variance that all cells of a fraction
    share, since a seed chooses the documents that all widths are trained on. `misfit` is the
    residual variance of the surface beyond both. The freedoms are the degrees of freedom of
    Student's distribution for each.
    """

    cell: float
    fraction: float
    misfit: float
    cell_freedom: int
    fraction_freedom: int
    misfit_freedom: int

    @property
    def seeds(self) -> float:
        """Return the variance that more seeds would reduce."""
        return self.cell + self.fraction

    def draw(
        self, random: np.random.Generator, num: int, shape: tuple[int, int]
    ) -> tuple[Float64Array, Float64Array]:
        """Return `num` draws for a grid of shape (F, W): of seeds, and of misfit, each (B, C)."""
        sizes = (num, *shape)
        cell_BFW = _student(random, self.cell, self.cell_freedom, sizes)
        fraction_BF = _student(random, self.fraction, self.fraction_freedom, (num, shape[0], 1))
        misfit_BFW = _student(random, self.misfit, self.misfit_freedom, sizes)
        return (cell_BFW + fraction_BF).reshape(num, -1), misfit_BFW.reshape(num, -1)


def measure_noise(
    fitted_FWS: Float64Array, residual_FW: Float64Array, tangent_CP: Float64Array
) -> Noise:
    """Return the noise of a grid of two seeds or more by analysis of variance.

    `fitted_FWS` are the cells of each seed, `residual_FW` the residuals of their means, and
    `tangent_CP` the derivatives of the surface by its parameters in each cell. The misfit counts
    only if the residuals exceed the noise of the seeds significantly (F test for lack of fit).
    """
    num_fractions, num_widths, num_seeds = fitted_FWS.shape
    over, share = _residual_freedom(tangent_CP, num_widths)
    misfit = float((residual_FW**2).sum()) / over
    deviation_FWS = fitted_FWS - fitted_FWS.mean(axis=2, keepdims=True)
    common_FS = deviation_FWS.mean(axis=1)
    alone_FWS = deviation_FWS - common_FS[:, None]
    common_freedom = num_fractions * (num_seeds - 1)
    freedom = common_freedom * (num_widths - 1)
    cell = float((alone_FWS**2).sum()) / freedom / num_seeds
    common = float((common_FS**2).sum()) / common_freedom / num_seeds
    fraction = max(0.0, common - cell / num_widths)
    expected = cell + share * fraction
    is_chance = misfit <= expected * stats.f.ppf(1 - LEVEL, over, freedom)
    beyond = 0.0 if is_chance else misfit - expected
    return Noise(cell, fraction, beyond, freedom, common_freedom, over)


def _residual_freedom(tangent_CP: Float64Array, num_widths: int) -> tuple[int, float]:
    """Return the residual degrees of freedom, and the share of the fractions' noise in residuals.

    The surface absorbs most of the noise that all cells of a fraction share. For noise with
    covariance I (x) J, where J is all ones over the widths, the expected mean square of the
    residuals is trace(R (I (x) J)) / freedoms, with R the projection off the tangents.
    """
    length_P = np.linalg.norm(tangent_CP, axis=0)
    basis_CP, size_P, _ = np.linalg.svd(
        tangent_CP[:, length_P > 0] / length_P[length_P > 0], full_matrices=False
    )
    basis_CP = basis_CP[:, size_P > 1e-6 * size_P[0]]
    num_cells, num_found = basis_CP.shape
    over = max(1, num_cells - num_found)
    sum_FP = basis_CP.reshape(-1, num_widths, num_found).sum(axis=1)
    return over, max(0.0, num_cells - float((sum_FP**2).sum())) / over


def log_misses(score: Float64Array | float) -> Float64Array:
    """Return -ln(1 - score); a score of 1 counts as one miss in a million queries."""
    return -np.log(np.maximum(1 - np.asarray(score), FEWEST_MISSES))


def score_of(fitted: Float64Array | float) -> Float64Array:
    """Return the inverse of `log_misses`, at least 0."""
    return np.maximum(0.0, -np.expm1(-np.asarray(fitted)))


def resampled_means(
    value_CQ: Float64Array, document_Q: NDArray[np.integer], random: np.random.Generator, num: int
) -> Float64Array:
    """Return the mean of each cell over resampled whole documents, (B, C)."""
    _, code_Q = np.unique(document_Q, return_inverse=True)
    size_M = np.bincount(code_Q).astype(np.float64)
    sum_MC = np.stack([np.bincount(code_Q, value_Q) for value_Q in value_CQ], axis=1)
    documents = len(size_M)
    weight_BM = random.multinomial(documents, np.full(documents, 1 / documents), size=num)
    return (weight_BM @ sum_MC) / (weight_BM @ size_M)[:, None]


def _student(
    random: np.random.Generator, variance: float, freedom: int, sizes: tuple[int, ...]
) -> Float64Array:
    return random.standard_t(freedom, size=sizes) * np.sqrt(variance)


@dataclass(frozen=True, eq=False)
class GridValues:
    """What a grid measured: a score from 0 to 1 for each query, the same queries in every cell.

    `data_F` (amounts of training data) and `parameters_W` (numbers of parameters) are ascending, in
    any unit. `document_Q` names the document of each query.
    """

    data_F: Float64Array
    parameters_W: Float64Array
    value_FWSQ: Float64Array
    document_Q: NDArray[np.integer]


@dataclass(frozen=True)
class Gain:
    """A gain with its 95 % interval, and its variance by cause."""

    mean: float
    low: float
    high: float
    document_variance: float
    seed_variance: float
    misfit_variance: float = 0.0


@dataclass(frozen=True)
class Backtest:
    """Measured minus predicted score at the largest data and width, predicted from smaller data."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """The surface fitted to a grid, and its predictions at the largest data and width.

    Attributes:
        data, parameters: gains from twice the data, from twice the parameters.
        lead: `data` minus `parameters`, on the same resamples.
        mean_FW, interval_FW2: measured means over seeds with their intervals.
        next_interval_W2: interval of the surface at twice the data.
        seed_sd, seed_freedom: standard deviation of a cell's mean over its seeds, with its degrees
            of freedom.
        backtest: None with fewer than four fractions; its interval holds the noise alone.
        level_B, slope_B, exponent_B: resampled c, a times the factor of the law, and alpha.
    """

    data: Gain
    parameters: Gain
    lead: Gain
    exponents: tuple[float, float]
    coefficient_P: Float64Array
    mean_FW: Float64Array
    interval_FW2: Float64Array
    next_interval_W2: Float64Array
    seed_sd: float
    seed_freedom: int
    backtest: Backtest | None
    level_B: Float64Array
    slope_B: Float64Array
    exponent_B: Float64Array

    def at(self, x: Float64Array | float, z: float) -> Float64Array:
        """Return the surface at x times the largest data, z times the largest parameters."""
        data, width = growth(x, self.exponents[0]), growth(z, self.exponents[1])
        c, a, b, e = self.coefficient_P
        return score_of(c + a * data + b * width + e * data * width)


def fit_grid(
    grid: GridValues, seed: int = 0, resamples: int = RESAMPLES, extrapolation_sd: float = 0.0
) -> Fitted:
    """Fit -ln(1 - y) = c + a u(x, alpha) + b u(z, beta) + e u(x, alpha) u(z, beta).

    y is the mean score of a cell. The share of misses follows a power law, so the law also holds
    for scores near 1. The fit is by least squares. x and z are data and parameters divided by their
    largest, and u(x, k) = (1 - x^-k) / k: twice the data add a u(2) at the largest width, twice the
    parameters b u(2) at the largest data.

    Intervals: bootstrap over documents (the same queries in every cell), plus the noise of the
    means over seeds and of the misfit, drawn from Student's distribution. Predictions beyond the
    grid are multiplied by a factor whose logarithm has the standard deviation `extrapolation_sd`,
    drawn separately for data and for parameters.

    Raises ValueError with fewer than three fractions or widths, one seed, queries of one document.
    """
    _check(grid)
    random = generator(seed, "scaling")
    x_F, z_W = grid.data_F / grid.data_F[-1], grid.parameters_W / grid.parameters_W[-1]
    surface = Surface(x_F, z_W)
    mean_FWS = grid.value_FWSQ.mean(axis=3)
    mean_FW = mean_FWS.mean(axis=2)
    point_C = log_misses(mean_FW.ravel())
    pair, coefficient_P = surface.point(point_C)
    residual_C = point_C - surface.design(*pair) @ coefficient_P
    tangent_CP = surface.tangent(pair, coefficient_P)
    noise = measure_noise(log_misses(mean_FWS), residual_C.reshape(mean_FW.shape), tangent_CP)
    value_CQ = grid.value_FWSQ.mean(axis=2).reshape(mean_FW.size, -1)
    asked_BC = log_misses(resampled_means(value_CQ, grid.document_Q, random, resamples))
    seed_BC, misfit_BC = noise.draw(random, resamples, (len(x_F), len(z_W)))
    drawn_BC = asked_BC + seed_BC + misfit_BC
    factor_B2 = np.exp(extrapolation_sd * random.standard_normal((resamples, 2)))
    both = surface.fit(drawn_BC, factor_B2)
    asked, seeds = (surface.fit(value_BC) for value_BC in (asked_BC, point_C + seed_BC))
    points = _gains(coefficient_P, growth(2.0, np.array(pair)))
    gains = {
        name: _gain(float(point), both[name], asked[name], seeds[name])
        for name, point in points.items()
    }
    return Fitted(
        **gains,
        exponents=pair,
        coefficient_P=coefficient_P,
        mean_FW=mean_FW,
        interval_FW2=_interval(score_of(asked_BC + seed_BC)).reshape(*mean_FW.shape, 2),
        next_interval_W2=_interval(both["next"]),
        seed_sd=float(np.sqrt(noise.seeds) * (1 - mean_FW[-1, -1])),
        seed_freedom=noise.fraction_freedom,
        backtest=_backtest(x_F, z_W, point_C, drawn_BC),
        level_B=both["level"],
        slope_B=both["slope"],
        exponent_B=both["exponent"],
    )


class Surface:
    """The least-squares surface over a grid: linear in four coefficients given two exponents.

    Variable projection (Golub & Pereyra, SIAM J. Numer. Anal. 1973): the coefficients are solved
    for each pair of exponents, so only the pair is searched.
    """

    def __init__(self, x_F: Float64Array, z_W: Float64Array) -> None:
        self._x_C, self._z_C = (side.ravel() for side in np.meshgrid(x_F, z_W, indexing="ij"))
        self._num_widths = len(z_W)
        self._pairs = [(alpha, beta) for alpha in EXPONENTS for beta in EXPONENTS]
        designs = [_scaled(self.design(*pair)) for pair in self._pairs]
        self._basis_GCP = np.stack([np.linalg.qr(design)[0] for design, _ in designs])
        self._inverse_GPC = np.stack([np.linalg.pinv(d) / scale[:, None] for d, scale in designs])

    def design(self, alpha: float, beta: float) -> Float64Array:
        """Return the design matrix of the four coefficients, (C, P)."""
        data_C, width_C = growth(self._x_C, alpha), growth(self._z_C, beta)
        return np.stack([np.ones_like(data_C), data_C, width_C, data_C * width_C], axis=1)

    def point(self, mean_C: Float64Array) -> tuple[tuple[float, float], Float64Array]:
        """Return the best exponents and their coefficients, searched from the STARTS best pairs."""
        error_G = self._errors(mean_C[None])[:, 0]
        scale = np.std(mean_C) or 1.0  # the search also stops at absolute tolerances
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

    def fit(
        self, mean_BC: Float64Array, factor_B2: Float64Array | None = None
    ) -> dict[str, Float64Array]:
        """Return gains, level, slope, exponent and the score at twice the data, per resample.

        `factor_B2` multiplies what twice the data and twice the parameters add to the fit.
        """
        best_B = self._errors(mean_BC).argmin(axis=0)
        coefficient_BP = np.einsum("bpc,bc->bp", self._inverse_GPC[best_B], mean_BC)
        pair_B2 = np.array(self._pairs)[best_B]
        factor_B2 = np.ones_like(pair_B2) if factor_B2 is None else factor_B2
        twice_2B = (factor_B2 * growth(2.0, pair_B2)).T
        width_BW = growth(self._z_C[: self._num_widths], pair_B2[:, 1:])
        c_B, a_B, b_B, e_B = coefficient_BP.T
        next_BW = (c_B + a_B * twice_2B[0])[:, None] + (b_B + e_B * twice_2B[0])[:, None] * width_BW
        fit = {"level": c_B, "slope": a_B * factor_B2[:, 0], "exponent": pair_B2[:, 0]}
        return _gains(coefficient_BP.T, twice_2B) | fit | {"next": score_of(next_BW)}

    def tangent(self, pair: tuple[float, float], coefficient_P: Float64Array) -> Float64Array:
        """Return the derivatives of the surface by its six parameters in each cell, (C, 6)."""
        by_exponent = [
            (self.design(*np.add(pair, step)) - self.design(*np.subtract(pair, step)))
            @ coefficient_P
            / (2 * STEP)
            for step in ((STEP, 0.0), (0.0, STEP))
        ]
        return np.column_stack([self.design(*pair), *by_exponent])

    def _errors(self, mean_BC: Float64Array) -> Float64Array:
        """Return the squared error of each pair of exponents, (G, B)."""
        inside_GBP = np.einsum("gcp,bc->gbp", self._basis_GCP, mean_BC)
        return (mean_BC**2).sum(axis=1) - (inside_GBP**2).sum(axis=2)

    def _solve(
        self, pair: tuple[float, float], mean_C: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Return the coefficients (P,) and the residuals (C,)."""
        design_CP, scale_P = _scaled(self.design(*pair))
        solved_P = np.linalg.lstsq(design_CP, mean_C)[0]
        return solved_P / scale_P, design_CP @ solved_P - mean_C


def growth(x: Float64Array | float, exponent: Float64Array | float) -> Float64Array:
    """Return (1 - x^-k) / k, which is 0 at x = 1 and tends to ln x as k tends to 0."""
    return (1 - np.asarray(x) ** -np.asarray(exponent)) / exponent


def data_for(
    gain: float,
    level: Float64Array | float,
    slope: Float64Array | float,
    exponent: Float64Array | float,
) -> Float64Array:
    """Return the multiple of the data that adds `gain` to the score at c = `level`, a = `slope`.

    Infinite if the curve never reaches it.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        needed = -np.log(np.maximum(0.0, 1 - gain * np.exp(level)))
        left = 1 - needed * np.asarray(exponent) / slope
        times = np.where(left > 0, left, 0.0) ** (-1 / np.asarray(exponent))
    return np.where(np.asarray(slope) > 0, times, np.inf)


def _gains(coefficient_P: Float64Array, twice_2: Float64Array) -> dict[str, Float64Array]:
    level, top = coefficient_P[0], score_of(coefficient_P[0])
    data, parameters = (score_of(level + coefficient_P[1 + i] * twice_2[i]) - top for i in (0, 1))
    return {"data": data, "parameters": parameters, "lead": data - parameters}


def _gain(point: float, both_B: Float64Array, asked_B: Float64Array, seed_B: Float64Array) -> Gain:
    low, high = _interval(both_B)
    asked, seeds = float(asked_B.var()), float(seed_B.var())
    rest = max(0.0, float(both_B.var()) - asked - seeds)
    return Gain(point, float(low), float(high), asked, seeds, rest)


def _interval(value_BX: Float64Array) -> Float64Array:
    return np.quantile(value_BX, [LEVEL / 2, 1 - LEVEL / 2], axis=0).T


def _scaled(design_CP: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return unit columns and their lengths, for conditioning: x^-4 is large at an eighth."""
    scale_P = np.linalg.norm(design_CP, axis=0)
    return design_CP / scale_P, scale_P


def _backtest(
    x_F: Float64Array, z_W: Float64Array, point_C: Float64Array, drawn_BC: Float64Array
) -> Backtest | None:
    if len(x_F) <= MIN_SIZES:
        return None
    known, times = Surface(x_F[:-1] / x_F[-2], z_W), x_F[-1] / x_F[-2]
    smaller = len(point_C) - len(z_W)
    pair, coefficient_P = known.point(point_C[:smaller])
    predicted = score_of(coefficient_P[0] + coefficient_P[1] * growth(times, pair[0]))
    fit = known.fit(drawn_BC[:, :smaller])
    predicted_B = score_of(fit["level"] + fit["slope"] * growth(times, fit["exponent"]))
    low, high = _interval(score_of(drawn_BC[:, -1]) - predicted_B)
    return Backtest(float(score_of(point_C[-1]) - predicted), float(low), float(high))


def _check(grid: GridValues) -> None:
    for name, sizes in (("fractions", grid.data_F), ("widths", grid.parameters_W)):
        if len(sizes) < MIN_SIZES:
            raise ValueError(f"{name}: {len(sizes)} given; a curve needs at least {MIN_SIZES}")
    if grid.value_FWSQ.shape[2] < MIN_SEEDS:
        raise ValueError(f"seeds: 1 given; their noise shows with {MIN_SEEDS} or more")
    if len(np.unique(grid.document_Q)) < 2:
        raise ValueError("queries: all are from one document; an interval needs at least two")
