"""The audit of a bank's answers for twins among the train rows of another bank."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.system.seeding import generator
from lvm.windows.export import plan_windows
from lvm.windows.origins import Origin, as_text, from_text, marked_rows
from lvm.windows.planning import TRAIN
from tests.synthetic import make_bank


@pytest.fixture(scope="module")
def banks(tmp_path_factory) -> tuple[Bank, Bank]:
    """Two drawn banks; 200 rows of the second are rows of the first, stored at another length."""
    root = tmp_path_factory.mktemp("origins")
    first = make_bank(root / "first")
    own = make_bank(root / "drawn", seed=1)
    vector_ND = np.array(own.vectors, np.float32)
    own_row, first_row = generator(0, "twins").permutation(own.num_rows)[:400].reshape(2, -1)
    vector_ND[own_row] = 0.5 * first.vectors[first_row].astype(np.float32)
    rows = pd.read_parquet(own.path / "rows.parquet")
    return first, write_bank(root / "second", vector_ND, rows, "synthetic")


def origin_of(other: Bank, **changed) -> Origin:
    return dataclasses.replace(Origin(str(other.path), other.sha256, 0, False), **changed)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_twins_are_those_of_a_search_by_pairs(banks, is_swapped):
    bank, other = reversed(banks) if is_swapped else banks
    windows, theirs = plan_windows(bank, 20), plan_windows(other, 20)
    score_NN = bank.unit(slice(None)) @ other.unit(theirs.train_rows()).T
    groups = windows.representative_N[(score_NN >= 0.999).any(axis=1)]
    is_answer_N = windows.split_N != TRAIN
    expected = np.flatnonzero(is_answer_N & np.isin(windows.representative_N, groups))
    assert len(expected) > 0
    assert marked_rows(bank, windows, [origin_of(other)]).tolist() == expected.tolist()


def test_every_row_of_a_leaky_training_counts(banks):
    bank, other = banks
    windows = plan_windows(bank, 20)
    few = marked_rows(bank, windows, [origin_of(other)])
    many = marked_rows(bank, windows, [origin_of(other, leaky=True)])
    assert set(few) < set(many)


def test_all_banks_of_a_chain_are_searched(banks, tmp_path):
    bank, other = banks
    apart = make_bank(tmp_path / "apart", seed=2)
    windows = plan_windows(bank, 20)
    assert len(marked_rows(bank, windows, [origin_of(apart)])) == 0
    chain = from_text(as_text([origin_of(other), origin_of(apart)]))
    assert len(marked_rows(bank, windows, chain)) == len(
        marked_rows(bank, windows, [origin_of(other)])
    )
    assert (as_text([]), from_text("")) == ("", ())


def test_a_bank_that_cannot_be_compared_is_refused(banks, tmp_path):
    bank, other = banks
    narrow = make_bank(tmp_path / "narrow", dim=8)
    vectors, rows = np.array(other.vectors), pd.read_parquet(other.path / "rows.parquet")
    foreign = write_bank(tmp_path / "foreign", vectors, rows, "another")
    reasons = {
        origin_of(other, bank=str(tmp_path / "lost")): "does not exist; put bank",
        origin_of(other, sha256="0" * 64): "is now .*; put bank 000000000000 back",
        origin_of(narrow): "has 8 dims .*; give a model of the same known encoder",
        origin_of(foreign): "of encoder another, .*; give a model of the same known encoder",
    }
    for origin, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as caught:
            marked_rows(bank, plan_windows(bank, 20), [origin])
        assert "\n" not in str(caught.value)
