"""Splits by document, windows and queries, as row numbers of a bank.

Shapes: N bank rows, W windows, Q queries, K duplicate groups. A window is a start row
with a number of input rows; the row after its last input is its last target.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lvm.bank.bank import Bank
from lvm.bank.duplicates import duplicate_groups
from lvm.system.seeding import generator

IntArray = NDArray[np.int64]
Rows = TypeVar("Rows", int, IntArray)
SplitArray = NDArray[np.int8]
SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
SHARES = (0.8, 0.1, 0.1)
MIN_DOCUMENTS = 10  # a sequence with fewer goes whole to one split
FLAT_VAL_SHARE = 0.1
SPLIT_KINDS = ("document", "random")


@dataclass(frozen=True, eq=False)
class Queries:
    """Rows to predict, each from up to `ctx` rows before it in its sequence; arrays (Q,) int64.

    `query_Q` is the position in the frozen order; the context is rows [first_row, target_row).
    """

    query_Q: IntArray
    target_row_Q: IntArray
    first_row_Q: IntArray
    sequence_start_Q: IntArray
    ctx: int

    def __len__(self) -> int:
        return len(self.target_row_Q)

    def take(self, index: NDArray[np.integer] | slice) -> "Queries":
        """Return the queries at the positions `index` of this set, in that order."""
        return Queries(
            self.query_Q[index],
            self.target_row_Q[index],
            self.first_row_Q[index],
            self.sequence_start_Q[index],
            self.ctx,
        )

    def head(self, num_queries: int) -> "Queries":
        """Return the first queries of the frozen order, or all if there are fewer."""
        return self.take(slice(0, num_queries))

    def with_ctx(self, ctx: int) -> "Queries":
        """Return the same targets with contexts of up to `ctx` rows."""
        return make_queries(self.query_Q, self.target_row_Q, self.sequence_start_Q, ctx)

    def as_read(self, ctx: int) -> "Queries":
        """Return the same queries with the contexts that a model of `ctx` rows reads."""
        return self.with_ctx(ctx)


def make_queries(
    query_Q: IntArray, target_row_Q: IntArray, sequence_start_Q: IntArray, ctx: int
) -> Queries:
    """Return queries whose contexts reach back up to `ctx` rows inside the sequence."""
    if ctx < 1:
        raise ValueError(f"ctx: {ctx} rows of context; at least 1 is needed")
    first_row_Q = np.maximum(sequence_start_Q, target_row_Q - ctx)
    return Queries(query_Q, target_row_Q, first_row_Q, sequence_start_Q, ctx)


@dataclass(frozen=True, eq=False)
class ContextQueries(Queries):
    """Rows to predict, each from a recorded context of any rows of the bank.

    `context_row_Q` (Q,) holds an int64 array of at least one row for each query, in reading order;
    `ctx` is the length of the longest. `first_row_Q` equals `target_row_Q`: the rows before the
    target are not the context.
    """

    context_row_Q: NDArray[Any]

    def take(self, index: NDArray[np.integer] | slice) -> "ContextQueries":
        """Return the queries at the positions `index` of this set, in that order."""
        return ContextQueries(
            self.query_Q[index],
            self.target_row_Q[index],
            self.first_row_Q[index],
            self.sequence_start_Q[index],
            self.ctx,
            self.context_row_Q[index],
        )

    def with_ctx(self, ctx: int) -> "ContextQueries":
        """Return the queries unchanged: a recorded context is neither cut nor extended."""
        return self

    def as_read(self, ctx: int) -> "ContextQueries":
        """Return the same queries, each with the rows of its context that are read, as served."""
        if ctx >= self.ctx:
            return self
        read_Q = as_objects([rows[first_read(len(rows), ctx) :] for rows in self.context_row_Q])
        return replace(self, ctx=ctx, context_row_Q=read_Q)

    def num_rows(self) -> NDArray[np.int64]:
        """Return the length of each context, (Q,)."""
        return np.array([len(rows) for rows in self.context_row_Q], np.int64)

    def covered_groups(
        self, representative_N: NDArray[np.int64], row_K: NDArray[np.int64]
    ) -> sparse.csr_matrix:
        """Return 1.0 where every row of a duplicate group is in a query's context, (Q, K).

        `row_K` are the first rows of the groups, ascending.
        """
        column_N = np.searchsorted(row_K, representative_N)
        size_K = np.bincount(column_N, minlength=len(row_K))
        covered = []
        for rows in self.context_row_Q:
            column, count = np.unique(column_N[np.unique(rows)], return_counts=True)
            covered.append(column[count == size_K[column]])
        bound_Q1 = np.cumsum([0, *map(len, covered)])
        column = np.concatenate([np.zeros(0, np.int64), *covered])
        ones = np.ones(len(column), np.float32)
        return sparse.csr_matrix((ones, column, bound_Q1), shape=(len(self), len(row_K)))


def first_read(num_rows: Rows, ctx: int) -> Rows:
    """Return the first row that is read of a context of `num_rows` rows, or of each of several.

    A context beyond ctx loses its oldest fifths of ctx, so that at least its last 0.8 ctx rows are
    read: a context that grows is read anew once in a fifth of ctx rows.
    """
    stride = max(1, ctx // 5)
    first: Rows = -((ctx - num_rows) // stride) * stride  # rounded up
    return first * (num_rows > ctx)


def context_queries(
    target_row_Q: NDArray[np.int64],
    sequence_start_Q: NDArray[np.int64],
    contexts: list[NDArray[np.int64]],
) -> ContextQueries:
    """Return the queries in the order given, numbered from 0."""
    return ContextQueries(
        np.arange(len(contexts), dtype=np.int64),
        target_row_Q,
        target_row_Q,
        sequence_start_Q,
        max(map(len, contexts), default=0),
        as_objects(contexts),
    )


def as_objects(contexts: list[NDArray[np.int64]]) -> NDArray[Any]:
    """Return an object array (Q,) of arrays of any lengths."""
    context_row_Q = np.empty(len(contexts), dtype=object)
    for place, rows in enumerate(contexts):
        context_row_Q[place] = rows  # np.array would make arrays of one length a table
    return context_row_Q


@dataclass(frozen=True, eq=False)
class Windows:
    """The plan of one bank: splits, windows, duplicate groups, frozen queries.

    A window has `window_rows` consecutive input rows from `window_start`; position t is supervised
    by row start + t + 1. `representative_N` is the smallest row of each row's duplicate group.
    `leaky` plans (split=random) reproduce the windows of the system that lvm replaces. `folder` is
    where the plan was written to or read from; fits on its train rows are cached there.
    """

    ctx: int
    overlap: int
    split: str
    seed: int
    bank_sha256: str
    leaky: bool
    split_N: SplitArray
    window_start_W: IntArray
    window_rows_W: NDArray[np.int32]
    window_split_W: SplitArray
    representative_N: IntArray
    queries: dict[str, Queries]
    counts: dict[str, int]
    audit: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    folder: Path | None = None

    def train_rows(self) -> IntArray:
        """Return the rows of the train split, ascending."""
        return np.flatnonzero(self.split_N == TRAIN)

    @property
    def num_train_rows(self) -> int:
        return int(np.count_nonzero(self.split_N == TRAIN))

    def train_windows(self) -> tuple[IntArray, NDArray[np.int32]]:
        """Return the start and the number of input rows of each train window, (W,) each."""
        chosen = self.window_split_W == TRAIN
        return self.window_start_W[chosen], self.window_rows_W[chosen]


def draft_windows(bank: Bank, ctx: int, overlap: int, split: str, seed: int) -> Windows:
    """Split rows, cut windows and freeze queries; the plan is not audited."""
    representative_N = duplicate_groups(bank)
    build = _document_arrays if split == "document" else _flat_arrays
    split_N, window_W3, queries, counts = build(bank, representative_N, ctx, overlap, seed)
    window_W3 = window_W3[np.lexsort((window_W3[:, 0], window_W3[:, 2]))]
    for code, name in enumerate(SPLITS):
        counts[f"{name}_rows"] = int((split_N == code).sum())
        counts[f"{name}_windows"] = int((window_W3[:, 2] == code).sum())
    group_size_N = np.bincount(representative_N, minlength=bank.num_rows)
    counts["duplicate_groups"] = int((group_size_N > 1).sum())
    counts["duplicate_rows"] = int(group_size_N[group_size_N > 1].sum())
    draft = Windows(
        ctx=ctx,
        overlap=overlap,
        split=split,
        seed=seed,
        bank_sha256=bank.sha256,
        leaky=split == "random",
        split_N=split_N,
        window_start_W=window_W3[:, 0].copy(),
        window_rows_W=window_W3[:, 1].astype(np.int32),
        window_split_W=window_W3[:, 2].astype(np.int8),
        representative_N=representative_N,
        queries=queries,
        counts=counts,
    )
    return dataclasses.replace(draft, sha256=contents_sha256(draft))


Arrays = tuple[SplitArray, IntArray, dict[str, Queries], dict[str, int]]


def _document_arrays(
    bank: Bank, representative_N: IntArray, ctx: int, overlap: int, seed: int
) -> Arrays:
    """Split by document; targets with a duplicate in train are dropped."""
    split_N = split_by_document(bank, seed)
    origin_N = bank.sequence_start_N()
    run_start, run_rows = runs(bank.sequence_N.astype(np.int64) * len(SPLITS) + split_N)
    run_split = split_N[run_start]
    in_train = run_split == TRAIN
    cut = train_windows(run_start[in_train], run_rows[in_train], ctx, overlap)
    pieces = [np.column_stack([cut, np.full(len(cut), TRAIN)])]
    group_in_train_N = np.zeros(bank.num_rows, bool)
    group_in_train_N[representative_N[split_N == TRAIN]] = True
    is_twin_N = group_in_train_N[representative_N]
    queries, counts = {}, {}
    for code, name in enumerate(SPLITS):
        if code == TRAIN:
            continue
        in_split = run_split == code
        start, rows = run_start[in_split], run_rows[in_split]
        cut = target_windows(start, rows, origin_N[start], ctx, overlap)
        cut = cut[~is_twin_N[cut[:, 0] + ctx]]
        pieces.append(np.column_stack([cut, np.full(len(cut), code)]))
        has_context_N = (split_N == code) & (np.arange(bank.num_rows) > origin_N)
        target_row_Q = np.flatnonzero(has_context_N & ~is_twin_N)
        queries[name] = _frozen_queries(name, target_row_Q, origin_N[target_row_Q], ctx, seed)
        counts[f"{name}_queries"] = len(target_row_Q)
        counts[f"{name}_dropped_twins"] = int((has_context_N & is_twin_N).sum())
    return split_N, np.concatenate(pieces), queries, counts


def _flat_arrays(
    bank: Bank, representative_N: IntArray, ctx: int, overlap: int, seed: int
) -> Arrays:
    """Shuffle overlapping windows of all rows; the val targets are the test queries too."""
    start_W, split_W = flat_windows(bank.num_rows, ctx, overlap, seed)
    window_W3 = np.column_stack([start_W, np.full(len(start_W), ctx), split_W])
    target_row_Q = start_W[split_W == VAL] + ctx
    split_N = np.full(bank.num_rows, TRAIN, np.int8)
    split_N[target_row_Q] = VAL
    queries = _frozen_queries("val", target_row_Q, np.zeros_like(target_row_Q), ctx, seed)
    counts = {f"{name}_{key}": 0 for name in SPLITS[1:] for key in ("queries", "dropped_twins")}
    counts["val_queries"] = counts["test_queries"] = len(queries)
    return split_N, window_W3, {"val": queries, "test": queries}, counts


def _frozen_queries(
    name: str, target_row_Q: IntArray, sequence_start_Q: IntArray, ctx: int, seed: int
) -> Queries:
    """Shuffle the targets by a named generator: the first n queries are a random sample."""
    order = generator(seed, f"{name} queries").permutation(len(target_row_Q))
    number = np.arange(len(order), dtype=np.int64)
    return make_queries(number, target_row_Q[order], sequence_start_Q[order], ctx)


def contents_sha256(windows: Windows) -> str:
    """Return the sha256 of a plan's settings and of every array in it."""
    fields = ("ctx", "overlap", "split", "seed", "bank_sha256")
    digest = hashlib.sha256(json.dumps([getattr(windows, f) for f in fields]).encode())
    arrays: list[NDArray[Any]] = [windows.split_N, windows.window_start_W, windows.window_rows_W]
    arrays += [windows.window_split_W, windows.representative_N]
    arrays += [windows.queries[name].target_row_Q for name in SPLITS[1:]]
    arrays += [windows.queries[name].sequence_start_Q for name in SPLITS[1:]]
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, "<i8").data)
    return digest.hexdigest()


