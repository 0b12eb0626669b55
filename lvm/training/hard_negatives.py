"""Negatives that the model itself confuses with the truth, found in the train rows by FAISS.

Shapes: P sampled positions, D vector dim, K best rows of a position, H hard negatives of a
position, N bank rows, B batch, T time, C positions of a batch with hard negatives.
"""

from collections.abc import Mapping

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.bank.store import Bank
from lvm.training.batches import Batch, Batches
from lvm.training.config import HARD_DEPTH
from lvm.training.distributed import World
from lvm.training.loss import OwnNegatives

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

# A search costs rows x positions x dim: at 100,000 rows of 384 dims a sample of 16,384 positions
# is 1.3e12 multiply-adds, about the arithmetic of 20,000 positions of training.
SAMPLE_POSITIONS = 16_384
POSITIVE_SHARE = 0.95
ROW_BLOCK = 32_768
POSITION_BLOCK = 4_096
NONE = -1


class HardNegatives:
    """Rows that compete with the truth at sampled train positions, mined once an epoch.

    Of the 200 train rows nearest to a prediction (one a group of duplicates), those remain that
    are no duplicate of the target, no row of the position's context (the ranking removes it) and
    that score below 0.95 of the target's score, since better ones are often right as well
    (NV-Retriever, arXiv 2407.15831, section 4.1); the best `count` of them are taken. Memory is
    bounded by the sample: the bank is read in blocks.
    """

    def __init__(self, bank: Bank, group_N: IntArray, batches: Batches, count: int) -> None:
        self._bank, self._group_N, self._batches = bank, group_N, batches
        self._count = count
        self._row_TH: dict[int, IntArray] = {}

    def mine(
        self, model: nn.Module, upcoming_W: IntArray, draw: np.random.Generator, world: World
    ) -> None:
        """Replace all hard negatives by those of a sample, drawn from the windows to come.

        Each process searches for its share of the sample; all get the whole.
        """
        order_W = draw.permutation(upcoming_W)
        rows_W = np.array([self._batches.extent(window)[1] for window in order_W])
        enough = int(np.searchsorted(np.cumsum(rows_W), SAMPLE_POSITIONS)) + 1
        own_W = order_W[:enough][world.rank :: world.size]
        found = self._search(model, own_W) if len(own_W) else {}
        self._row_TH = {}
        for part in world.gathered(found):
            self._row_TH |= part

    def of_batch(self, batch: Batch) -> OwnNegatives | None:
        """Return the hard negatives of a batch's real positions; None where it has none."""
        if not self._row_TH:
            return None
        row_BTH = np.full((*batch.real_BT.shape, self._count), NONE, dtype=np.int64)
        for place, window in enumerate(batch.window_B):
            row_TH = self._row_TH.get(int(window), row_BTH[place, :0])
            row_BTH[place, : len(row_TH)] = row_TH
        row_PH = row_BTH[batch.real_BT.cpu().numpy()]
        place_C = np.flatnonzero((row_PH != NONE).any(axis=1))
        if not len(place_C):
            return None
        row_CH = row_PH[place_C]
        vector_CHD = torch.from_numpy(self._bank.unit(np.maximum(row_CH, 0)))
        return OwnNegatives(torch.from_numpy(place_C), vector_CHD, torch.from_numpy(row_CH != NONE))

    def num_positions(self) -> int:
        """Return the number of positions that have hard negatives."""
        return sum(int((row_TH != NONE).any(axis=1).sum()) for row_TH in self._row_TH.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mined rows as tensors: the windows, the rows of all their positions."""
        if not self._row_TH:
            return {}
        rows = np.concatenate(list(self._row_TH.values()))
        return {"window": torch.tensor(list(self._row_TH)), "row": torch.from_numpy(rows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        self._row_TH, begin = {}, 0
        for window in state["window"].tolist() if state else ():
            end = begin + self._batches.extent(window)[1]
            self._row_TH[window] = state["row"][begin:end].numpy()
            begin = end

    def _search(self, model: nn.Module, window_W: IntArray) -> dict[int, IntArray]:
        extents = [self._batches.extent(window) for window in window_W]
        prediction_PD = np.concatenate([self._predict(model, *extent) for extent in extents])
        target_P = np.concatenate([np.arange(s + 1, s + rows + 1) for s, rows in extents])
        start_P = np.concatenate([np.full(rows, s) for s, rows in extents])
        row_PH = np.concatenate(
            [
                self._competitors(prediction_PD[part], start_P[part], target_P[part])
                for part in _slices(len(target_P), POSITION_BLOCK)
            ]
        )
        ends = np.cumsum([rows for _, rows in extents])[:-1]
        return dict(zip(window_W.tolist(), np.split(row_PH, ends), strict=True))

    def _predict(self, model: nn.Module, start: int, num_rows: int) -> FloatArray:
        device = next(model.parameters()).device
        context_TD = torch.from_numpy(self._bank.unit(slice(start, start + num_rows)))
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            prediction: Tensor = model(context_TD[None].to(device))[0].float().cpu()
        model.train(was_training)
        return np.ascontiguousarray(prediction.numpy())

    def _competitors(
        self, prediction_PD: FloatArray, start_P: IntArray, target_P: IntArray
    ) -> IntArray:
        """Return the rows (P, H) of each position's best competitors, NONE where too few are."""
        score_PK, row_PK = self._nearest(prediction_PD)
        truth_P1 = (prediction_PD * self._bank.unit(target_P)).sum(axis=1)[:, None]
        right_PK = self._group_N[row_PK] == self._group_N[target_P][:, None]
        known_PK = (row_PK >= start_P[:, None]) & (row_PK < target_P[:, None])
        rival_PK = ~right_PK & ~known_PK & (score_PK < POSITIVE_SHARE * truth_P1)
        chosen_PH = np.argsort(~rival_PK, axis=1, kind="stable")[:, : self._count]
        row_PH = np.full((len(target_P), self._count), NONE, dtype=np.int64)
        found_PH = np.take_along_axis(np.where(rival_PK, row_PK, NONE), chosen_PH, axis=1)
        row_PH[:, : found_PH.shape[1]] = found_PH
        return row_PH

    def _nearest(self, prediction_PD: FloatArray) -> tuple[FloatArray, IntArray]:
        """Return scores and bank rows (P, K) of the nearest train rows, the best first; exact."""
        faiss.omp_set_num_threads(torch.get_num_threads())
        score_PK = np.empty((len(prediction_PD), 0), dtype=np.float32)
        row_PK = np.empty((len(prediction_PD), 0), dtype=np.int64)
        candidate_row = self._batches.negative_row
        for part in _slices(len(candidate_row), ROW_BLOCK):
            block_row = np.sort(candidate_row[part])
            block_ND = self._bank.unit(block_row)
            depth = min(HARD_DEPTH, len(block_row))
            score, place = faiss.knn(
                prediction_PD, block_ND, depth, metric=faiss.METRIC_INNER_PRODUCT
            )
            score_PK = np.concatenate([score_PK, score], axis=1)
            row_PK = np.concatenate([row_PK, block_row[place]], axis=1)
            best_PK = np.argsort(-score_PK, axis=1, kind="stable")[:, :HARD_DEPTH]
            score_PK = np.take_along_axis(score_PK, best_PK, axis=1)
            row_PK = np.take_along_axis(row_PK, best_PK, axis=1)
        return score_PK, row_PK


def _slices(total: int, block: int) -> list[slice]:
    return [slice(begin, begin + block) for begin in range(0, total, block)]
