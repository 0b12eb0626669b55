"""Batches of windows of many lengths."""

import numpy as np
import pandas as pd
import pytest

from lvm.bank.store import Bank, write_bank
from lvm.training.batches import Batches
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows

CTX, CHAINS, CHAIN_ROWS = 100, 300, 11


@pytest.fixture(scope="module")
def chained(tmp_path_factory) -> tuple[Bank, Windows]:
    """A bank of four long sequences behind which short pinned ones stand."""
    lengths = [1500] * 4 + [CHAIN_ROWS] * CHAINS
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    rows = pd.DataFrame(
        {
            "sequence": [f"s{code}" for code in sequence],
            "document": [f"d{number // 50}" for number in place],
            "split": np.where(sequence < 4, None, "train"),
        }
    )
    vectors = np.random.default_rng(0).standard_normal((len(rows), 8))
    bank = write_bank(tmp_path_factory.mktemp("chained") / "bank", vectors, rows, "random", "test")
    return bank, plan_windows(bank, CTX)


def test_short_windows_fill_batches_of_their_own(chained):
    bank, windows = chained
    batches = Batches(bank, windows, 2, 0)
    found = list(batches.epoch(1))
    assert len(found) == batches.num_batches(1)
    chosen = np.concatenate([batch.window_B for batch in found])
    assert len(np.unique(chosen)) == len(chosen) == batches.num_windows(1)
    assert np.array_equal(chosen, batches.upcoming(1))
    real = np.array([int(batch.real_BT.sum()) for batch in found])
    held = np.array([batch.real_BT.numel() for batch in found])
    assert (real > 0.5 * held).all() and held.max() <= 2 * CTX
    is_chain = np.array([batch.real_BT.shape[1] < 20 for batch in found])
    assert is_chain.sum() == -(-CHAINS // 16), "16 of 10 inputs are nearest below 2 of 100"
    assert real[is_chain][:-1].min() > 0.7 * real[~is_chain].max()


def test_batches_of_both_kinds_are_mixed(chained):
    lengths = [batch.real_BT.shape[1] for batch in Batches(*chained, 2, 0).epoch(1)]
    is_short = np.array(lengths) < 20
    assert 0 < is_short[: len(lengths) // 2].mean() < 1 and 0 < is_short.mean() < 1


def test_windows_of_one_length_are_taken_in_their_drawn_order(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, 20)
    assert len(set(windows.train_windows()[1].tolist())) == 1
    batches = Batches(tiny_bank, windows, 4, 0)
    drawn = batches.upcoming(1)
    assert [batch.window_B.tolist() for batch in batches.epoch(1)] == [
        drawn[begin : begin + 4].tolist() for begin in range(0, len(drawn), 4)
    ]
