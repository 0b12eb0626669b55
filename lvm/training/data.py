"""Training data: batches of windows in seeded order, bank negatives, mined hard negatives.

Each batch is a function of seed, epoch and step. Shapes: B windows of a batch in this process, G
windows of the whole batch, T time, D vector dim, W windows of all epochs, R runs of overlapping
windows; K bank negatives of a step, or nearest rows of a position; P sampled positions, H hard
negatives of a position, C positions of a batch with hard negatives, N bank rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lvm.bank.bank import Bank, FloatArray
from lvm.system.distributed import World
from lvm.system.seeding import generator
from lvm.training.config import HARD_DEPTH
from lvm.training.loss import OwnNegatives
from lvm.windows.planning import IntArray, Windows

# A search costs rows x positions x dim: at 100,000 rows of 384 dims a sample of 16,384 positions
# takes 1.3e12 multiply-adds, about as many as training on 20,000 positions.
SAMPLE_POSITIONS = 16_384
POSITIVE_SHARE = 0.95
ROW_BLOCK = 32_768
POSITION_BLOCK = 4_096
NONE = -1  # no hard negative


@dataclass(frozen=True)
class Batch:
    """Unit contexts (B, T, D), their successors (B, T, D), and a mask of the real positions (B, T).

    If several processes share a batch, `share` is this process's share of its examples, 0 if there
    are fewer windows than processes. `last_GD` are the last successors of all windows of the batch;
    rows `own_B` belong to this process. `last_GD` is empty if every position is a target.
    """

    context_BTD: Tensor
    target_BTD: Tensor
    real_BT: Tensor
    last_GD: Tensor
    own_B: Tensor
    window_B: NDArray[np.int64]
    share: float

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)


class Batches:
    """The training windows of a bank in seeded order, `batch_size` windows of ctx rows per batch.

    A batch groups windows of similar length: twice as many windows of at most ctx / 2 rows, and so
    on. All batches hold about as many positions, and none is mostly padding.

    Only train rows are read: inputs, targets, negatives. With `dense` every position is a target,
    and overlapping windows take turns: an epoch reads each train row about once, the next epoch
    reads it in other windows. Without `dense` an epoch is every window of exactly ctx rows, with
    the last position as its only target. Process `rank` of `size` gets its share of each batch's
    windows.
    """

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
        batch_size: int,
        seed: int,
        dense: bool = True,
        *,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        start_W, rows_W = windows.train_windows()
        if not dense:
            full = rows_W == windows.ctx
            start_W, rows_W = start_W[full], rows_W[full]
        if len(start_W) == 0:
            raise ValueError(f"ctx: no training window of {windows.ctx} rows; use a smaller ctx")
        self._bank, self._seed = bank, seed
        self._start_W, self._rows_W = start_W, rows_W
        num_turns = -(-windows.ctx // (windows.ctx - windows.overlap)) if dense else 1
        self._turn_W, self._period_W = _turns(start_W, rows_W, num_turns)
        self._batch_size, self._dense, self._longest = batch_size, dense, windows.ctx
        self._rank, self._size = rank, size
        train_row = windows.train_rows()
        _, first = np.unique(windows.representative_N[train_row], return_index=True)
        self.negative_row = train_row[first]  # one of each group of duplicates

    def num_batches(self, epoch: int) -> int:
        """Return the number of batches of `epoch`, which counts from 1."""
        return len(self._plan(epoch))

    def num_windows(self, epoch: int = 1) -> int:
        return len(self._windows_of(epoch))

    def num_positions(self, epoch: int = 1) -> int:
        """Return the number of supervised positions of `epoch` if every position is a target."""
        return int(self._rows_W[self._windows_of(epoch)].sum())

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of `epoch` from number `first` on; each window appears once."""
        for window_G in self._plan(epoch)[first:]:
            yield self._batch(window_G)

    def upcoming(self, epoch: int, first: int = 0) -> NDArray[np.int64]:
        """Return the windows of all processes from batch `first` of `epoch` on, in order."""
        return np.concatenate([np.zeros(0, np.int64), *self._plan(epoch)[first:]])

    def extent(self, window: int) -> tuple[int, int]:
        """Return the first row and the number of input rows of a window."""
        return int(self._start_W[window]), int(self._rows_W[window])

    def negatives(self, step: int, count: int) -> Tensor:
        """Return `count` unit vectors (K, D), drawn uniformly over groups of train duplicates."""
        draw = generator(self._seed, f"negatives of step {step}")
        count = min(count, len(self.negative_row))
        row_K = draw.choice(self.negative_row, size=count, replace=False, shuffle=False)
        return torch.from_numpy(self._bank.unit(np.sort(row_K)))

    def _windows_of(self, epoch: int) -> NDArray[np.int64]:
        return np.flatnonzero((epoch - 1) % self._period_W == self._turn_W)

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the windows of each batch of `epoch`, ordered by their first windows."""
        chosen_W = self._windows_of(epoch)
        order_W = generator(self._seed, f"windows of epoch {epoch}").permutation(chosen_W)
        halvings_W = np.log2(self._longest / self._rows_W[order_W]).astype(np.int64)
        batches = []
        for halvings in np.unique(halvings_W):
            place = np.flatnonzero(halvings_W == halvings)
            size = self._batch_size << int(halvings)
            batches += [place[begin : begin + size] for begin in range(0, len(place), size)]
        return [order_W[place] for place in sorted(batches, key=lambda place: int(place[0]))]

    def _batch(self, window_G: NDArray[np.int64]) -> Batch:
        own_B = np.arange(self._rank, len(window_G), self._size)
        # Every process joins every backward pass; one without a window joins with a zero share.
        share = self._share(window_G, window_G[own_B])
        own_B = own_B if len(own_B) else np.zeros(1, dtype=np.int64)
        window_B = window_G[own_B]
        longest = int(self._rows_W[window_B].max())
        vector_BTD = np.zeros((len(window_B), longest + 1, self._bank.dim), dtype=np.float32)
        for place, window in enumerate(window_B):
            start, num_rows = self.extent(window)
            vector_BTD[place, : num_rows + 1] = self._bank.unit(slice(start, start + num_rows + 1))
        vectors = torch.from_numpy(vector_BTD)
        rows_B = torch.from_numpy(self._rows_W[window_B].astype(np.int64))
        real_BT = torch.arange(longest)[None, :] < rows_B[:, None]
        last_row_G = (self._start_W + self._rows_W)[window_G[: 0 if self._dense else None]]
        last_GD = torch.from_numpy(self._bank.unit(last_row_G))
        places = torch.from_numpy(own_B)
        return Batch(vectors[:, :-1], vectors[:, 1:], real_BT, last_GD, places, window_B, share)

    def _share(self, window_G: NDArray[np.int64], window_B: NDArray[np.int64]) -> float:
        if not self._dense:
            return len(window_B) / len(window_G)
        return int(self._rows_W[window_B].sum()) / int(self._rows_W[window_G].sum())


def _turns(
    start_W: NDArray[np.int64], rows_W: NDArray[np.int32], most_turns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the turn and the period of each window.

    Epoch e reads the windows with (e - 1) % period equal to their turn. A run whose windows read
    each row n times has period n, at most `most_turns`, so that an epoch reads the run about once.
    Windows are assigned to turns round-robin, continuing across runs of the same period; all turns
    have the same number of windows, give or take one.
    """
    end_W = start_W + rows_W
    begins_W = np.ones(len(start_W), dtype=bool)
    begins_W[1:] = (start_W[1:] >= end_W[:-1]) | (
        start_W[1:] <= start_W[:-1]
    )  # <=: a repeated window
    first_R = np.flatnonzero(begins_W)
    rows_R = np.maximum.reduceat(end_W, first_R) - start_W[first_R]
    times_R = -(-np.add.reduceat(rows_W.astype(np.int64), first_R) // rows_R)
    period_W = np.minimum(times_R, most_turns)[np.cumsum(begins_W) - 1]
    turn_W = np.zeros(len(start_W), dtype=np.int64)
    by_period = np.argsort(period_W, kind="stable")
    turn_W[by_period] = np.arange(len(start_W)) % period_W[by_period]
    return turn_W, period_W


class HardNegatives:
    """Train rows that compete with the truth at sampled positions, mined once an epoch.

    The candidates of a position are the 200 train rows nearest to its prediction, one per group of
    duplicates. Duplicates of the target and rows of the position's context are removed (the ranking
    removes the latter, too), and so are rows that score at least 0.95 of the target's score, since
    these are often right as well (NV-Retriever, arXiv 2407.15831, section 4.1). The best `count` of
    the rest are the hard negatives. The bank is read in blocks; memory is bounded by the sample.
    """

    def __init__(self, bank: Bank, group_N: IntArray, batches: Batches, count: int) -> None:
        self._bank, self._group_N, self._batches = bank, group_N, batches
        self._count = count
        self._row_TH: dict[int, IntArray] = {}

    def mine(
        self, model: nn.Module, upcoming_W: IntArray, draw: np.random.Generator, world: World
    ) -> None:
        """Replace all hard negatives by those of a sample of the upcoming windows.

        Each process searches for its share of the sample; all processes get the whole result.
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
        """Return the hard negatives of a batch's real positions; None if it has none."""
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
        """Return the mined rows as tensors: the windows, and the rows of all their positions."""
        if not self._row_TH:
            return {}
        rows = np.concatenate(list(self._row_TH.values()))
        return {"window": torch.tensor(list(self._row_TH)), "row": torch.from_numpy(rows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
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
        """Return the rows (P, H) of each position's best competitors, padded with NONE."""
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
        """Return scores and bank rows (P, K) of the nearest train rows, best first."""
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
