"""One planted thing at a time, a tie, a twin, a zero vector, changes exactly what it must.

Query i lives in a plane of its own: nothing that stands in one plane can move another's rank.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.retrieval.exact import exact_ranks
from lvm.windows.planning import make_queries

NUM_QUERIES = 3
BETTER, TRUTH, WORSE = range(3)  # the rows of a plane, after its context row
HEIGHT = {BETTER: 0.95, TRUTH: 0.9, WORSE: 0.5}  # cosine to the prediction
PREDICTION_QD = np.eye(2 * NUM_QUERIES, dtype=np.float32)[::2]


def in_plane(plane: int, cosine: float, side: int = 1) -> np.ndarray:
    vector_D = np.zeros(2 * NUM_QUERIES)
    vector_D[2 * plane : 2 * plane + 2] = cosine, side * np.sqrt(1 - cosine**2)
    return vector_D


def row(plane: int, which: int) -> int:
    return 4 * plane + 1 + which


def plain_vectors() -> np.ndarray:
    """Four rows a plane: a context row pointing away, then the better, the truth, the worse."""
    rows = []
    for plane in range(NUM_QUERIES):
        rows += [in_plane(plane, -1.0), *(in_plane(plane, HEIGHT[x]) for x in HEIGHT)]
    return np.array(rows)


def made(path: Path, vector_ND: np.ndarray) -> Bank:
    rows = pd.DataFrame({"sequence": np.repeat([f"s{i}" for i in range(NUM_QUERIES)], 4)})
    return write_bank(path, vector_ND, rows, "hand", "test", "float32")


def ranks(bank: Bank, representative_N: np.ndarray, prediction_QD=PREDICTION_QD) -> list[float]:
    target_row_Q = np.array([row(plane, TRUTH) for plane in range(NUM_QUERIES)])
    start_Q = bank.sequence_start_N()[target_row_Q]
    queries = make_queries(np.arange(NUM_QUERIES), target_row_Q, start_Q, 1)
    return exact_ranks(prediction_QD, queries, bank, representative_N)[0].rank_raw_Q.tolist()


def ranks_of(path: Path, vector_ND: np.ndarray) -> list[float]:
    bank = made(path, vector_ND)
    return ranks(bank, duplicate_groups(bank))


def test_nothing_planted(tmp_path):
    assert ranks_of(tmp_path / "bank", plain_vectors()) == [2, 2, 2]


def test_a_tie_costs_half_a_rank_of_its_own_query(tmp_path):
    vectors = plain_vectors()
    vectors[row(0, WORSE)] = in_plane(0, HEIGHT[TRUTH], side=-1)
    assert ranks_of(tmp_path / "bank", vectors) == [2.5, 2, 2]


@pytest.mark.parametrize("which", [TRUTH, BETTER])
def test_a_twin_counts_once_with_its_group_and_twice_without(tmp_path, which):
    vectors = plain_vectors()
    vectors[row(1, WORSE)] = vectors[row(1, which)]
    bank = made(tmp_path / "bank", vectors)
    groups_N = duplicate_groups(bank)
    expected_N = np.arange(bank.num_rows)
    expected_N[row(1, WORSE)] = row(1, which)
    assert groups_N.tolist() == expected_N.tolist()
    assert ranks(bank, groups_N) == [2, 2, 2]
    alone = 2.5 if which == TRUTH else 3
    assert ranks(bank, np.arange(bank.num_rows)) == [2, alone, 2]


def test_a_near_twin_is_a_twin_only_from_the_threshold_on(tmp_path):
    for place, (cosine, expected) in enumerate([(0.9995, 2), (0.998, 3)]):
        vectors = plain_vectors()
        angle = np.arccos(HEIGHT[BETTER]) - np.arccos(cosine)
        vectors[row(2, WORSE)] = in_plane(2, float(np.cos(angle)))
        assert ranks_of(tmp_path / str(place), vectors) == [2, 2, expected]


def test_a_zero_vector_in_the_bank_is_refused_with_its_row(tmp_path):
    vectors = plain_vectors()
    vectors[row(1, WORSE)] = 0
    with pytest.raises(ValueError, match=f"1 .*{row(1, WORSE)}"):
        made(tmp_path / "bank", vectors)
    assert not (tmp_path / "bank").exists()


def test_a_zero_prediction_ties_with_everything_and_leaves_the_others(tmp_path):
    bank = made(tmp_path / "bank", plain_vectors())
    prediction_QD = PREDICTION_QD.copy()
    prediction_QD[2] = 0
    middle = (bank.num_rows + 1) / 2
    assert ranks(bank, duplicate_groups(bank), prediction_QD) == [2, 2, middle]
