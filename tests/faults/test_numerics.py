"""NaN, infinite values, loss spikes in real trainings: none reaches what a training leaves."""

import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor

from entrypoints import train as train_command
from lvm.bank.bank import Bank
from lvm.models.weights import load_state
from lvm.system.seeding import generator
from lvm.training.config import TrainConfig
from lvm.training.guard import all_finite
from lvm.training.loop import TrainResult, train
from lvm.training.optimizer import Supervised
from lvm.windows.export import plan_windows
from tests.conftest import copy_store
from tests.faults.breakage import (
    Optimizer,
    after_steps,
    at_losses,
    before_every_step,
    scramble,
    weights_of,
)
from tests.synthetic import make_bank
from tests.training.test_loop import TOY, hit_validation, train_toy

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
# 29 steps an epoch.
CONFIG = TrainConfig(**(vars(TOY) | {"batch_size": 2, "epochs": 3, "max_steps": 87}))
VALUES = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
INJECTIONS = 4  # into one training


def watched(bank: Bank, folder: Path, config: TrainConfig = CONFIG) -> TrainResult:
    """Train while everything that is written, validated, averaged, logged is looked at."""
    state, validate = folder / "state", hit_validation(bank, plan_windows(bank, 20))

    def look(optimizer: Optimizer | None = None) -> None:
        if state.exists():
            assert all_finite(load_state(state)[0].values()), "what is not finite was written"

    def checked(model: torch.nn.Module) -> dict[str, float]:
        assert all_finite(model.state_dict().values()), "what is not finite was validated"
        return validate(model)

    def logged(record: dict[str, float]) -> None:
        assert all(map(math.isfinite, record.values())), record
        look()

    options = {"validate": checked, "on_epoch": logged, "checkpoint_steps": 1}
    with before_every_step(look):
        result = train_toy(bank, config, state_path=state, **options)
    assert all_finite(result.model.state_dict().values())
    same_windows = result.history[-3]  # they take two turns
    assert result.history[-1]["train/loss"] < same_windows["train/loss"]
    return result


def total(result: TrainResult, name: str) -> int:
    return int(sum(record[f"train/{name}"] for record in result.history))


def random_steps(name: str, low: int = 1, high: int = 57) -> set[int]:
    return set(generator(0, name).choice(np.arange(low, high), INJECTIONS, replace=False).tolist())


@pytest.mark.parametrize("value", VALUES)
def test_a_loss_that_is_no_number_skips_its_step(tiny_bank, tmp_path, tally, value) -> None:
    with tally.injecting(f"{value} in a loss", INJECTIONS):
        with at_losses(random_steps(value), lambda module, loss: loss * 0 + VALUES[value]):
            result = watched(tiny_bank, tmp_path)
        assert (total(result, "skipped_steps"), total(result, "rollbacks")) == (INJECTIONS, 0)


@pytest.mark.parametrize("value", VALUES)
def test_a_gradient_that_is_no_number_skips_its_step(tiny_bank, tmp_path, tally, value) -> None:
    draw = generator(1, value)

    def poison(module: Supervised, loss: Tensor) -> Tensor:
        """Put the value into one place of one gradient of this very backward pass."""
        moved = [p for p in module.model.parameters() if p.requires_grad]
        chosen = moved[draw.integers(len(moved))]
        place = int(draw.integers(chosen.numel()))

        def change(gradient: Tensor) -> Tensor:
            handle.remove()
            gradient = gradient.clone()
            gradient.view(-1)[place] = VALUES[value]
            return gradient

        handle = chosen.register_hook(change)
        return loss + 0 * chosen.sum()

    with tally.injecting(f"{value} in a gradient", INJECTIONS):
        with at_losses(random_steps(f"gradient {value}"), poison):
            result = watched(tiny_bank, tmp_path)
        assert (total(result, "skipped_steps"), total(result, "rollbacks")) == (INJECTIONS, 0)


