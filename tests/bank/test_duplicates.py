"""Tests of the duplicate groups against a brute-force search."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse.csgraph import connected_components

from lvm.bank.bank import Bank, write_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.system.seeding import generator


def brute_force_groups(bank: Bank, threshold: float) -> np.ndarray:
    """All cosines in float64, then connected components; the smallest row names the group."""
    vector_ND = bank.vectors.astype(np.float64)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    _, group_N = connected_components(vector_ND @ vector_ND.T >= threshold - 1e-6, directed=False)
    smallest = {group: row for row, group in reversed(list(enumerate(group_N)))}
    return np.array([smallest[group] for group in group_N])


def bank_of(path: Path, vector_ND: np.ndarray, dtype: str = "float32") -> Bank:
    rows = pd.DataFrame({"sequence": ["one"] * len(vector_ND)})
    return write_bank(path, vector_ND, rows, "synthetic", "test", dtype)


@pytest.mark.parametrize("threshold", [0.999, 0.99, 0.9])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_groups_equal_brute_force(tmp_path: Path, threshold: float, dtype: str) -> None:
    random = generator(1, "groups")
    centre_ND = random.standard_normal((60, 24))[random.integers(0, 60, 600)]
    noise_ND = random.standard_normal((600, 24)) * random.choice([0, 0.01, 0.05, 0.3], (600, 1))
    bank = bank_of(tmp_path / "bank", centre_ND + noise_ND, dtype)
    groups = duplicate_groups(bank, threshold)
    expected = brute_force_groups(bank, threshold)
    np.testing.assert_array_equal(groups, expected)
    np.testing.assert_array_equal(duplicate_groups(bank, threshold, slab_rows=37), expected)
    assert 2 < len(np.unique(groups)) < 600


def test_tiny_bank_has_its_twelve_pairs(tiny_bank: Bank) -> None:
    groups = duplicate_groups(tiny_bank)
    assert groups.dtype == np.int64
    assert np.sum(np.bincount(groups) == 2) == 12
    assert np.all(groups <= np.arange(tiny_bank.num_rows))
    np.testing.assert_array_equal(groups, brute_force_groups(tiny_bank, 0.999))


def test_many_byte_copies_are_one_group(tmp_path: Path) -> None:
    vector_ND = generator(2, "copies").standard_normal((5000, 16))
    vector_ND[1000:4000] = vector_ND[7]
    groups = duplicate_groups(bank_of(tmp_path / "bank", vector_ND))
    assert np.all(groups[1000:4000] == 7)
    assert len(np.unique(groups)) == 2000


def test_length_does_not_matter(tmp_path: Path) -> None:
    vector_ND = generator(3, "length").standard_normal((50, 12))
    vector_ND[40] = 3.7 * vector_ND[11]
    groups = duplicate_groups(bank_of(tmp_path / "bank", vector_ND), threshold=1.0)
    assert groups[40] == 11
    assert len(np.unique(groups)) == 49


def test_groups_are_transitive(tmp_path: Path) -> None:
    angle = np.deg2rad([0, 2, 4, 6, 90])
    bank = bank_of(tmp_path / "bank", np.stack([np.cos(angle), np.sin(angle)], axis=1))
    np.testing.assert_array_equal(duplicate_groups(bank), [0, 0, 0, 0, 4])


def test_one_row_is_its_own_group(tmp_path: Path) -> None:
    assert duplicate_groups(bank_of(tmp_path / "bank", np.ones((1, 3)))).tolist() == [0]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_threshold_out_of_range_is_refused(tiny_bank: Bank, threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        duplicate_groups(tiny_bank, threshold)
