"""Batches of training windows with their negatives, each a function of seed, epoch, step.

Shapes: B batch, T time, D vector dim, K negatives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm.bank import Bank
from lvm.seeding import generator
from lvm.windows import Windows

EVERY_TURN = -1


@dataclass(frozen=True)
class Batch:
    """Unit contexts (B, T, D), their successors (B, T, D), and which positions are real (B, T)."""

    context_BTD: Tensor
    target_BTD: Tensor
    real_BT: Tensor


class Batches:
    """The training windows of a bank in seeded order, `batch_size` at a time.

    Only train rows are ever read: inputs, targets, negatives. With `dense`, every position is a
    target, so overlapping windows take turns: an epoch reads each train row about once, the next
    epoch reads it in other windows. Otherwise an epoch is every window of exactly ctx rows, the
    last position its only target.
    """

    def __init__(
        self, bank: Bank, windows: Windows, batch_size: int, seed: int, dense: bool = True
    ) -> None:
        start_W, rows_W = windows.train_windows()
        turn_W, self._num_turns = _turns(start_W, rows_W, windows.ctx - windows.overlap)
        if not dense:
            full = rows_W == windows.ctx
            start_W, rows_W = start_W[full], rows_W[full]
            turn_W, self._num_turns = np.zeros(len(start_W), dtype=np.int64), 1
        if len(start_W) == 0:
            raise ValueError(f"ctx: no training window of {windows.ctx} rows; use a smaller ctx")
        self._bank, self._seed = bank, seed
        self._start_W, self._rows_W, self._turn_W = start_W, rows_W, turn_W
        self._batch_size = batch_size
        train_row = windows.train_rows()
        _, first = np.unique(windows.representative_N[train_row], return_index=True)
        self._negative_row = train_row[first]

    def num_batches(self, epoch: int) -> int:
        """Return the number of batches of `epoch`, counted from 1."""
        return -(-len(self._windows_of(epoch)) // self._batch_size)

    def num_windows(self, epoch: int = 1) -> int:
        return len(self._windows_of(epoch))

    def num_positions(self, epoch: int = 1) -> int:
        """Return the supervised positions of `epoch` when every position is a target."""
        return int(self._rows_W[self._windows_of(epoch)].sum())

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of `epoch`, each of its windows once."""
        chosen_W = self._windows_of(epoch)
        order_W = generator(self._seed, f"windows of epoch {epoch}").permutation(chosen_W)
        for begin in range(0, len(order_W), self._batch_size):
            yield self._batch(order_W[begin : begin + self._batch_size])

    def negatives(self, step: int, count: int) -> Tensor:
        """Return `count` unit vectors (K, D), drawn uniformly over groups of train duplicates."""
        draw = generator(self._seed, f"negatives of step {step}")
        count = min(count, len(self._negative_row))
        row_K = draw.choice(self._negative_row, size=count, replace=False, shuffle=False)
        return torch.from_numpy(self._bank.unit(np.sort(row_K)))

    def _windows_of(self, epoch: int) -> NDArray[np.int64]:
        turn = (epoch - 1) % self._num_turns
        return np.flatnonzero((self._turn_W == turn) | (self._turn_W == EVERY_TURN))

    def _batch(self, chosen_W: NDArray[np.int64]) -> Batch:
        longest = int(self._rows_W[chosen_W].max())
        vector_BTD = np.zeros((len(chosen_W), longest + 1, self._bank.dim), dtype=np.float32)
        for place, window in enumerate(chosen_W):
            start, count = int(self._start_W[window]), int(self._rows_W[window]) + 1
            vector_BTD[place, :count] = self._bank.unit(slice(start, start + count))
        vectors = torch.from_numpy(vector_BTD)
        rows_B = torch.from_numpy(self._rows_W[chosen_W].astype(np.int64))
        real_BT = torch.arange(longest)[None, :] < rows_B[:, None]
        return Batch(vectors[:, :-1], vectors[:, 1:], real_BT)


def _turns(
    start_W: NDArray[np.int64], rows_W: NDArray[np.int32], stride: int
) -> tuple[NDArray[np.int64], int]:
    """Return the turn of each window, the number of turns; windows of a turn hardly overlap.

    Along a run of overlapping windows the turns alternate; a run of one window has every turn.
    """
    num_turns = max(1, -(-int(rows_W.max(initial=1)) // stride))
    begins_W = np.ones(len(start_W), dtype=bool)
    begins_W[1:] = start_W[1:] >= start_W[:-1] + rows_W[:-1]
    run_W = np.cumsum(begins_W) - 1
    first_W = np.flatnonzero(begins_W)
    turn_W = (np.arange(len(start_W)) - first_W[run_W]) % num_turns
    turn_W[np.bincount(run_W)[run_W] < num_turns] = EVERY_TURN
    return turn_W, num_turns
