"""Hubness correction of one predictor, fitted on its train-time predictions.

Shapes: Q queries, N bank rows, D vector dim, P train-time predictions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.metrics import selection_score
from lvm.models.fits import Fit, cached_fit, model_digest
from lvm.prediction.predict import on_train_rows, predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.search import mean_neighbour_score, neighbour_penalty
from lvm.system.seeding import generator
from lvm.windows.planning import Queries, Windows, make_queries

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_POSITIONS = 8192
# On 97,000 train rows of textbooks, 8,192 positions of 190 windows lifted Hit@5 as much as
# positions drawn one by one, those of 64 windows a third less.
MAX_ROWS_READ = 256_000
MAX_TUNING_QUERIES = 2000
NEIGHBOURS = 10


@dataclass(frozen=True)
class Hubness:
    """The correction with the best val Hit@5: `beta`, the row correction (N, 2) it gives."""

    beta: float
    row_correction: NDArray[np.float32]


def fit_hubness(model: nn.Module, bank: Bank, windows: Windows, seed: int = 0) -> Hubness:
    """Fit the correction on train rows, choose beta among BETAS on val queries alone.

    Equal Hit@5 is decided by MRR@10, then by the smaller beta: without a gain on val it stays 0.
    A predictor that stores train rows is asked `on_train_rows`: its own row found again would make
    every train-time prediction the answer itself, a crowd of other rows than it retrieves later.
    """
    inputs = {"model": model_digest(model), "seed": seed} if windows.folder else {}
    found = cached_fit(windows, "hubness", inputs, lambda: _fit(model, bank, windows, seed))
    return Hubness(found.values["beta"], found.tensors["row_correction"].numpy())


def _fit(model: nn.Module, bank: Bank, windows: Windows, seed: int) -> Fit:
    positions = train_positions(bank, windows, seed)
    train_prediction_PD = predict_queries(on_train_rows(model), bank, positions)
    neighbours = min(NEIGHBOURS, len(positions))
    mean_N = mean_neighbour_score(train_prediction_PD, bank, neighbours)
    corrections = [neighbour_penalty(mean_N, beta) for beta in BETAS]
    queries = windows.queries["val"].head(MAX_TUNING_QUERIES)
    prediction_QD = predict_queries(model, bank, queries)
    ranks = exact_ranks(prediction_QD, queries, bank, windows.representative_N, corrections)
    scores = [selection_score(found.rank_Q) for found in ranks]
    best = max(range(len(BETAS)), key=lambda place: (scores[place], -place))
    return Fit({"row_correction": torch.from_numpy(corrections[best])}, {"beta": BETAS[best]})


def train_positions(bank: Bank, windows: Windows, seed: int) -> Queries:
    """Draw up to MAX_POSITIONS targets of train windows, each in the second half of its window.

    There the context is about as long as a query's. Windows of MAX_ROWS_READ rows at most are read,
    which keeps the cost of a slow model near that of evaluating it. Pinned rows, which are never
    asked, are left out where there are others: tens of thousands of short chains would be all.
    """
    random = generator(seed, "hubness positions")
    start_W, rows_W = windows.train_windows()
    asked_W = ~bank.pinned_N[start_W]
    if asked_W.any():
        start_W, rows_W = start_W[asked_W], rows_W[asked_W]
    order_W = random.permutation(len(start_W))
    num_read = np.searchsorted(rows_W[order_W].cumsum(), MAX_ROWS_READ, side="right")
    chosen_W = order_W[: max(1, num_read)]
    target, origin = [], []
    per_window = -(-MAX_POSITIONS // len(chosen_W))
    for window in chosen_W:
        first, rows = int(start_W[window]), int(rows_W[window])
        position = random.permutation(np.arange(rows // 2, rows))[:per_window]
        target.append(first + position + 1)
        origin.append(np.full(len(position), first))
    target_row_P = np.concatenate(target)[:MAX_POSITIONS]
    origin_P = np.concatenate(origin)[:MAX_POSITIONS]
    return make_queries(np.arange(len(target_row_P)), target_row_P, origin_P, windows.ctx)
