"""Grids of ranks drawn from learning curves whose gains are known.

Shapes: F fractions, W widths, S seeds, Q queries, M documents.
"""

from collections.abc import Callable

import numpy as np

from lvm.evaluation.metrics import soft_hit_at
from lvm.studies.scaling_cells import Cell, CellResult
from lvm.studies.scaling_fit import GridValues, score_of
from lvm.system.seeding import generator

DATA_F = np.array([0.125, 0.25, 0.5, 1.0])
PARAMETERS_W = np.array([0.3, 1.0, 3.2])
Curve = Callable[[float, float], float]  # how far down log ranks come, by data and parameters

CURVES: dict[str, Curve] = {
    "data-limited": lambda data, size: -0.6 * data**-0.4 - 0.01 * size**-0.5,
    "capacity-limited": lambda data, size: -0.02 * data**-0.8 - 0.9 * size**-0.3,
    "both": lambda data, size: 1 - 0.8 * data**-0.4 - 0.8 * size**-0.4,
    "saturated": lambda data, size: -0.01 * data**-0.8 - 0.01 * size**-1,
}
WEAK: Curve = lambda data, size: -0.2 * data**-0.4 - 0.1 * size**-0.5  # noqa: E731


def draw_grid(
    curve: Curve, seed: int, *, num_seeds: int = 2, num_queries: int = 6000, num_documents: int = 80
) -> GridValues:
    """Draw soft Hit@5 of every query in every cell.

    Log ranks differ by query (sd 2), by document (0.8), by cell and query (0.7: models disagree),
    by seed (0.02, a fifth of a point), by the part of the data that a seed chose (0.01 for all
    widths, none for all data); the effect of the curve differs by document (sd a half).
    """
    random = generator(seed, "curves")
    document_Q = random.integers(num_documents, size=num_queries)
    easy_M, effect_M = random.normal(0, 0.8, num_documents), random.normal(1, 0.5, num_documents)
    base_Q = random.normal(4, 2, num_queries) + easy_M[document_Q]
    shape = (len(DATA_F), len(PARAMETERS_W), num_seeds, num_queries)
    value_FWSQ = np.empty(shape)
    part_FS = random.normal(0, 0.01, (len(DATA_F), num_seeds)) * (DATA_F < 1)[:, None]
    for f, w, s in np.ndindex(shape[:3]):
        shift = curve(DATA_F[f], PARAMETERS_W[w]) * effect_M[document_Q] + part_FS[f, s]
        value_FWSQ[f, w, s] = soft_hit_at(_ranks(random, base_Q - shift), 5)
    return GridValues(DATA_F, PARAMETERS_W, value_FWSQ, document_Q)


def draw_cells(seed: int, num_seeds: int, document_Q: np.ndarray) -> list[CellResult]:
    """Draw the largest cell of every seed, with the noise of `draw_grid` alone."""
    base_Q = generator(0, "cells").normal(4, 2, len(document_Q))
    random = generator(seed, "steps")
    return [cell_of(_ranks(random, base_Q)) for _ in range(num_seeds)]


def cell_of(rank_Q: np.ndarray, steps: int = 600, lr: float = 1e-3) -> CellResult:
    """Return a training of known ranks."""
    cell = Cell(1.0, 64, 0, steps, lr)
    history = [{"train/loss": 5.0 - 0.1 * epoch} for epoch in range(8)]
    return CellResult(cell, rank_Q, 1000, 900, 40, steps, 5, 8, history, was_kept=False)


def _ranks(random: np.random.Generator, log_rank_Q: np.ndarray) -> np.ndarray:
    noise_Q = random.normal(0, 0.7, len(log_rank_Q)) + random.normal(0, 0.02)
    return np.maximum(1, np.exp(log_rank_Q + noise_Q))


def exact_grid(curve: Curve, num_documents: int = 5) -> GridValues:
    """Every query of every document has exactly the value 1 - exp(-curve)."""
    mean_FW = score_of(np.array([[curve(x, z) for z in PARAMETERS_W] for x in DATA_F]))
    value_FWSQ = np.broadcast_to(mean_FW[:, :, None, None], (4, 3, 2, 20)).copy()
    return GridValues(DATA_F, PARAMETERS_W, value_FWSQ, np.arange(20) % num_documents)
