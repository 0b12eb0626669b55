"""Where the loss spikes or a weight overflows, training goes on from its last good weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lvm.bank.bank import Bank
from lvm.models.weights import load_state, save_state
from lvm.system.seeding import generator
from lvm.training import guard as spikes
from lvm.training.checkpoint import Progress
from lvm.training.config import TrainConfig
from lvm.training.guard import SNAPSHOT_STEPS, SPAN, WINDOW, loss_bar, sees_spike
from lvm.training.loop import TrainResult
from tests.faults.breakage import after_steps, before_every_step, scramble, weights_of
from tests.training.test_loop import TOY, assert_same, train_toy

pytestmark = pytest.mark.slow

# 29 steps an epoch; the second copy is taken at step 64, before the damage in epoch 3. Without
# focus the loss keeps one scale from the first step on.
CONFIG = TrainConfig(
    **(vars(TOY) | {"batch_size": 2, "max_steps": 112, "patience": 9, "dropout": 0.2, "focus": 0.0})
)
DAMAGED = 80


def spikes_in(losses: np.ndarray, progress: Progress | None = None) -> list[int]:
    """Return the steps at which a spike is seen."""
    progress = progress or Progress()
    return [step for step, loss in enumerate(losses) if sees_spike(progress, float(loss))]


def noise(num_steps: int, seed: int = 0) -> np.ndarray:
    return 2 + 0.1 * generator(seed, "losses").standard_normal(num_steps)


def test_four_losses_far_above_the_recent_ones_are_a_spike() -> None:
    losses = noise(200)
    losses[150:160] += 1
    assert spikes_in(losses) == [153, 157]
    assert SPAN == 4


@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_are_none(length: int) -> None:
    losses = noise(400)
    losses[150 : 150 + length] += 1
    losses[300 : 300 + length] += 1
    assert spikes_in(losses) == []


def test_half_a_window_is_needed() -> None:
    losses = noise(WINDOW // 2 + 10)
    losses[WINDOW // 2 - SPAN :] += 1
    assert spikes_in(losses) == []
    assert loss_bar(list(losses[: WINDOW // 2 - 1])) == math.inf


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_batches_that_are_always_harder_are_none(share: float) -> None:
    draw = generator(1, "harder")
    losses = noise(20_000) + 1.5 * (draw.random(20_000) < share)
    assert spikes_in(losses) == []


def test_heavy_tails_and_slow_rises_are_none() -> None:
    draw = generator(2, "tails")
    assert spikes_in(2 + 0.1 * draw.standard_t(2, 20_000)) == []
    assert spikes_in(noise(5000) + np.linspace(0, 3, 5000)) == []
    assert spikes_in(np.linspace(5, 1, 5000) + 0.01 * draw.standard_normal(5000)) == []


def test_a_level_that_stays_is_accepted_after_three_returns() -> None:
    losses = noise(400)
    losses[200:] += 1
    progress, returns = Progress(), []
    for step, loss in enumerate(losses):
        if sees_spike(progress, float(loss)):
            returns.append(step)
            progress.rollbacks_in_a_row += 1
    assert returns == [203, 207, 211]


def rollbacks(result: TrainResult) -> list[float]:
    return [record["train/rollbacks"] for record in result.history]


@pytest.fixture(scope="module")
def undisturbed(tiny_bank: Bank) -> TrainResult:
    return train_toy(tiny_bank, CONFIG)


@pytest.fixture(scope="module")
def mended(tiny_bank: Bank) -> TrainResult:
    """A training whose weights are damaged after step 80, seen to the end."""
    with after_steps({DAMAGED}, scramble):
        return train_toy(tiny_bank, CONFIG)


def test_damaged_weights_are_put_back(undisturbed: TrainResult, mended: TrainResult) -> None:
    assert rollbacks(undisturbed) == [0, 0, 0, 0] and rollbacks(mended) == [0, 0, 1, 0]
    assert mended.optimiser_steps == undisturbed.optimiser_steps
    for one, other in zip(undisturbed.history, mended.history, strict=True):
        assert one["train/skipped_steps"] == other["train/skipped_steps"] == 0
    last, expected = mended.history[-1], undisturbed.history[-1]
    assert last["train/loss"] < 1.05 * expected["train/loss"]
    assert last["val/hit_at_5"] > expected["val/hit_at_5"] - 0.05
    assert "went back to its last good weights 1 time" in " ".join(mended.warnings)


def test_without_the_return_the_damage_lasts(
    tiny_bank: Bank, undisturbed: TrainResult, monkeypatch
) -> None:
    expected = undisturbed.history[-1]["train/loss"]
    monkeypatch.setattr(spikes, "SIGMAS", 1e9)
    with after_steps({DAMAGED}, scramble):
        damaged = train_toy(tiny_bank, CONFIG)
    assert rollbacks(damaged) == [0, 0, 0, 0]
    assert damaged.history[-1]["train/loss"] > 1.05 * expected


class Killed(Exception):
    """Stands for a process that dies between two steps."""


# After the damage, before the return; then between the return and the copy after it.
@pytest.mark.parametrize("died", [DAMAGED + 3, DAMAGED + 20], ids=["in the spike", "after it"])
def test_a_killed_run_returns_as_an_undisturbed_one(
    tiny_bank: Bank, mended: TrainResult, tmp_path: Path, died: int
) -> None:
    def die(optimizer: torch.optim.Optimizer) -> None:
        raise Killed

    options = {"state_path": tmp_path / "state", "checkpoint_steps": 2}
    with pytest.raises(Killed), after_steps({DAMAGED}, scramble), after_steps({died}, die):
        train_toy(tiny_bank, CONFIG, **options)
    meta = load_state(tmp_path / "state")[1]
    assert bool(meta["above"]) == (died == DAMAGED + 3)
    assert meta["snapshot_step"] == SNAPSHOT_STEPS
    resumed = train_toy(tiny_bank, CONFIG, **options)
    assert rollbacks(resumed) == [0, 0, 1, 0]
    assert_same(mended, resumed)


def test_an_overflowing_step_never_happened(tiny_bank: Bank) -> None:
    def overflow(optimizer: torch.optim.Optimizer) -> None:
        weights_of(optimizer)[0].view(-1)[3] = math.inf

    seen: list[bool] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        state = [v for part in optimizer.state.values() for v in part.values()]
        seen.append(spikes.all_finite([*weights_of(optimizer), *state]))

    with after_steps({DAMAGED}, overflow), before_every_step(look):
        result = train_toy(tiny_bank, CONFIG)
    assert all(seen) and len(seen) > DAMAGED
    assert rollbacks(result) == [0, 0, 1, 0]
    assert [record["train/skipped_steps"] for record in result.history] == [0, 0, 1, 0]
    assert spikes.all_finite(result.model.state_dict().values())


def test_a_rate_that_overflows_stops_with_the_reason(tiny_bank: Bank, tmp_path: Path) -> None:
    state, validated = tmp_path / "state", []
    config = TrainConfig(**(vars(CONFIG) | {"lr": 1e30}))
    with pytest.raises(ValueError, match=r"lr: 1e\+30 diverged, .*; use a smaller lr"):
        train_toy(
            tiny_bank,
            config,
            validate=lambda model: validated.append(model) or {"hit_at_5": 1.0},
            state_path=state,
            checkpoint_steps=1,
        )
    assert not validated
    assert spikes.all_finite(load_state(state)[0].values())


def test_an_epoch_without_a_step_is_no_training(tiny_bank: Bank) -> None:
    config = TrainConfig(**(vars(TOY) | {"lr": 1e30, "max_steps": 3}))
    with pytest.raises(ValueError, match="lr: .* diverged, no loss of an epoch is finite"):
        train_toy(tiny_bank, config)


def test_figures_that_are_no_numbers_choose_nothing(tiny_bank: Bank) -> None:
    config = TrainConfig(**(vars(TOY) | {"patience": 1}))
    with pytest.raises(ValueError, match="lr: .* diverged, val Hit@5 is NaN in every epoch"):
        train_toy(tiny_bank, config, validate=lambda model: {"hit_at_5": math.nan})


def test_a_state_without_a_copy_is_gone_on_from(
    tiny_bank: Bank, undisturbed: TrainResult, tmp_path: Path
) -> None:
    def die(optimizer: torch.optim.Optimizer) -> None:
        raise Killed

    state = tmp_path / "state"
    options = {"state_path": state, "checkpoint_steps": 2}
    with pytest.raises(Killed), after_steps({DAMAGED}, die):
        train_toy(tiny_bank, CONFIG, **options)
    tensors, meta = load_state(state)
    older = {key: value for key, value in tensors.items() if not key.startswith("good/")}
    lacking = ("recent", "above", "rollbacks", "rollbacks_in_a_row", "snapshot_step")
    save_state(state, older, {k: v for k, v in meta.items() if k not in lacking})
    assert len(older) < len(tensors)
    resumed = train_toy(tiny_bank, CONFIG, **options)
    assert_same(undisturbed, resumed)
