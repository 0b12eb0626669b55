"""Cells train the steps that were asked for, whatever their fraction of the data."""

from dataclasses import replace
from pathlib import Path

import pytest

from lvm.bank.bank import Bank
from lvm.studies.scaling_cells import Cell, Trainer, divide_queries
from lvm.training.config import TrainConfig
from lvm.training.data import Batches
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows
from tests.synthetic import make_bank

CTX, STEPS = 20, 80
CONFIG = TrainConfig(
    model="res_mlp", layers=2, dropout=0.0, batch_size=4, negatives=16, precision="fp32"
)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> Bank:
    """A bank of documents of just under two windows, each a block of its own."""
    folder = tmp_path_factory.mktemp("blocks")
    return make_bank(folder / "bank", num_sequences=1, num_documents=40, document_rows=36)


@pytest.fixture(scope="module")
def windows(bank) -> Windows:
    return plan_windows(bank, CTX)


def trainer(bank: Bank, windows: Windows, folder: Path, **changes) -> Trainer:
    queries = divide_queries(bank, windows, 0.25, 50)
    return Trainer(bank, windows, queries, replace(CONFIG, **changes), folder)


def test_a_part_of_many_short_blocks_trains_exactly_its_steps(bank, windows, tmp_path):
    result = trainer(bank, windows, tmp_path).result(Cell(0.25, 4, 0, STEPS, 1e-3))
    assert result.steps == STEPS


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("steps", [1, STEPS, 120, 601])
def test_a_cell_has_the_epochs_that_its_steps_need(bank, windows, tmp_path, steps, accumulation):
    one = trainer(bank, windows, tmp_path, accumulation=accumulation)
    for fraction in (0.125, 0.25, 0.5, 1.0):
        part, epochs = one._part(Cell(fraction, 4, 0, steps, 1e-3))
        batches = Batches(bank, part, CONFIG.batch_size, CONFIG.seed)
        done = [-(-batches.num_batches(epoch) // accumulation) for epoch in range(1, epochs + 1)]
        assert sum(done[:-1]) < steps <= sum(done)


def test_rounds_of_a_small_part_are_alike(bank, windows, tmp_path):
    one = trainer(bank, windows, tmp_path)
    part, _ = one._part(Cell(0.25, 4, 0, STEPS, 1e-3))
    batches = Batches(bank, part, CONFIG.batch_size, CONFIG.seed)
    lengths = [batches.num_batches(epoch) for epoch in range(1, 9)]
    assert max(lengths) - min(lengths) <= 1
    whole = one.steps_per_epoch()
    assert abs(sum(lengths) / 8 / whole - round(STEPS / 8 / whole)) < 0.1


def test_a_cell_that_trained_fewer_steps_is_not_kept(bank, windows, tmp_path, monkeypatch):
    short, cell = trainer(bank, windows, tmp_path), Cell(0.25, 4, 0, STEPS, 1e-3)
    part, _ = short._part(cell)
    monkeypatch.setattr(short, "_part", lambda cell: (part, 1))
    with pytest.raises(RuntimeError, match="not 80"):
        short.result(cell)
    assert not [path for path in tmp_path.iterdir() if "state" not in path.name]
