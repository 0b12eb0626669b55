"""Hubness correction of a predictor, fitted on its train-time predictions.

Shapes: Q queries, N bank rows, B rows of one block, D vector dim, P train-time predictions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.bank.bank import Bank, FloatArray, SharedBank, share_rows
from lvm.models.predict import on_train_rows, predict_queries
from lvm.models.weights import Fit, cached_fit, model_digest
from lvm.retrieval.exact import exact_ranks, selection_score, unit_predictions
from lvm.system.processes import share_blocks
from lvm.system.progress import add_products, part
from lvm.system.seeding import generator
from lvm.windows.planning import Queries, Windows, make_queries

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_POSITIONS = 8192
# On 97,000 train rows of textbooks, 8,192 positions of 190 windows lifted Hit@5 as much as
# positions drawn one by one, those of 64 windows a third less.
MAX_ROWS_READ = 256_000
MAX_TUNING_QUERIES = 2000
NEIGHBOURS = 10
NEIGHBOUR_BLOCK = 128


@dataclass(frozen=True)
class Hubness:
    """The correction with the best val Hit@5: its `beta` and the row correction (N, 2)."""

    beta: float
    row_correction: NDArray[np.float32]


def fit_hubness(
    model: nn.Module, bank: Bank, windows: Windows, seed: int = 0, omits_own: bool = True
) -> Hubness:
    """Fit the correction on train rows; choose beta among BETAS on val queries alone.

    MRR@10 breaks ties of Hit@5, then the smaller beta wins: without a gain on val it stays 0. The
    bias of a row omits predictions whose target is in the row's own document, unless `omits_own` is
    False. Otherwise train rows would be penalised for having been targets, which separates them
    from val and test rows whether they are hubs or not.

    A predictor that stores train rows predicts through `on_train_rows`. Otherwise it would find the
    stored row itself and predict its exact successor, which never happens for a query.
    """
    inputs = {"model": model_digest(model), "seed": seed} if windows.folder else {}
    name = "hubness" if omits_own else "hubness-own"
    with part("hubness"):
        found = cached_fit(
            windows, name, inputs, lambda: _fit(model, bank, windows, seed, omits_own)
        )
    return Hubness(found.values["beta"], found.tensors["row_correction"].numpy())


def _fit(model: nn.Module, bank: Bank, windows: Windows, seed: int, omits_own: bool) -> Fit:
    corrections = penalties(model, bank, windows, seed, omits_own)
    queries = windows.queries["val"].head(MAX_TUNING_QUERIES)
    prediction_QD = predict_queries(model, bank, queries)
    ranks = exact_ranks(prediction_QD, queries, bank, windows.representative_N, corrections)
    scores = [selection_score(found.rank_Q) for found in ranks]
    best = max(range(len(BETAS)), key=lambda place: (scores[place], -place))
    return Fit({"row_correction": torch.from_numpy(corrections[best])}, {"beta": BETAS[best]})


def penalties(
    model: nn.Module, bank: Bank, windows: Windows, seed: int = 0, omits_own: bool = True
) -> list[FloatArray]:
    """Return the row corrections (N, 2) among which `fit_hubness` chooses, one per beta."""
    positions = train_positions(bank, windows, seed)
    train_prediction_PD = predict_queries(on_train_rows(model), bank, positions)
    document_P = bank.document_N[positions.target_row_Q] if omits_own else None
    neighbours = min(NEIGHBOURS, len(positions))
    mean_N = mean_neighbour_score(train_prediction_PD, bank, neighbours, document_P)
    return [neighbour_penalty(mean_N, beta) for beta in BETAS]


def train_positions(bank: Bank, windows: Windows, seed: int) -> Queries:
    """Draw up to MAX_POSITIONS targets of train windows, each in the second half of its window.

    There the context is about as long as a query's. At most MAX_ROWS_READ rows are read, so that a
    slow model takes about as long here as in its evaluation. Pinned rows are omitted unless there
    are no others, since their many short chains would take all positions.
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


def mean_neighbour_score(
    train_prediction_PD: FloatArray,
    bank: Bank,
    neighbours: int = NEIGHBOURS,
    document_P: NDArray[np.integer] | None = None,
) -> FloatArray:
    """Return each bank row's mean cosine to its nearest train-time predictions, (N,) float32.

    `document_P` is the document (of `bank.document_N`) of each prediction's target; rows of that
    document omit the prediction. A row with fewer than `neighbours` predictions of other documents
    gets the mean of those it has; a row with none gets the mean of all other rows. Raises
    ValueError for fewer predictions than `neighbours`.
    """
    unit_PD = unit_predictions(train_prediction_PD, bank, None)
    if len(unit_PD) < neighbours:
        raise ValueError(f"neighbours: {neighbours} of only {len(unit_PD)} train predictions")
    own_P = None if document_P is None else torch.from_numpy(document_P)
    found = share_rows(bank, _NeighbourTask(SharedBank(bank), unit_PD, neighbours, own_P))
    mean_N = np.concatenate(found)
    add_products(2.0 * unit_PD.numel() * bank.num_rows)
    is_alone_N = np.isnan(mean_N)
    mean_N[is_alone_N] = 0.0 if is_alone_N.all() else mean_N[~is_alone_N].mean()
    return mean_N


@dataclass(frozen=True)
class _NeighbourTask:
    """The mean neighbour scores of the rows of a bank, NaN for a row without predictions."""

    bank: SharedBank
    unit_PD: Tensor
    neighbours: int
    own_P: Tensor | None

    def run(self, rank: int, size: int) -> FloatArray:
        """Return the scores of part `rank` of `size` parts of the rows."""
        bank, own_P = self.bank.bank, self.own_P
        every = range(0, bank.num_rows, NEIGHBOUR_BLOCK)
        starts = every[rank * len(every) // size : (rank + 1) * len(every) // size]
        first = starts.start
        mean_B = np.empty(min(starts.stop, bank.num_rows) - first, np.float32)

        def score(blocks: Iterator[int]) -> None:
            for begin in blocks:
                rows = slice(begin, begin + NEIGHBOUR_BLOCK)
                score_BP = torch.from_numpy(bank.unit(rows)) @ self.unit_PD.T
                if own_P is not None:
                    document_B = torch.from_numpy(bank.document_N[rows])
                    near = torch.nonzero((own_P >= document_B[0]) & (own_P <= document_B[-1]))[:, 0]
                    is_own = document_B[:, None] == own_P[near]
                    score_BP[:, near] = score_BP[:, near].masked_fill(is_own, -torch.inf)
                nearest_BK = score_BP.topk(self.neighbours, dim=1, sorted=False).values
                is_other_BK = nearest_BK > -torch.inf
                total_B = nearest_BK.masked_fill(~is_other_BK, 0).sum(dim=1)
                found_B = (total_B / is_other_BK.sum(dim=1)).numpy()
                mean_B[begin - first : begin - first + len(found_B)] = found_B

        share_blocks(score, starts, "nearest predictions")
        return mean_B


def neighbour_penalty(mean_N: FloatArray, beta: float) -> FloatArray:
    """Return the row correction (N, 2) of CSLS: scale 1, bias -beta * mean neighbour score.

    Source: Conneau et al., Word Translation Without Parallel Data, ICLR 2018, section 2.3.
    """
    return np.stack([np.ones_like(mean_N), -beta * mean_N], axis=1).astype(np.float32)