def split_by_document(bank: Bank, seed: int) -> SplitArray:
    """Return the split of each row, (N,) int8 codes of SPLITS; a document is never divided.

    A sequence with MIN_DOCUMENTS documents or more gives its first 80 % to train, the next 10 % to
    val, the rest to test: each document goes where its middle row lies. Shorter sequences go whole,
    in an order drawn by `seed`, to the split that is furthest below its share of all rows. Pinned
    sequences go to train and do not affect the others, so that the sequences of a bank keep their
    splits when chains extend it.
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
    """Return one split per sequence; only those of short sequences are set."""
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
    """Cut runs of train rows into windows, (W, 2) start and number of input rows.

    Windows of `ctx` inputs start every ctx - overlap rows; the last one is aligned to the end of
    the run. A run shorter than ctx + 1 gives one shorter window, a run of one row gives none.
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
    """Return windows of `ctx` inputs with a target in the runs, (W, 2) as `train_windows`.

    Inputs may reach back to the start of the sequence.
    """
    pieces = [np.zeros((0, 2), np.int64)]
    for start, rows, origin in zip(run_start, run_rows, sequence_start, strict=True):
        target = np.arange(max(start, origin + ctx), start + rows, ctx - overlap)
        pieces.append(np.stack([target - ctx, np.full_like(target, ctx)], axis=1))
    return np.concatenate(pieces)


