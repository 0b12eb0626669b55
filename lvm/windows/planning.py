"""Windows with their frozen queries, as row numbers over a bank.

Shapes: N bank rows, W windows, Q queries.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.bank.duplicates import duplicate_groups
from lvm.bank.store import Bank
from lvm.system.seeding import generator
from lvm.windows.splits import (
    SPLITS,
    TRAIN,
    VAL,
    IntArray,
    SplitArray,
    flat_windows,
    runs,
    split_by_document,
    target_windows,
    train_windows,
)

SPLIT_KINDS = ("document", "random")


@dataclass(frozen=True, eq=False)
class Queries:
    """Rows to predict, each from up to `ctx` rows before it in its sequence; all arrays (Q,) int64.

    `query_Q` is the place in the frozen order; the context is rows [first_row, target_row).
    """

    query_Q: IntArray
    target_row_Q: IntArray
    first_row_Q: IntArray
    sequence_start_Q: IntArray
    ctx: int

    def __len__(self) -> int:
        return len(self.target_row_Q)

    def take(self, index: NDArray[np.integer] | slice) -> "Queries":
        """Return the queries at the places `index` of this set, in that order."""
        return Queries(
            self.query_Q[index],
            self.target_row_Q[index],
            self.first_row_Q[index],
            self.sequence_start_Q[index],
            self.ctx,
        )

    def head(self, num_queries: int) -> "Queries":
        """Return the first queries of the frozen order, all of them when there are fewer."""
        return self.take(slice(0, num_queries))

    def with_ctx(self, ctx: int) -> "Queries":
        """Return the same targets with contexts of up to `ctx` rows."""
        return make_queries(self.query_Q, self.target_row_Q, self.sequence_start_Q, ctx)

    def as_read(self, ctx: int) -> "Queries":
        """Return the same queries with the contexts that a predictor of `ctx` rows reads."""
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
class Windows:
    """The plan of one bank: splits, windows, duplicate groups, frozen queries.

    A window has `window_rows` consecutive inputs from `window_start`; position t is supervised by
    row start + t + 1. `representative_N` is the smallest row of each row's duplicate group. `leaky`
    plans (split=random) exist to show what the old geometry leaked. `folder` is where the plan was
    written to or read from; fits on its train rows are kept there.
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

    def train_windows(self) -> tuple[IntArray, NDArray[np.int32]]:
        """Return start and number of input rows of each train window."""
        chosen = self.window_split_W == TRAIN
        return self.window_start_W[chosen], self.window_rows_W[chosen]


def draft_windows(bank: Bank, ctx: int, overlap: int, split: str, seed: int) -> Windows:
    """Cut the windows of one split kind, not yet audited."""
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
    """Split by document; targets whose group has a train row are no queries, nor end a window."""
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
    """Shuffle overlapping windows of the flat rows; the val targets are the test queries too."""
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
    """Order the targets by a named generator, so that any head is a fair sample."""
    order = generator(seed, f"{name} queries").permutation(len(target_row_Q))
    number = np.arange(len(order), dtype=np.int64)
    return make_queries(number, target_row_Q[order], sequence_start_Q[order], ctx)


def contents_sha256(windows: Windows) -> str:
    """Return the identity of a plan: a hash of its settings with every array in it."""
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
