"""Queries whose contexts are any rows of the bank, as a query log records them.

Shapes: N bank rows, K duplicate groups, Q queries.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lvm.windows.planning import Queries


@dataclass(frozen=True, eq=False)
class ContextQueries(Queries):
    """Rows to predict, each from the rows of its own context, wherever they lie.

    `context_row_Q` (Q,) holds an int64 array of 1 ... any number of rows, in reading order, for
    each query; `ctx` is the length of the longest. `first_row_Q` equals `target_row_Q`: no run of
    rows before the target belongs to the context as such.
    """

    context_row_Q: NDArray[Any]

    def take(self, index: NDArray[np.integer] | slice) -> "ContextQueries":
        """Return the queries at the places `index` of this set, in that order."""
        return ContextQueries(
            self.query_Q[index],
            self.target_row_Q[index],
            self.first_row_Q[index],
            self.sequence_start_Q[index],
            self.ctx,
            self.context_row_Q[index],
        )

    def with_ctx(self, ctx: int) -> "ContextQueries":
        """Return these very queries: a recorded context is neither cut nor extended."""
        return self

    def as_read(self, ctx: int) -> "ContextQueries":
        """Return the same queries with the last `ctx` rows of longer contexts, as served."""
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
    """Return an array (Q,) of arrays, whatever their lengths."""
    context_row_Q = np.empty(len(contexts), dtype=object)
    for place, rows in enumerate(contexts):
        context_row_Q[place] = rows  # numpy would make a table of equal lengths
    return context_row_Q