def num_flat_windows(num_rows: int, ctx: int, overlap: int) -> tuple[int, int]:
    """Return how many train and val windows split=random cuts."""
    total = max(0, num_rows - ctx - 1) // (ctx - overlap)
    num_val = int(FLAT_VAL_SHARE * total)
    return total - num_val, num_val


def flat_windows(num_rows: int, ctx: int, overlap: int, seed: int) -> tuple[IntArray, SplitArray]:
    """Cut all rows into overlapping windows across sequences, shuffled into train and val.

    The system that lvm replaces did this; split=random measures what it leaks. Returns the starts
    and the split codes of the windows, (W,) each.
    """
    num_train, num_val = num_flat_windows(num_rows, ctx, overlap)
    start_W = np.arange(num_train + num_val, dtype=np.int64) * (ctx - overlap)
    split_W = np.full(len(start_W), TRAIN, np.int8)
    shuffled = generator(seed, "flat windows").permutation(len(start_W))
    split_W[shuffled[num_train:]] = VAL
    return start_W, split_W


def runs(code_N: NDArray[np.integer]) -> tuple[IntArray, IntArray]:
    """Return the first row and the number of rows of each run of equal values."""
    borders = np.flatnonzero(np.diff(code_N)) + 1
    start = np.concatenate([[0], borders]).astype(np.int64)
    return start, np.diff(np.append(start, len(code_N)))
