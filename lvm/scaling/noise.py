"""How far a grid would vary with other documents, other seeds, another surface.

Shapes: F fractions, W widths, S seeds, Q queries, M documents, C = F W cells, B resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lvm.statistics import LEVEL, FloatArray

FEWEST_MISSES = 1e-6


@dataclass(frozen=True)
class Noise:
    """Variances of the mean over seeds of a cell, on the scale of `log_misses`.

    `cell` is that of a cell alone, `fraction` that of all cells of a fraction together, since a
    seed chooses the documents that all widths are trained on; `misfit` is what the surface leaves
    over beyond both. The freedoms are those of Student's distribution for each.
    """

    cell: float
    fraction: float
    misfit: float
    cell_freedom: int
    fraction_freedom: int
    misfit_freedom: int

    @property
    def seeds(self) -> float:
        """Return the variance that more seeds would lower."""
        return self.cell + self.fraction

    def draw(
        self, random: np.random.Generator, num: int, shape: tuple[int, int]
    ) -> tuple[FloatArray, FloatArray]:
        """Return `num` draws for a grid of shape (F, W): seeds, then misfit; each (B, C)."""
        sizes = (num, *shape)
        cell_BFW = _student(random, self.cell, self.cell_freedom, sizes)
        fraction_BF = _student(random, self.fraction, self.fraction_freedom, (num, shape[0], 1))
        misfit_BFW = _student(random, self.misfit, self.misfit_freedom, sizes)
        return (cell_BFW + fraction_BF).reshape(num, -1), misfit_BFW.reshape(num, -1)


def measure_noise(fitted_FWS: FloatArray, residual_FW: FloatArray, num_fitted: int) -> Noise:
    """Return the noise of a grid by analysis of variance.

    `fitted_FWS` are the cells of each seed, `residual_FW` what the surface of `num_fitted` unknowns
    leaves of their means. The misfit counts where it exceeds the noise of the seeds by more than
    chance has it (F test of the lack of fit); with one seed it is all that is known.
    """
    num_fractions, num_widths, num_seeds = fitted_FWS.shape
    over = max(1, residual_FW.size - num_fitted)
    misfit = float((residual_FW**2).sum()) / over
    if num_seeds == 1:
        return Noise(0.0, 0.0, misfit, 1, 1, over)
    deviation_FWS = fitted_FWS - fitted_FWS.mean(axis=2, keepdims=True)
    common_FS = deviation_FWS.mean(axis=1)
    alone_FWS = deviation_FWS - common_FS[:, None]
    common_freedom = num_fractions * (num_seeds - 1)
    freedom = common_freedom * (num_widths - 1)
    cell = float((alone_FWS**2).sum()) / freedom / num_seeds
    common = float((common_FS**2).sum()) / common_freedom / num_seeds
    fraction = max(0.0, common - cell / num_widths)
    spread = cell + fraction
    is_chance = misfit <= spread * stats.f.ppf(1 - LEVEL, over, common_freedom + freedom)
    beyond = 0.0 if is_chance else misfit - cell
    return Noise(cell, fraction, beyond, freedom, common_freedom, over)


def log_misses(score: FloatArray | float) -> FloatArray:
    """Return -ln(1 - score); a score of 1 counts as one that misses a query in a million."""
    return -np.log(np.maximum(1 - np.asarray(score), FEWEST_MISSES))


def score_of(fitted: FloatArray | float) -> FloatArray:
    """Return the score, at least 0, of which `log_misses` is `fitted`."""
    return np.maximum(0.0, -np.expm1(-np.asarray(fitted)))


def resampled_means(
    value_CQ: FloatArray, document_Q: NDArray[np.integer], random: np.random.Generator, num: int
) -> FloatArray:
    """Return the mean of each cell over resampled documents, (B, C); documents are whole."""
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
