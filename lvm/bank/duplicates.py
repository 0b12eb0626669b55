"""Groups of duplicate rows of a bank, found exactly.

Rows of equal bytes are grouped by their hashes: O(N log N) time, about 60 bytes a row. Of the rows
that are left, each pair of slabs of SLAB_ROWS rows is searched by itself, so that memory is that of
two slabs and of their near pairs; twice the rows took 2.5 times as long (drawn text). Processes
share the pairs of slabs. Shapes: N bank rows, U rows of different bytes, P pairs, D vector dim, E
dims of the projection.
"""

import hashlib
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lvm.bank.bank import Bank, FloatArray, SharedBank, share_rows
from lvm.bank.row_table import Integers
from lvm.system.progress import part
from lvm.system.seeding import generator

PROJECTION_DIMS = 8  # fastest of 4 to 32 on 120,000 text vectors: fewer pairs, yet a short search
SAMPLE_ROWS = 4096
BLOCK_PAIRS = 65536
SAME_SCORE = 0.999  # rows with at least this cosine are duplicates
SCORE_SLACK = 1e-6  # rounding of a float32 cosine
DISTANCE_SLACK = 1e-5  # rounding of a float32 projection
SLAB_ROWS = 2**19  # 150 MB in a k-d tree


@part("duplicates")
def duplicate_groups(
    bank: Bank, threshold: float = SAME_SCORE, slab_rows: int = SLAB_ROWS
) -> npt.NDArray[np.int64]:
    """Return for each row the smallest row of its duplicate group (itself if it has no duplicates).

    Rows with a cosine of at least `threshold` are in one group, as are rows joined by a chain of
    such rows. The search is exact: an orthonormal projection never lengthens a distance, so pairs
    near in the full space are near in the projected one, where a k-d tree finds them. Raises
    ValueError unless 0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: must be above 0 and at most 1")
    copy_N, first_U = _byte_copies(bank)
    task = _PairTask(
        SharedBank(bank), first_U, _principal_basis(bank, first_U), threshold, slab_rows
    )
    joined = np.concatenate(share_rows(bank, task))
    graph = coo_matrix(
        (np.ones(len(joined), dtype=bool), (joined[:, 0], joined[:, 1])), shape=(len(first_U),) * 2
    )
    _, group_U = connected_components(graph, directed=False)
    group_N = group_U[copy_N]
    _, smallest = np.unique(group_N, return_index=True)
    return smallest[group_N].astype(np.int64)


@part("twins of another bank")
def rows_with_twins(bank: Bank, row_Q: Integers, other: Bank, row_U: Integers) -> Integers:
    """Return those of the rows `row_Q` of `bank` that have a duplicate among `row_U` of `other`.

    A duplicate has a cosine of at least SAME_SCORE; the search is exact, as `duplicate_groups` is.
    """
    from scipy.spatial import cKDTree

    first_Q, first_U = _distinct(bank, row_Q), _distinct(other, row_U)
    if not len(first_Q) or not len(first_U):
        return row_Q[:0]
    basis_DE = _principal_basis(bank, first_Q)
    radius = np.sqrt(2 - 2 * SAME_SCORE) + DISTANCE_SLACK
    has_twin_N = np.zeros(bank.num_rows, dtype=bool)
    for start_Q in range(0, len(first_Q), SLAB_ROWS):
        own = first_Q[start_Q : start_Q + SLAB_ROWS]
        tree = cKDTree(_projected(bank, own, basis_DE))
        for start_U in range(0, len(first_U), SLAB_ROWS):
            theirs = first_U[start_U : start_U + SLAB_ROWS]
            rival = cKDTree(_projected(other, theirs, basis_DE))
            near = tree.sparse_distance_matrix(rival, radius, output_type="ndarray")
            pair_P2 = np.stack([own[near["i"]], theirs[near["j"]]], axis=1)
            is_twin_P = _pair_scores(bank, pair_P2, other) >= SAME_SCORE - SCORE_SLACK
            has_twin_N[pair_P2[is_twin_P, 0]] = True
    copy_N, first_C = _byte_copies(bank)
    has_twin_C = np.zeros(len(first_C), dtype=bool)
    has_twin_C[copy_N[has_twin_N]] = True
    return row_Q[has_twin_C[copy_N[row_Q]]]


def _distinct(bank: Bank, rows: Integers) -> Integers:
    """Return one of the rows of each content, ascending."""
    copy_N, _ = _byte_copies(bank)
    return np.sort(rows[np.unique(copy_N[rows], return_index=True)[1]])


def _projected(
    bank: Bank, rows: Integers, basis_DE: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return the projections (R, E) of the unit vectors of `rows`."""
    blocks = np.array_split(rows, len(rows) // SAMPLE_ROWS + 1)
    return np.concatenate([bank.unit(block) @ basis_DE for block in blocks])


def _byte_copies(bank: Bank) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number the rows by their stored bytes; return the numbers and the first row of each.

    Hundreds of copies of one sentence are common, and their pairs would grow quadratically.
    """
    digests = bytearray()
    for start in range(0, bank.num_rows, SAMPLE_ROWS):
        for vector in bank.vectors[start : start + SAMPLE_ROWS]:
            digests += hashlib.blake2b(vector, digest_size=16).digest()
    half_N2 = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order_N = np.lexsort(half_N2.T)  # stable: copies are in row order
    is_new_N = np.append(True, (np.diff(half_N2[order_N], axis=0) != 0).any(axis=1))
    first_N = np.empty(bank.num_rows, np.int64)
    first_N[order_N] = np.repeat(
        order_N[is_new_N], np.diff(np.flatnonzero(np.append(is_new_N, True)))
    )
    first_U, copy_N = np.unique(first_N, return_inverse=True)
    return copy_N.astype(np.int64), first_U


@dataclass(frozen=True)
class _PairTask:
    """The pairs of the rows `row_U` whose cosine reaches the threshold.

    The projected rows are sorted by their first coordinate and cut into slabs. Only two slabs at a
    time are in k-d trees; pairs of distant slabs end at the roots of these.
    """

    bank: SharedBank
    row_U: Integers
    basis_DE: FloatArray
    threshold: float
    slab_rows: int

    def run(self, rank: int, size: int) -> npt.NDArray[np.int64]:
        """Return the pairs (P, 2), as positions in `row_U`, of every `size`-th pair of slabs."""
        # Imported here: it takes 0.2 s, and most processes read the groups from disk.
        from scipy.spatial import cKDTree

        bank = self.bank.bank
        point_UE = _projected(bank, self.row_U, self.basis_DE)
        order_U = np.argsort(point_UE[:, 0], kind="stable")
        slabs = np.array_split(order_U, -(-len(order_U) // self.slab_rows))
        radius = np.sqrt(2 - 2 * self.threshold) + DISTANCE_SLACK
        found = [np.empty((0, 2), np.int64)]
        for left, right in list(combinations_with_replacement(slabs, 2))[rank::size]:
            tree = cKDTree(point_UE[left])
            if left is right:
                pair_P2 = left[tree.query_pairs(radius, output_type="ndarray")]
            elif point_UE[right[0], 0] - point_UE[left[-1], 0] > radius:
                continue
            else:
                near = tree.sparse_distance_matrix(
                    cKDTree(point_UE[right]), radius, output_type="ndarray"
                )
                pair_P2 = np.stack([left[near["i"]], right[near["j"]]], axis=1)
            score_P = _pair_scores(bank, self.row_U[pair_P2])
            found.append(pair_P2[score_P >= self.threshold - SCORE_SLACK])
        return np.concatenate(found)


def _principal_basis(bank: Bank, row_U: Integers) -> npt.NDArray[np.float32]:
    """Return orthonormal columns (D, E) along which a sample of the rows varies most."""
    random = generator(0, "duplicates")
    sample = random.choice(row_U, min(SAMPLE_ROWS, len(row_U)), replace=False)
    unit_SD = bank.unit(np.sort(sample)).astype(np.float64)
    centred_SD = unit_SD - unit_SD.mean(axis=0)
    _, vector_DD = np.linalg.eigh(centred_SD.T @ centred_SD)
    return vector_DD[:, ::-1][:, :PROJECTION_DIMS].astype(np.float32)


def _pair_scores(
    bank: Bank, pair_P2: Integers, other: Bank | None = None
) -> npt.NDArray[np.float32]:
    """Return the cosine of each pair of rows; the second rows are those of `other`, if given."""
    score_P = np.empty(len(pair_P2), dtype=np.float32)
    for start in range(0, len(pair_P2), BLOCK_PAIRS):
        block = slice(start, start + BLOCK_PAIRS)
        left_PD, right_PD = bank.unit(pair_P2[block, 0]), (other or bank).unit(pair_P2[block, 1])
        score_P[block] = np.einsum("pd,pd->p", left_PD, right_PD)
    return score_P