@pytest.mark.parametrize("value", VALUES)
def test_a_poisoned_row_costs_the_steps_that_read_it(tiny_bank, tmp_path, tally, value) -> None:
    windows = plan_windows(tiny_bank, 20)
    row = int(generator(2, value).choice(windows.train_rows()))
    vectors = tiny_bank.vectors.copy()
    vectors[row, 3] = VALUES[value]
    held_out = {int(r) for split in ("val", "test") for r in windows.queries[split].target_row_Q}
    assert row not in held_out
    poisoned = Bank(**(vars(tiny_bank) | {"vectors": vectors}))
    clean = hit_validation(tiny_bank, windows)
    with tally.injecting(f"{value} in a row of the bank"):
        with np.errstate(invalid="ignore"):
            result = train(poisoned, windows, CONFIG, validate=clean, state_path=tmp_path / "state")
        assert 2 <= total(result, "skipped_steps") < 20
        assert all_finite(load_state(tmp_path / "state")[0].values())
        assert all_finite(result.model.state_dict().values())


@pytest.mark.parametrize("value", ["NaN", "Inf"])
@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq", "weights"])
def test_a_poisoned_optimiser_is_put_back(tiny_bank, tmp_path, tally, part, value) -> None:
    draw = generator(3, f"{part} {value}")

    def poison(optimizer: Optimizer) -> None:
        tensors = weights_of(optimizer)
        if part != "weights":
            tensors = [state[part] for state in optimizer.state.values()]
        chosen = tensors[draw.integers(len(tensors))]
        chosen.view(-1)[int(draw.integers(chosen.numel()))] = VALUES[value]

    # Squares that are infinite stop their weight unseen; the next copy, 64 steps on, sees them.
    config = TrainConfig(**(vars(CONFIG) | {"epochs": 4, "max_steps": 70}))
    with tally.injecting(f"{value} in {part} of the optimizer"):
        with after_steps({int(draw.integers(40, 60))}, poison):
            result = watched(tiny_bank, tmp_path, config)
        assert (total(result, "skipped_steps"), total(result, "rollbacks")) == (1, 1)


def test_planted_spikes_are_undone(tiny_bank, tmp_path, tally) -> None:
    config = TrainConfig(**(vars(CONFIG) | {"epochs": 8, "max_steps": 230, "patience": 9}))
    steps = {90, 120, 180}
    with tally.injecting("loss spike", len(steps)):
        with after_steps(steps, scramble):
            result = watched(tiny_bank, tmp_path, config)
        assert (total(result, "skipped_steps"), total(result, "rollbacks")) == (0, len(steps))


def test_endless_spikes_end_in_one_line(tiny_bank, tmp_path, tally) -> None:
    config = TrainConfig(**(vars(CONFIG) | {"epochs": 12, "max_steps": 340, "patience": 99}))
    with tally.injecting("loss spike, again and again", 11), ExitStack() as stack:
        stack.enter_context(after_steps(set(range(80, 340, 15)), scramble))
        with pytest.raises(ValueError) as refused:
            watched(tiny_bank, tmp_path, config)
        assert str(refused.value) == (
            "lr: 0.001 diverged, the loss spiked more than 10 times; use a smaller lr"
        )


@pytest.fixture
def workplace(tmp_path, empty_store, monkeypatch):
    make_bank(tmp_path / "bank")
    copy_store(empty_store, tmp_path / "store", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("lr", ["1e30", "1e300"])
def test_a_rate_that_overflows_is_never_registered(workplace, tally, capsys, lr) -> None:
    sizes = "--model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2 --negatives 32"
    sizes += " --epochs 2 --batch-size 2"
    words = f"--bank bank --ctx 20 {sizes} --lr {lr}".split()
    with tally.injecting("weights overflow"):
        assert train_command.main(words) == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert "diverged" in told and "use a smaller lr" in told
        client = MlflowClient()
        (run,) = client.search_runs(["0"])
        assert run.info.status == "FAILED"
        assert all(map(math.isfinite, run.data.metrics.values()))
        assert not client.search_model_versions() and not client.search_logged_models(["0"])


def test_all_ranks_decide_alike(tiny_bank, tmp_path, tally) -> None:
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split()]
    command += ["-m", "tests.faults.broken_ranks", str(tiny_bank.path), str(tmp_path / "found")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    with tally.injecting("NaN or overflow on one rank of two, spike on both", 3):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        first, second = json.loads((tmp_path / "found").read_text())
        assert first == second
        assert (first["skipped_steps"], first["rollbacks"]) == (2, 2)
