"""Who competes for a query: one candidate a duplicate group, none that the context holds.

Shapes: Q queries, N bank rows, K candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from lvm.bank.store import Bank
from lvm.retrieval.search import IntArray
from lvm.windows.queries import ContextQueries, Queries


@dataclass(frozen=True)
class Competition:
    """Queries with the candidates they meet: the first row of each duplicate group.

    A group that lies wholly inside a query's context does not compete for it.
    """

    first_row_Q: IntArray
    target_row_Q: IntArray
    own_column_Q: IntArray  # the candidate that is the query's truth
    row_K: IntArray  # first row of each group, ascending
    last_row_K: IntArray
    covered_QK: sparse.csr_matrix | None  # for contexts that are no runs of rows

    @classmethod
    def of(cls, bank: Bank, queries: Queries, representative_N: IntArray) -> "Competition":
        row_N = np.arange(bank.num_rows)
        row_K = np.flatnonzero(representative_N == row_N)
        last_row_N = np.zeros(bank.num_rows, np.int64)
        last_row_N[representative_N] = row_N  # ascending, so the last assignment stays
        own_column_Q = np.searchsorted(row_K, representative_N[queries.target_row_Q])
        covered_QK = None
        if isinstance(queries, ContextQueries):
            covered_QK = queries.covered_groups(representative_N, row_K)
        return cls(
            queries.first_row_Q,
            queries.target_row_Q,
            own_column_Q,
            row_K,
            last_row_N[row_K],
            covered_QK,
        )

    def hidden(self, lines: slice, columns: slice) -> Tensor | None:
        """Return 1.0 where a group lies wholly inside a query's context, None where none does."""
        if self.covered_QK is not None:
            covered = self.covered_QK[lines, columns]
            return torch.from_numpy(covered.toarray()) if covered.nnz else None
        first_Q, target_Q = self.first_row_Q[lines], self.target_row_Q[lines]
        row_K, last_row_K = self.row_K[columns], self.last_row_K[columns]
        if row_K[-1] < first_Q.min() or row_K[0] >= target_Q[-1]:
            return None
        inside = (row_K >= first_Q[:, None]) & (last_row_K < target_Q[:, None])
        return torch.from_numpy(inside.astype(np.float32)) if inside.any() else None
