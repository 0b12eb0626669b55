"""Hard negatives against a search by hand.

Shapes: D vector dim, H hard negatives of a position, T time, C positions that have some.
"""

import numpy as np
import pytest
import torch

from lvm.bank.bank import Bank
from lvm.models.table import build_model
from lvm.system.distributed import World
from lvm.system.seeding import generator
from lvm.training import data
from lvm.training.config import HARD_DEPTH
from lvm.training.data import NONE, POSITIVE_SHARE, Batches, HardNegatives
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows

pytestmark = pytest.mark.slow

COUNT = 3


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 20)


@pytest.fixture(scope="module")
def batches(tiny_bank: Bank, windows: Windows) -> Batches:
    return Batches(tiny_bank, windows, 4, 0)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build_model({"model": "memory_gru", "dim": 16, "hidden": 8, "chunk": 5})
        torch.nn.init.normal_(built.project_out.weight, std=0.1)
    return built.train()


def mined(tiny_bank, windows, batches, model, count: int = COUNT, first: int = 0) -> HardNegatives:
    hard = HardNegatives(tiny_bank, windows.representative_N, batches, count)
    hard.mine(model, batches.upcoming(1, first), generator(0, "test"), World())
    return hard


def by_hand(bank: Bank, windows: Windows, model, start: int, num_rows: int) -> list[list[int]]:
    """Return the competitors of each position of a window, the best first."""
    with torch.no_grad():
        context_TD = torch.from_numpy(bank.unit(slice(start, start + num_rows)))
        prediction_TD = model.eval()(context_TD[None])[0].numpy()
    model.train()
    found = []
    first_of_group: dict[int, int] = {}
    for row in windows.train_rows():
        first_of_group.setdefault(int(windows.representative_N[row]), int(row))
    for step, prediction_D in enumerate(prediction_TD):
        target = start + step + 1
        score = {row: float(bank.unit(row) @ prediction_D) for row in first_of_group.values()}
        nearest = sorted(score, key=lambda row: -score[row])[:HARD_DEPTH]  # noqa: B023
        truth = float(bank.unit(target) @ prediction_D)
        found.append(
            [
                row
                for row in nearest
                if windows.representative_N[row] != windows.representative_N[target]
                and not start <= row < target
                and score[row] < POSITIVE_SHARE * truth
            ][:COUNT]
        )
    return found


def test_the_mined_rows_are_those_found_by_hand(tiny_bank, windows, batches, model, monkeypatch):
    monkeypatch.setattr(data, "ROW_BLOCK", 256)
    monkeypatch.setattr(data, "POSITION_BLOCK", 7)
    hard = mined(tiny_bank, windows, batches, model)
    assert model.training
    batch = next(batches.epoch(1))
    own = hard.of_batch(batch)
    position, lacking = 0, 0
    negatives = zip(own.vector_CHD, own.real_CH, strict=True)
    by_position = dict(zip(own.place_C.tolist(), negatives, strict=True))
    for window in batch.window_B:
        for expected in by_hand(tiny_bank, windows, model, *batches.extent(window)):
            vector_HD, real_H = by_position.get(position, (torch.empty(0, 16), torch.empty(0)))
            assert int(real_H.sum()) == len(expected)
            unit_HD = torch.from_numpy(tiny_bank.unit(np.array(expected, dtype=np.int64)))
            assert torch.equal(vector_HD[: len(expected)], unit_HD)
            position, lacking = position + 1, lacking + (len(expected) < COUNT)
    assert position == int(batch.real_BT.sum())
    assert 0 < lacking < position


def test_only_windows_to_come_of_a_bounded_sample_are_searched(
    tiny_bank, windows, batches, model, monkeypatch
):
    hard = mined(tiny_bank, windows, batches, model, first=5)
    coming = set(batches.upcoming(1, 5).tolist())
    assert set(hard.state_dict()["window"].tolist()) == coming
    monkeypatch.setattr(data, "SAMPLE_POSITIONS", 50)
    few = mined(tiny_bank, windows, batches, model).state_dict()
    assert 50 <= len(few["row"]) < 50 + windows.ctx
    assert torch.equal(few["row"], mined(tiny_bank, windows, batches, model).state_dict()["row"])


def test_a_state_brings_the_rows_back(tiny_bank, windows, batches, model):
    hard = mined(tiny_bank, windows, batches, model)
    other = HardNegatives(tiny_bank, windows.representative_N, batches, COUNT)
    assert other.of_batch(next(batches.epoch(1))) is None
    other.load_state_dict(hard.state_dict())
    for batch in batches.epoch(1):
        first, second = hard.of_batch(batch), other.of_batch(batch)
        assert torch.equal(first.vector_CHD, second.vector_CHD)
        assert torch.equal(first.real_CH, second.real_CH)
    assert other.num_positions() == hard.num_positions() > 0
    other.load_state_dict({})
    assert other.num_positions() == 0


def test_held_out_rows_are_never_read(tiny_bank, windows, batches, model):
    vectors = tiny_bank.vectors.copy()
    vectors[np.setdiff1d(np.arange(tiny_bank.num_rows), windows.train_rows())] = np.nan
    blind = Bank(**(vars(tiny_bank) | {"vectors": vectors}))
    rows = mined(blind, windows, Batches(blind, windows, 4, 0), model).state_dict()["row"]
    assert torch.equal(rows, mined(tiny_bank, windows, batches, model).state_dict()["row"])
    assert set(rows[rows != NONE].tolist()) <= set(windows.train_rows().tolist())
