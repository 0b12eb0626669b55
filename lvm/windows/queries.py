"""Queries: rows to predict, with frozen contexts or with contexts recorded in a query log.

Shapes: N bank rows, K duplicate groups, Q queries.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

IntArray = NDArray[np.int64]


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
        """Return the same queries with contexts cut to their last `ctx` rows, as served."""
        if ctx >= self.ctx:
            return self
        read_Q = as_objects([rows[-ctx:] for rows in self.context_row_Q])
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
