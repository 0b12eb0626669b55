"""Row splits by document, the geometry of windows over them.

Shapes: N bank rows, W windows, Q queries. A window is a start row with a number of input rows; the
row after its last input is its last target.
"""

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.system.seeding import generator

IntArray = NDArray[np.int64]
SplitArray = NDArray[np.int8]

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
SHARES = (0.8, 0.1, 0.1)
MIN_DOCUMENTS = 10  # a sequence with fewer goes whole to one split
FLAT_VAL_SHARE = 0.1


def split_by_document(bank: Bank, seed: int) -> SplitArray:
    """Return the split of each row, (N,) int8 codes of SPLITS; a document is never divided.

    A sequence with MIN_DOCUMENTS documents or more gives its first 80 % to train, the next 10 % to
    val, the rest to test: each document goes where its middle row lies. Shorter sequences go whole,
    in an order drawn by `seed`, to the split that is furthest below its share of all rows. Pinned
    sequences are train, and play no part in what becomes of the others: those of a bank that was
    extended keep their splits.
    """
    documents = bank.document_table()
    documents = documents[~bank.pinned_N[documents["first_row"]]]
    first_row = documents["first_row"].to_numpy(np.int64)
    num_rows = documents["num_rows"].to_numpy(np.int64)
    sequence = documents["sequence"].to_numpy(np.int64)
    sequence_rows = np.bincount(sequence, weights=num_rows).astype(np.int64)
    is_long = np.bincount(sequence) >= MIN_DOCUMENTS
    sequence_start = bank.sequence_start_N()[first_row]
    middle = (first_row - sequence_start + num_rows / 2) / sequence_rows[sequence]
    split = np.digitize(middle, (SHARES[TRAIN], SHARES[TRAIN] + SHARES[VAL]))
    short_split = _split_short_sequences(sequence_rows, is_long, split, sequence, num_rows, seed)
    split = np.where(is_long[sequence], split, short_split[sequence])
    split_N = np.full(bank.num_rows, TRAIN, np.int8)
    split_N[~bank.pinned_N] = np.repeat(split, num_rows)
    return split_N


def _split_short_sequences(
    sequence_rows: IntArray,
    is_long: NDArray[np.bool_],
    document_split: IntArray,
    document_sequence: IntArray,
    document_rows: IntArray,
    seed: int,
) -> IntArray:
    """Return one split per sequence, filled in for the short ones."""
    counted = is_long[document_sequence]
    assigned = np.bincount(document_split[counted], document_rows[counted], minlength=len(SPLITS))
    deficit = np.array(SHARES) * sequence_rows.sum() - assigned
    split = np.zeros(len(sequence_rows), np.int64)
    is_short = ~is_long & (sequence_rows > 0)
    for code in generator(seed, "short sequences").permutation(np.flatnonzero(is_short)):
        split[code] = deficit.argmax()
        deficit[split[code]] -= sequence_rows[code]
    return split


def train_windows(run_start: IntArray, run_rows: IntArray, ctx: int, overlap: int) -> IntArray:
    """Cut runs of train rows to windows, (W, 2) start and number of input rows.

    Windows of `ctx` inputs start every ctx - overlap rows; the last one is aligned to the run's
    end. A run that is shorter than ctx + 1 gives one shorter window, a run of one row gives none.
    """
    stride = ctx - overlap
    pieces = [np.zeros((0, 2), np.int64)]
    for start, rows in zip(run_start.tolist(), run_rows.tolist(), strict=True):
        if rows <= ctx:
            if rows > 1:
                pieces.append(np.array([[start, rows - 1]]))
            continue
        last = start + rows - 1 - ctx
        starts = np.arange(start, last + 1, stride)
        if starts[-1] < last:
            starts = np.append(starts, last)
        pieces.append(np.stack([starts, np.full_like(starts, ctx)], axis=1))
    return np.concatenate(pieces)


def target_windows(
    run_start: IntArray, run_rows: IntArray, sequence_start: IntArray, ctx: int, overlap: int
) -> IntArray:
    """Return windows of `ctx` inputs whose target lies in the runs, (W, 2) as `train_windows`.

    Inputs may reach back into earlier rows of the same sequence, never before its start.
    """
    pieces = [np.zeros((0, 2), np.int64)]
    for start, rows, origin in zip(run_start, run_rows, sequence_start, strict=True):
        target = np.arange(max(start, origin + ctx), start + rows, ctx - overlap)
        pieces.append(np.stack([target - ctx, np.full_like(target, ctx)], axis=1))
    return np.concatenate(pieces)


def num_flat_windows(num_rows: int, ctx: int, overlap: int) -> tuple[int, int]:
    """Return how many train and val windows the flat geometry of split=random cuts."""
    total = max(0, num_rows - ctx - 1) // (ctx - overlap)
    num_val = int(FLAT_VAL_SHARE * total)
    return total - num_val, num_val


def flat_windows(num_rows: int, ctx: int, overlap: int, seed: int) -> tuple[IntArray, SplitArray]:
    """Cut the flat row array to overlapping windows, shuffled to train or val; blind to sequences.

    The geometry of the system that lvm replaces, kept to show what it leaks. Returns starts (W,)
    with the split of each window (W,).
    """
    num_train, num_val = num_flat_windows(num_rows, ctx, overlap)
    start_W = np.arange(num_train + num_val, dtype=np.int64) * (ctx - overlap)
    split_W = np.full(len(start_W), TRAIN, np.int8)
    shuffled = generator(seed, "flat windows").permutation(len(start_W))
    split_W[shuffled[num_train:]] = VAL
    return start_W, split_W


def runs(code_N: NDArray[np.integer]) -> tuple[IntArray, IntArray]:
    """Return first row and number of rows of each run of equal values."""
    borders = np.flatnonzero(np.diff(code_N)) + 1
    start = np.concatenate([[0], borders]).astype(np.int64)
    return start, np.diff(np.append(start, len(code_N)))
