"""Groups of bank rows that say the same thing: cosine at or above a threshold, transitively.

Shapes: N bank rows, U rows without byte-identical copies, P candidate pairs, D vector dim,
E dims of the projection.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lvm.bank.row_table import IntArray
from lvm.bank.store import Bank
from lvm.system.seeding import generator

PROJECTION_DIMS = 8  # fastest of 4 to 32 on 120,000 text vectors: fewer pairs, yet a short search
SAMPLE_ROWS = 4096
BLOCK_PAIRS = 65536
SAME_SCORE = 0.999  # rows with such a cosine say the same thing
SCORE_SLACK = 1e-6  # rounding of a float32 cosine
DISTANCE_SLACK = 1e-5  # rounding of a float32 projection


def duplicate_groups(bank: Bank, threshold: float = SAME_SCORE) -> npt.NDArray[np.int64]:
    """Return for each row the smallest row of its duplicate group, itself where it is alone.

    Rows with a cosine of at least `threshold` are in one group, as are rows joined by a chain of
    such rows. The search is exact: an orthonormal projection never lengthens a distance, so pairs
    near in the full space are near in the projected one, where a k-d tree finds them. Raises
    ValueError unless 0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: must be above 0 and at most 1")
    copy_N, first_U = _byte_copies(bank)
    pairs_P2 = _near_pairs(bank, first_U, threshold)
    score_P = _pair_scores(bank, first_U[pairs_P2])
    joined = pairs_P2[score_P >= threshold - SCORE_SLACK]
    graph = coo_matrix(
        (np.ones(len(joined), dtype=bool), (joined[:, 0], joined[:, 1])), shape=(len(first_U),) * 2
    )
    _, group_U = connected_components(graph, directed=False)
    group_N = group_U[copy_N]
    _, smallest = np.unique(group_N, return_index=True)
    return smallest[group_N].astype(np.int64)


def _byte_copies(bank: Bank) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Code each row by its stored bytes; return the codes and the first row of each code.

    Hundreds of copies of one sentence are common; left apart they would be quadratic in pairs.
    """
    digests = [hashlib.blake2b(vector, digest_size=16).digest() for vector in bank.vectors]
    copy_N, _ = pd.factorize(np.array(digests, dtype="V16").astype(object))
    _, first_U = np.unique(copy_N, return_index=True)
    return copy_N.astype(np.int64), first_U.astype(np.int64)


def _near_pairs(bank: Bank, row_U: IntArray, threshold: float) -> npt.NDArray[np.int64]:
    """Pairs (P, 2) of positions in `row_U` that can have a cosine of `threshold`, none missed."""
    # Here, because most processes read groups that were written; loading it takes 0.2 s.
    from scipy.spatial import cKDTree

    basis_DE = _principal_basis(bank, row_U)
    blocks = np.array_split(row_U, len(row_U) // SAMPLE_ROWS + 1)
    point_UE = np.concatenate([bank.unit(block) @ basis_DE for block in blocks])
    radius = np.sqrt(2 - 2 * threshold) + DISTANCE_SLACK
    return cKDTree(point_UE).query_pairs(radius, output_type="ndarray")


def _principal_basis(bank: Bank, row_U: IntArray) -> npt.NDArray[np.float32]:
    """Orthonormal columns (D, E) along which a sample of the rows varies most."""
    random = generator(0, "duplicates")
    sample = random.choice(row_U, min(SAMPLE_ROWS, len(row_U)), replace=False)
    unit_SD = bank.unit(np.sort(sample)).astype(np.float64)
    centred_SD = unit_SD - unit_SD.mean(axis=0)
    _, vector_DD = np.linalg.eigh(centred_SD.T @ centred_SD)
    return vector_DD[:, ::-1][:, :PROJECTION_DIMS].astype(np.float32)


def _pair_scores(bank: Bank, pair_P2: IntArray) -> npt.NDArray[np.float32]:
    """Cosine of each pair of rows."""
    score_P = np.empty(len(pair_P2), dtype=np.float32)
    for start in range(0, len(pair_P2), BLOCK_PAIRS):
        block = slice(start, start + BLOCK_PAIRS)
        left_PD, right_PD = bank.unit(pair_P2[block, 0]), bank.unit(pair_P2[block, 1])
        score_P[block] = np.einsum("pd,pd->p", left_PD, right_PD)
    return score_P
