"""Nested parts of the train rows, as windows that differ in nothing else.

Shapes: N bank rows, W windows.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.system.seeding import generator
from lvm.windows.planning import SPLITS, TRAIN, Windows, contents_sha256, runs, train_windows

LEFT_OUT = len(SPLITS)  # a train row of the plan that this part does not have
NO_BLOCK = -1


def part_of(bank: Bank, windows: Windows, fraction: float, seed: int, repeats: int = 1) -> Windows:
    """Return the windows over a fraction of the train rows, in whole documents.

    Blocks of neighbouring documents, longer than ctx rows where there are so many, stand in one
    order drawn by `seed`; a part is the shortest beginning of it with `fraction` of the rows. So a
    smaller part lies within a larger one, and its windows are as long. val and test queries,
    candidates and duplicate groups stay those of `windows`. Each window stands there `repeats`
    times, so that parts of different size can have epochs of one length: where windows overlap, the
    repetitions take turns as the windows of so many more documents would.
    """
    block_N = train_blocks(bank, windows)
    size_K = np.bincount(block_N[block_N != NO_BLOCK])
    order_K = generator(seed, "blocks of the train rows").permutation(len(size_K))
    needed = fraction * size_K.sum()
    num_chosen = 1 + int(np.searchsorted(np.cumsum(size_K[order_K]), needed - 0.5))
    chosen_K = np.zeros(len(size_K) + 1, bool)  # the last place is that of NO_BLOCK
    chosen_K[order_K[:num_chosen]] = True
    split_N = windows.split_N.copy()
    split_N[(split_N == TRAIN) & ~chosen_K[block_N]] = LEFT_OUT
    run_start, run_rows = _train_runs(bank, split_N)
    cut_W2 = train_windows(run_start, run_rows, windows.ctx, windows.overlap)
    cut_W2 = np.tile(cut_W2, (repeats, 1))
    part = dataclasses.replace(
        windows,
        split_N=split_N,
        window_start_W=cut_W2[:, 0].copy(),
        window_rows_W=cut_W2[:, 1].astype(np.int32),
        window_split_W=np.full(len(cut_W2), TRAIN, np.int8),
        folder=None,
    )
    return dataclasses.replace(part, sha256=contents_sha256(part))


def train_blocks(bank: Bank, windows: Windows) -> NDArray[np.int64]:
    """Return the block of each row (N,), NO_BLOCK outside the train rows.

    A block ends with the first document that brings it to more than ctx rows; what is left of a
    run of train rows joins the block before it.
    """
    block_N = np.full(bank.num_rows, NO_BLOCK, np.int64)
    begins_N = np.flatnonzero(np.diff(bank.document_N, prepend=-1))
    num_blocks = 0
    for start, rows in zip(*_train_runs(bank, windows.split_N), strict=True):
        end = start + rows
        borders = np.append(begins_N[(begins_N > start) & (begins_N < end)], end)
        first = start
        for border in borders.tolist():
            if border - first > windows.ctx:
                block_N[first:border] = num_blocks
                first, num_blocks = border, num_blocks + 1
        if first < end and first > start:
            block_N[first:end] = num_blocks - 1
        elif first < end:
            block_N[first:end] = num_blocks
            num_blocks += 1
    return block_N


def num_documents(bank: Bank, windows: Windows) -> int:
    """Return the number of documents with train rows."""
    return len(np.unique(bank.document_N[windows.train_rows()]))


def _train_runs(
    bank: Bank, split_N: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first row and number of rows of each run of train rows of one sequence."""
    run_start, run_rows = runs(bank.sequence_N.astype(np.int64) * (LEFT_OUT + 1) + split_N)
    in_train = split_N[run_start] == TRAIN
    return run_start[in_train], run_rows[in_train]
