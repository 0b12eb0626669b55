"""Batches of windows of many lengths.

Shapes: W windows, R runs of train rows, E epochs.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.training.config import TrainConfig, resolve
from lvm.training.data import Batches
from lvm.training.optimizer import plan_training
from lvm.windows.export import plan_windows
from lvm.windows.planning import TRAIN, Windows, train_windows

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


def batches_over(
    chained: tuple[Bank, Windows], rows_R: list[int], ctx: int, overlap: int, repeats: int = 1
) -> Batches:
    """Return the batches of runs of so many rows, one behind the other from row 0 on."""
    bank, windows = chained
    begin_R = np.cumsum([0, *rows_R[:-1]])
    cut_W2 = np.tile(train_windows(begin_R, np.array(rows_R), ctx, overlap), (repeats, 1))
    windows = replace(
        windows,
        ctx=ctx,
        overlap=overlap,
        window_start_W=cut_W2[:, 0],
        window_rows_W=cut_W2[:, 1].astype(np.int32),
        window_split_W=np.full(len(cut_W2), TRAIN, np.int8),
    )
    return Batches(bank, windows, 2, 0)


def read_by_run(batches: Batches, rows_R: list[int]) -> np.ndarray:
    """Return the positions (E, R) that 60 epochs read of each run."""
    read_ER = np.zeros((60, len(rows_R)), int)
    for epoch in range(1, 61):
        for start, rows in map(batches.extent, batches.upcoming(epoch)):
            read_ER[epoch - 1, np.searchsorted(np.cumsum(rows_R), start, side="right")] += rows
    return read_ER


def rows_of(num_windows: int, overlap: int) -> int:
    """Return the rows of a run that is cut to so many windows, the last one aligned to its end."""
    return CTX + 1 + (num_windows - 2) * (CTX - overlap) + (CTX - overlap) // 3


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


@pytest.mark.parametrize("overlap", [30, 50, 75, 90])
@pytest.mark.parametrize("num_windows", range(2, 10))
def test_runs_of_any_length_are_read_about_once_an_epoch(chained, num_windows, overlap):
    rows_R = [rows_of(num_windows, overlap)] * 5
    batches = batches_over(chained, rows_R, CTX, overlap)
    read_ER = read_by_run(batches, rows_R)
    assert 0.6 < read_ER.mean() / (rows_R[0] - 1) <= 1
    assert np.ptp(read_ER.sum(axis=1)) <= CTX, "epochs differ by one window at most"
    assert np.ptp(read_ER, axis=0).max() <= CTX, "so do those of each run"
    read_W = np.bincount(np.concatenate([batches.upcoming(epoch) for epoch in range(1, 61)]))
    assert len(read_W) == 5 * num_windows and np.ptp(read_W) == 0, "all windows as often"


@pytest.mark.parametrize("num_windows", range(2, 10))
def test_without_overlap_every_epoch_reads_every_window(chained, num_windows):
    batches = batches_over(chained, [rows_of(num_windows, 0)] * 2, CTX, 0)
    for epoch in (1, 2):
        assert sorted(batches.upcoming(epoch)) == list(range(2 * num_windows))


def test_runs_of_different_lengths_are_read_alike(chained):
    rows_R = [1001, 1101, 1700, 1850, 2000]
    read_ER = read_by_run(batches_over(chained, rows_R, 1000, 900), rows_R)
    share_R = read_ER.mean(axis=0) / (np.array(rows_R) - 1)
    assert share_R.min() > 0.85 and share_R.max() <= 1
    assert read_ER.sum(axis=1).max() < 1.5 * read_ER.sum(axis=1).mean()


def test_the_plan_speaks_for_all_epochs(chained):
    batches = batches_over(chained, [rows_of(5, 50)], CTX, 50)
    assert [batches.num_batches(epoch) for epoch in range(1, 5)] == [2, 1, 2, 1]
    settings = resolve(TrainConfig(batch_size=2, epochs=10, max_steps=12, accumulation=1), CTX)
    plan = plan_training(batches, settings)
    assert (plan.epochs, plan.steps, plan.steps_per_epoch) == (8, 12, 2)
    assert plan.examples_per_epoch == 2.5 * CTX


@pytest.mark.parametrize("overlap", [50, 75])
def test_repeated_windows_take_turns_as_those_of_other_runs_do(chained, overlap):
    rows = rows_of(3, overlap)
    read = [
        [batches.num_positions(epoch) for epoch in range(1, 5)]
        for batches in (
            batches_over(chained, [rows] * 4, CTX, overlap),
            batches_over(chained, [rows], CTX, overlap, repeats=4),
        )
    ]
    assert read[0] == read[1] and len(set(read[0])) == 1
