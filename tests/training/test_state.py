"""Trainings that are killed anywhere go on to the very same end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvm.bank.bank import Bank
from lvm.models.weights import load_state
from lvm.training import checkpoint as state
from lvm.training.checkpoint import Progress, StateFile
from lvm.training.loop import TrainResult
from tests.training.dying_training import CHECKPOINT_STEPS, CONFIG
from tests.training.test_loop import assert_same, train_toy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(tiny_bank: Bank) -> TrainResult:
    return train_toy(tiny_bank, CONFIG)


@pytest.mark.parametrize(("event", "number"), [("read", 100), ("read", 600), ("write", 9)], ids=str)
def test_a_killed_run_ends_as_an_undisturbed_one(
    tiny_bank: Bank, undisturbed: TrainResult, tmp_path: Path, event: str, number: int
) -> None:
    state = tmp_path / "state"
    arguments = ["tests.training.dying_training", str(tiny_bank.path), str(state), event]
    killed = subprocess.run([sys.executable, "-m", *arguments, str(number)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    meta = load_state(state)[1]
    assert meta["losses"], "it died inside an epoch"
    assert (len(meta["history"]) > 0) == (number != 100)
    assert meta["step"] % CHECKPOINT_STEPS == 0
    assert len(list(tmp_path.iterdir())) == (2 if event == "write" else 1)
    seen: list[int] = []
    resumed = train_toy(
        tiny_bank,
        CONFIG,
        state_path=state,
        checkpoint_steps=CHECKPOINT_STEPS,
        on_epoch=lambda record: seen.append(int(record["epoch"])),
    )
    assert seen[0] == len(meta["history"]) + 1, "it goes on, it does not begin again"
    assert_same(undisturbed, resumed)
    assert [path.name for path in tmp_path.iterdir()] == ["state"], "a killed writer's file is left"


def test_the_killed_runs_have_hard_negatives(undisturbed: TrainResult) -> None:
    assert all(record["train/skipped_steps"] == 0 for record in undisturbed.history)
    assert [record["train/hard_positions"] > 0 for record in undisturbed.history] == [
        False,
        True,
        True,
    ]


def test_a_state_is_due_by_time_unless_steps_are_given(tmp_path: Path, monkeypatch) -> None:
    by_steps = StateFile(tmp_path / "state", "identity", every_steps=3)
    assert [by_steps.due(step) for step in range(1, 7)] == [False, False, True] * 2
    by_time = StateFile(tmp_path / "state", "identity")
    assert not by_time.due(1)
    monkeypatch.setattr(state, "CHECKPOINT_MINUTES", 0.0)
    assert by_time.due(1)
    by_time.write({"model": {"a.b": torch.ones(2)}}, Progress(step=1, losses=[0.1, float("nan")]))
    assert not StateFile(None, "identity").due(1)
    parts, progress = by_time.read()
    assert torch.equal(parts["model"]["a.b"], torch.ones(2))
    assert (progress.step, progress.best_score) == (1, float("-inf"))
    assert StateFile(tmp_path / "state", "another").read() is None


def test_a_living_writer_keeps_its_file(tmp_path: Path) -> None:
    other = tmp_path / f".state.{os.getppid()}"
    other.touch()
    StateFile(tmp_path / "state", "identity").write({}, Progress())
    assert other.is_file()
