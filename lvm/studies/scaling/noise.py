"""Noise of a grid: how far its cells would vary with other documents, seeds or curves.

Shapes: F fractions, W widths, S seeds, Q queries, M documents, C = F W cells, B resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lvm.evaluation.intervals import LEVEL, FloatArray

FEWEST_MISSES = 1e-6


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
    ) -> tuple[FloatArray, FloatArray]:
        """Return `num` draws for a grid of shape (F, W): of seeds, and of misfit, each (B, C)."""
        sizes = (num, *shape)
        cell_BFW = _student(random, self.cell, self.cell_freedom, sizes)
        fraction_BF = _student(random, self.fraction, self.fraction_freedom, (num, shape[0], 1))
        misfit_BFW = _student(random, self.misfit, self.misfit_freedom, sizes)
        return (cell_BFW + fraction_BF).reshape(num, -1), misfit_BFW.reshape(num, -1)


def measure_noise(fitted_FWS: FloatArray, residual_FW: FloatArray, tangent_CP: FloatArray) -> Noise:
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


def _residual_freedom(tangent_CP: FloatArray, num_widths: int) -> tuple[int, float]:
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


def log_misses(score: FloatArray | float) -> FloatArray:
    """Return -ln(1 - score); a score of 1 counts as one miss in a million queries."""
    return -np.log(np.maximum(1 - np.asarray(score), FEWEST_MISSES))


def score_of(fitted: FloatArray | float) -> FloatArray:
    """Return the inverse of `log_misses`, at least 0."""
    return np.maximum(0.0, -np.expm1(-np.asarray(fitted)))


def resampled_means(
    value_CQ: FloatArray, document_Q: NDArray[np.integer], random: np.random.Generator, num: int
) -> FloatArray:
    """Return the mean of each cell over resampled whole documents, (B, C)."""
    _, code_Q = np.unique(document_Q, return_inverse=True)
    size_M = np.bincount(code_Q).astype(np.float64)
    sum_MC = np.stack([np.bincount(code_Q, value_Q) for value_Q in value_CQ], axis=1)
    documents = len(size_M)
    weight_BM = random.multinomial(documents, np.full(documents, 1 / documents), size=num)
    return (weight_BM @ sum_MC) / (weight_BM @ size_M)[:, None]


def _student(
    random: np.random.Generator, variance: float, freedom: int, sizes: tuple[int, ...]
) -> FloatArray:
    return random.standard_t(freedom, size=sizes) * np.sqrt(variance)
