"""Directions come out right from vectors of any length that float16 or float32 hold.

Shapes: N bank rows, D vector dim, Q queries.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.corpus.ingest import row_names
from lvm.retrieval.exact import exact_ranks, top_rows
from lvm.retrieval.index import build_index
from lvm.system.seeding import generator
from lvm.training.config import TrainConfig
from lvm.windows.export import plan_windows
from tests import reference
from tests.training.test_loop import TOY, assert_same, train_toy

SMALLEST = np.finfo(np.float16).smallest_subnormal
NUM_ROWS = 1440


def scaled(bank: Bank, path: Path, factor_N: np.ndarray, dtype: str) -> Bank:
    vector_ND = (bank.vectors.astype(np.float64) * factor_N[:, None]).astype(dtype)
    return write_bank(path, vector_ND, row_names(bank), "e", "t", dtype)


def powers_of_two(low: int, high: int) -> np.ndarray:
    return 2.0 ** generator(0, "powers").integers(low, high, NUM_ROWS)


@pytest.fixture(scope="module")
def extreme(tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """The tiny bank in float16 at lengths from 5e-8, where few bits are left, to 2e5."""
    length_N = np.geomspace(5e-8, 2e5, NUM_ROWS)[generator(0, "lengths").permutation(NUM_ROWS)]
    highest_N = np.abs(tiny_bank.vectors.astype(np.float64)).max(axis=1)
    length_N = np.minimum(length_N, 65_000 / highest_N)
    vector_ND = (tiny_bank.vectors.astype(np.float64) * length_N[:, None]).astype(np.float16)
    vector_ND[~vector_ND.any(axis=1), 3] = SMALLEST
    path = tmp_path_factory.mktemp("extreme") / "bank"
    return write_bank(path, vector_ND, row_names(tiny_bank), "e", "t")


def exact_unit(bank: Bank) -> np.ndarray:
    vector_ND = bank.vectors.astype(np.float64)
    return vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)


def test_units_of_extreme_float16_rows_are_those_of_float64(extreme: Bank) -> None:
    length_N = np.linalg.norm(extreme.vectors.astype(np.float64), axis=1)
    assert length_N.min() < 2e-7 and length_N.max() > np.finfo(np.float16).max
    largest_N = np.abs(extreme.vectors).max(axis=1)
    assert (largest_N < np.finfo(np.float16).smallest_normal).sum() > 100, "wholly subnormal rows"
    np.testing.assert_allclose(extreme.unit(slice(None)), exact_unit(extreme), atol=2e-7)


def test_units_of_extreme_float32_rows_are_those_of_float64(tiny_bank: Bank, tmp_path) -> None:
    bank = scaled(tiny_bank, tmp_path / "bank", np.geomspace(2e-15, 5e14, NUM_ROWS), "float32")
    np.testing.assert_allclose(bank.unit(slice(None)), exact_unit(bank), atol=2e-7)


def test_ranks_and_passages_of_extreme_rows_are_those_of_float64(extreme: Bank) -> None:
    representative_N = duplicate_groups(extreme)
    queries = plan_windows(extreme, 20).queries["val"].head(60)
    noise_QD = generator(1, "noise").standard_normal((len(queries), extreme.dim))
    prediction_QD = extreme.unit(queries.target_row_Q) + 0.4 * noise_QD.astype(np.float32)
    (found,) = exact_ranks(prediction_QD, queries, extreme, representative_N)
    filtered, raw = reference.ranks(prediction_QD, queries, extreme, representative_N)
    np.testing.assert_array_equal(found.rank_Q, filtered)
    np.testing.assert_array_equal(found.rank_raw_Q, raw)
    index = build_index(extreme, lambda: prediction_QD)
    row_Qk, _ = index.search(prediction_QD, 5)
    unit_QD = prediction_QD / np.linalg.norm(prediction_QD, axis=1, keepdims=True)
    score_QN = unit_QD @ exact_unit(extreme).T
    score_QN[:, representative_N != np.arange(NUM_ROWS)] = -np.inf  # once from each group
    best_Qk = -np.sort(-score_QN, axis=1)[:, :5]
    np.testing.assert_allclose(np.take_along_axis(score_QN, row_Qk, axis=1), best_Qk, atol=1e-5)
    exact_row_Qk, _ = top_rows(prediction_QD, extreme, 5, representative_N=representative_N)
    chosen_Qk = np.take_along_axis(score_QN, exact_row_Qk, axis=1)
    np.testing.assert_allclose(chosen_Qk, best_Qk, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "low", "high"), [("float16", 0, 16), ("float32", -40, 40)])
def test_lengths_change_nothing_to_the_last_bit(
    tiny_bank: Bank, tmp_path: Path, dtype: str, low: int, high: int
) -> None:
    bank = scaled(tiny_bank, tmp_path / "bank", powers_of_two(low, high), dtype)
    np.testing.assert_array_equal(bank.unit(slice(None)), tiny_bank.unit(slice(None)))
    np.testing.assert_array_equal(duplicate_groups(bank), duplicate_groups(tiny_bank))
    config = TrainConfig(**(vars(TOY) | {"epochs": 2, "hard_negatives": 2, "hard_from": 0.0}))
    assert_same(train_toy(tiny_bank, config), train_toy(bank, config))


def test_float16_is_refused_where_it_would_lose_the_direction(tmp_path: Path) -> None:
    vector_ND = generator(0, "vectors").standard_normal((10, 16)).astype(np.float32)
    vector_ND[[4, 8]] *= 1e-7
    rows = pd.DataFrame({"sequence": ["a"] * 10})
    with pytest.raises(ValueError, match="float16 does not keep .* of 2 rows, first row 4"):
        write_bank(tmp_path / "bank", vector_ND, rows, "e", "t")
    assert not list(tmp_path.iterdir())
    kept = write_bank(tmp_path / "bank", vector_ND, rows, "e", "t", "float32")
    np.testing.assert_allclose(kept.unit(slice(None)), exact_unit(kept), atol=2e-7)


@pytest.mark.parametrize("factor", [1e-20, 1e-30, 1e18, 1e30])
def test_lengths_whose_squares_float32_does_not_hold_are_refused(tmp_path, factor: float) -> None:
    vector_ND = generator(0, "vectors").standard_normal((10, 16)).astype(np.float32)
    vector_ND[[4, 8]] *= np.float32(factor)
    rows = pd.DataFrame({"sequence": ["a"] * 10})
    message = "2 rows shorter than 1e-15 or longer than 1e+15 of 10, first row 4; divide"
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        write_bank(tmp_path / "bank", vector_ND, rows, "e", "t", "float32")
