"""Training on banks whose answer is known.

Shapes: D vector dim, Q queries.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lvm.bank.bank import Bank
from lvm.models.predict import predict_queries
from lvm.system.distributed import World
from lvm.training.config import TrainConfig, as_dict, resolve
from lvm.training.data import Batches
from lvm.training.guard import MIN_STEPS
from lvm.training.loop import TrainResult, train
from lvm.training.loss import SampledSoftmax
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows
from tests.synthetic import noise_bank, rotation_bank

pytestmark = pytest.mark.slow

TOY = TrainConfig(
    **{"model": "memory_gru", "hidden": 24, "layers": 2, "chunk": 10, "slots": 4},
    **{"dropout": 0.0, "negatives": 64, "batch_size": 4, "epochs": 4},
)


def hit_validation(bank: Bank, windows: Windows, split: str = "val") -> Callable:
    """Return a plain whole-bank Hit@5 scorer."""
    queries = windows.queries[split].head(200)
    vector_DN = bank.unit(slice(0, bank.num_rows)).T

    def validate(model: nn.Module) -> dict[str, float]:
        score_QN = predict_queries(model, bank, queries) @ vector_DN
        truth_Q = score_QN[np.arange(len(queries)), queries.target_row_Q]
        return {"hit_at_5": float(((score_QN > truth_Q[:, None]).sum(axis=1) < 5).mean())}

    return validate


def of_recipe(recipe: str, toy: TrainConfig = TOY) -> TrainConfig:
    """Return the toy under a recipe: seed reads no negatives of the bank."""
    negatives = toy.negatives if recipe == "dense" else None
    return dataclasses.replace(toy, recipe=recipe, negatives=negatives)


def train_toy(bank: Bank, config: TrainConfig = TOY, **options: object) -> TrainResult:
    windows = plan_windows(bank, 20)
    options.setdefault("validate", hit_validation(bank, windows))
    return train(bank, windows, config, **options)  # type: ignore[arg-type]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def assert_same(first: TrainResult, second: TrainResult) -> None:
    assert weights(first).keys() == weights(second).keys()
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name
    timeless = [{k: v for k, v in r.items() if k != "train/seconds"} for r in first.history]
    assert timeless == [
        {k: v for k, v in r.items() if k != "train/seconds"} for r in second.history
    ]


def test_a_known_rotation_is_learnt(tmp_path: Path) -> None:
    bank = rotation_bank(tmp_path / "bank")
    config = TrainConfig(**(vars(TOY) | {"lr": 0.02}))
    windows = plan_windows(bank, 20)
    untrained = hit_validation(bank, windows, "test")(
        train_toy(bank, TrainConfig(**(vars(TOY) | {"epochs": 1, "lr": 1e-9}))).model
    )
    result = train_toy(bank, config)
    assert result.history[-1]["train/loss"] < 0.5 * result.history[0]["train/loss"]
    trained = hit_validation(bank, windows, "test")(result.model)
    assert trained["hit_at_5"] > 0.9
    assert untrained["hit_at_5"] < 0.5


def test_noise_stays_at_chance(tmp_path: Path) -> None:
    bank = noise_bank(tmp_path / "bank")
    result = train_toy(bank)
    hits = hit_validation(bank, plan_windows(bank, 20), "test")(result.model)["hit_at_5"]
    assert hits < 6 * 5 / bank.num_rows + 0.02


@pytest.mark.parametrize("cell", ["gru", "mingru"])
@pytest.mark.parametrize("recipe", ["dense", "seed"])
def test_two_runs_agree_to_the_bit(tiny_bank: Bank, cell: str, recipe: str) -> None:
    config = TrainConfig(**(vars(of_recipe(recipe)) | {"cell": cell, "dropout": 0.2, "epochs": 2}))
    assert_same(train_toy(tiny_bank, config), train_toy(tiny_bank, config))


class Killed(Exception):
    """Stands for a process that dies between two epochs."""


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_bank: Bank, tmp_path: Path) -> None:
    config = TrainConfig(**(vars(TOY) | {"dropout": 0.2, "layers": 4}))
    whole = train_toy(tiny_bank, config)

    def die_after_two(record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise Killed

    state = tmp_path / "state"
    with pytest.raises(Killed):
        train_toy(tiny_bank, config, on_epoch=die_after_two, state_path=state)
    seen: list[int] = []
    resumed = train_toy(
        tiny_bank, config, on_epoch=lambda r: seen.append(int(r["epoch"])), state_path=state
    )
    assert seen == [3, 4]
    assert_same(whole, resumed)


def test_a_run_resumed_between_an_epochs_last_step_and_its_end_equals_it(
    tiny_bank: Bank, tmp_path: Path
) -> None:
    config = dataclasses.replace(TOY, epochs=2, layers=2)
    whole, state = train_toy(tiny_bank, config), tmp_path / "state"

    def dying(model: nn.Module) -> dict[str, float]:
        raise Killed

    with pytest.raises(Killed):
        train_toy(tiny_bank, config, validate=dying, state_path=state, checkpoint_steps=1)
    assert_same(whole, train_toy(tiny_bank, config, state_path=state))


def test_a_state_of_another_configuration_is_not_resumed(tiny_bank: Bank, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first = TrainConfig(**(vars(TOY) | {"epochs": 2}))
    train_toy(tiny_bank, first, state_path=state)
    other = TrainConfig(**(vars(first) | {"seed": 1}))
    seen: list[int] = []
    train_toy(tiny_bank, other, on_epoch=lambda r: seen.append(int(r["epoch"])), state_path=state)
    assert seen[0] == 1


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tiny_bank: Bank) -> None:
    scores = iter([0.1, 0.1, 0.4, 0.3, *[0.2] * 8, 0.9, 0.9])
    config = TrainConfig(**(vars(TOY) | {"epochs": 9, "patience": 2}))
    result = train_toy(tiny_bank, config, validate=lambda model: {"hit_at_5": next(scores)})
    assert result.best_epoch == 2
    assert len(result.history) == 5, "patience counts from the half of 9 epochs on"


def test_patience_never_leaves_a_model_with_too_few_steps_to_judge_it_by(tiny_bank: Bank) -> None:
    sizes = {"hidden": 4, "layers": 2, "negatives": 4, "batch_size": 1, "patience": 1}
    config = TrainConfig(**(vars(TOY) | sizes | {"epochs": 30, "max_steps": 400}))
    scores = iter(range(100, 0, -1))
    result = train_toy(tiny_bank, config, validate=lambda model: {"hit_at_5": 1e-3 * next(scores)})
    assert MIN_STEPS <= result.optimiser_steps < 400
    assert not any("steps were taken" in warning for warning in result.warnings)


def test_a_flat_start_does_not_end_a_run_before_half_of_its_steps(tiny_bank: Bank) -> None:
    config = dataclasses.replace(TOY, epochs=8, patience=1)
    flat = train_toy(tiny_bank, config, validate=lambda model: {"hit_at_5": 0.1})
    assert len(flat.history) == 4
    scores = iter([0.1] * 6 + [0.2] * 10)
    risen = train_toy(tiny_bank, config, validate=lambda model: {"hit_at_5": next(scores)})
    assert risen.best_epoch == 4 and len(risen.history) == 5


def test_the_loss_begins_as_mild_cross_entropy(tiny_bank: Bank, monkeypatch) -> None:
    seen: list[float] = []
    warmth: list[float] = []
    loss = SampledSoftmax.forward

    def watched(self: SampledSoftmax, *parts: object) -> torch.Tensor:
        seen.append(self.focus)
        warmth.append(float(self.temperature().detach() / self.log_temperature.detach().exp()))
        return loss(self, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(SampledSoftmax, "forward", watched)
    result = train_toy(tiny_bank, dataclasses.replace(TOY, focus=0.4, epochs=2))
    half = result.plan.steps / 2
    assert seen == pytest.approx([0.4 * min(1, step / half) for step in range(len(seen))])
    assert seen[0] == 0 and seen[-1] == 0.4
    share = [min(1, step / half) for step in range(len(seen))]
    assert warmth == pytest.approx([3 ** (1 - part) for part in share])


def test_an_epoch_tells_what_each_part_does(tiny_bank: Bank) -> None:
    first, *_, last = train_toy(tiny_bank).history
    parts = ("average", "linear", "encoder", "memory")
    assert all(last[f"train/gradient_{part}"] > 0 for part in parts)
    assert all(0 < last[f"train/update_{part}"] < 1 for part in parts)
    assert all(0 < last[f"train/share_{part}"] < 1 for part in parts[1:])
    assert first["train/share_linear"] != last["train/share_linear"]


def test_a_diverging_run_stops_with_the_reason(tiny_bank: Bank, monkeypatch) -> None:
    windows = plan_windows(tiny_bank, 20)
    broken = windows.train_windows()[0][0]
    vectors = tiny_bank.vectors.copy()
    vectors[broken : broken + 200] = np.inf
    bank = Bank(**(vars(tiny_bank) | {"vectors": vectors}))
    config = TrainConfig(**(vars(TOY) | {"epochs": 30, "patience": 30, "batch_size": 64}))
    with pytest.raises(ValueError, match="lr: .* diverged"), np.errstate(invalid="ignore"):
        train(bank, windows, config, validate=lambda model: {"hit_at_5": 0.0})


def test_steps_end_the_training_with_its_schedule(tiny_bank: Bank) -> None:
    an_epoch = Batches(tiny_bank, plan_windows(tiny_bank, 20), 4, 0).num_batches(1)
    config = TrainConfig(**(vars(TOY) | {"epochs": 9, "max_steps": an_epoch + 3}))
    result = train_toy(tiny_bank, config)
    assert result.optimiser_steps == an_epoch + 3
    assert [record["epoch"] for record in result.history] == [1, 2]
    assert result.history[-1]["train/lr"] < 0.05 * resolve(config, 20).lr
    assert "val/hit_at_5" in result.history[-1]


@pytest.mark.parametrize("recipe", ["dense", "seed"])
def test_epochs_decide_where_steps_would_allow_more(tiny_bank: Bank, recipe: str) -> None:
    config = TrainConfig(**(vars(of_recipe(recipe)) | {"epochs": 2}))
    longer = TrainConfig(**(vars(config) | {"max_steps": 10**9}))
    assert_same(train_toy(tiny_bank, config), train_toy(tiny_bank, longer))


def test_without_an_average_the_raw_weights_are_validated(tiny_bank: Bank) -> None:
    result = train_toy(tiny_bank, TrainConfig(**(vars(TOY) | {"averaging": "none"})))
    for record in result.history:
        assert record["val/hit_at_5"] == record["val/raw_hit_at_5"]
        assert "val/averaged_hit_at_5" not in record


def test_a_late_average_is_validated_once_there_is_one(tiny_bank: Bank) -> None:
    config = TrainConfig(**(vars(TOY) | {"averaging": "swa", "patience": 9}))
    history = train_toy(tiny_bank, config).history
    there = ["val/averaged_hit_at_5" in record for record in history]
    assert (there[:2], there[-1]) == ([False, False], True)


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tiny_bank: Bank) -> None:
    with pytest.raises(ValueError, match="batch_size: 4 windows cannot be shared among 5"):
        train_toy(tiny_bank, TOY, world=World(size=5))


def test_precision_is_bf16_where_the_processor_multiplies_it_faster(monkeypatch) -> None:
    for speedup, precision in ((2.2, "bf16"), (1.1, "fp32")):
        monkeypatch.setattr("lvm.training.config.bf16_speedup", lambda speedup=speedup: speedup)
        assert resolve(TrainConfig(device="cpu"), 20).precision == precision
    assert resolve(TrainConfig(device="cpu", precision="bf16"), 20).precision == "bf16"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_windows_of_every_batch(tiny_bank, dense: bool, size: int) -> None:
    windows = plan_windows(tiny_bank, 20)
    whole = Batches(tiny_bank, windows, 4, 0, dense)
    shares = [
        Batches(tiny_bank, windows, 4, 0, dense, rank=rank, size=size).epoch(2)
        for rank in range(size)
    ]
    for batch, *parts in zip(whole.epoch(2), *shares, strict=True):
        assert sum(part.share for part in parts) == pytest.approx(1)
        counted = [set(part.window_B.tolist()) for part in parts if part.share]
        assert set.union(*counted) == set(batch.window_B.tolist())
        assert sum(map(len, counted)) == len(batch.window_B)
        for part in parts:
            assert torch.equal(part.last_GD, batch.last_GD)
            if not dense:
                assert torch.equal(part.target_BTD[:, -1], batch.last_GD[part.own_B])


def test_an_epoch_can_begin_in_its_middle(tiny_bank: Bank) -> None:
    batches = Batches(tiny_bank, plan_windows(tiny_bank, 20), 4, 0)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, first=3))
    assert [b.window_B.tolist() for b in whole[3:]] == [b.window_B.tolist() for b in rest]


def test_training_reads_train_rows_only(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 20)
    vectors = tiny_bank.vectors.copy()
    held_out = np.setdiff1d(np.arange(tiny_bank.num_rows), windows.train_rows())
    vectors[held_out] = np.nan
    bank = Bank(**(vars(tiny_bank) | {"vectors": vectors}))
    batches = Batches(bank, windows, 4, 0)
    for batch in batches.epoch(1):
        assert torch.isfinite(batch.context_BTD).all()
        assert torch.isfinite(batch.target_BTD).all()
    assert torch.isfinite(batches.negatives(1, 10_000)).all()


def test_every_target_is_the_successor_of_its_input(tiny_bank: Bank) -> None:
    batch = next(Batches(tiny_bank, plan_windows(tiny_bank, 20), 4, 0).epoch(1))
    assert torch.equal(batch.context_BTD[:, 1:], batch.target_BTD[:, :-1])
    assert batch.real_BT.shape == batch.context_BTD.shape[:2]


@pytest.mark.parametrize("overlap", [0, 10, 15])
def test_a_dense_epoch_reads_each_train_row_about_once(tiny_bank: Bank, overlap: int) -> None:
    windows = plan_windows(tiny_bank, 20, overlap)
    batches = Batches(tiny_bank, windows, 4, 0)
    num_rows = len(windows.train_rows())
    num_turns = 20 // (20 - overlap)
    for epoch in range(1, num_turns + 1):
        assert 0.75 * num_rows < batches.num_positions(epoch) < 1.1 * num_rows
        positions = sum(int(batch.real_BT.sum()) for batch in batches.epoch(epoch))
        assert positions == batches.num_positions(epoch)
    all_rows = int(windows.train_windows()[1].sum())
    assert sum(batches.num_positions(epoch) for epoch in range(1, num_turns + 1)) == all_rows


def test_negatives_are_distinct_groups_of_train_rows(tiny_bank: Bank) -> None:
    negative_KD = Batches(tiny_bank, plan_windows(tiny_bank, 20), 4, 0).negatives(0, 10_000)
    cosine_KK = negative_KD @ negative_KD.T - torch.eye(len(negative_KD))
    assert float(cosine_KK.max()) < 0.999


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"model": "lstm"}, "model: unknown 'lstm'"),
        ({"recipe": "fast"}, "recipe: unknown 'fast'"),
        ({"lr": 0.0}, "lr: 0.0"),
        ({"lr": float("nan")}, "lr: nan"),
        ({"epochs": 0}, "epochs: 0"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        (
            {"layers": 3, "model": "memory_gru"},
            "layers: 3 is odd; half of them lie below the memory",
        ),
        ({"chunk": 20_000_000}, "chunk: 20000000 is above 10,000,000"),
        ({"slots": 10**7 + 1, "model": "memory_gru"}, "slots: 10000001 is above 10,000,000"),
        ({"layers": 3, "model": "tmd_experts"}, "layers: 3 is odd"),
        ({"hidden": 7, "model": "transformer"}, "hidden: 7 is odd"),
        ({"hidden": 40}, "hidden: 40 is not a multiple of 32"),
        ({"max_steps": 0}, "max_steps: 0"),
        ({"averaging": "mean"}, "averaging: unknown 'mean'"),
        ({"hard_negatives": -1}, "hard_negatives: -1"),
        ({"hard_negatives": 2, "recipe": "seed"}, "hard_negatives: need"),
        ({"hard_negatives": 201}, "hard_negatives: 201 are more than the 200 rows"),
        ({"negatives": 2, "recipe": "seed"}, "negatives: recipe=seed reads none"),
        ({"hard_from": 1.0}, "hard_from: 1.0"),
        ({"temperature": 0.02}, "temperature: 0.02 is outside"),
        ({"focus": 1.5}, "focus: 1.5"),
        ({"focus": 0.3, "recipe": "seed"}, "focus: recipe=seed"),
    ],
)
def test_impossible_settings_are_refused(setting: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**setting)


EXPERTS = {"model": "tmd_experts"}
DENSE = EXPERTS | {"experts_control": "dense"}


@pytest.mark.parametrize(
    ("setting", "idle", "reader"),
    [
        ({"model": "transformer"}, {"slots": 4}, "a memory (model=memory_gru, tmd_experts)"),
        ({}, {"slots": 4}, "a memory (model=memory_gru, tmd_experts)"),
        ({"model": "skip"}, {"hidden": 4}, "models with an encoder (all but model=skip)"),
        ({"model": "skip"}, {"layers": 2}, "models with an encoder (all but model=skip)"),
        ({"model": "res_mlp"}, {"slots": 4}, "a memory (model=memory_gru, tmd_experts)"),
        ({"model": "res_mlp"}, {"cell": "mingru"}, "recurrent layers (model=memory_gru, "),
        ({}, {"experts": 4}, "model=tmd_experts without experts_control=dense alone"),
        ({}, {"expert_rank": 4}, "model=tmd_experts alone; leave it at 64"),
        ({}, {"gate_z": 0.0}, "the gate of 2 experts or more (model=tmd_experts without "),
        (DENSE, {"experts": 4}, "model=tmd_experts without experts_control=dense alone"),
        (DENSE, {"gate_balance": 0.0}, "the gate of 2 experts or more"),
        (EXPERTS | {"experts": 1}, {"gate_lanes": 0.0}, "the gate of 2 experts or more"),
        ({}, {"hard_from": 0.5}, "hard_negatives of 1 or more alone; leave it at 0.25"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(setting: dict, idle: dict, reader: str) -> None:
    TrainConfig(**setting)
    ((name, value),) = idle.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}: {value} is for {reader}")) as caught:
        TrainConfig(**setting, **idle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"model": "memory_gru", "slots": 4, "cell": "mingru"},
        EXPERTS | {"slots": 4, "cell": "mingru", "experts": 4, "expert_rank": 4, "gate_z": 0.0},
        DENSE | {"expert_rank": 4},
        {"hard_negatives": 200, "hard_from": 0.5},
        {"model": "transformer", "chunk": 100},
        {"model": "res_mlp", "chunk": 100},
    ],
)
def test_a_setting_that_something_reads_is_taken(setting: dict) -> None:
    config = TrainConfig(**setting)
    assert as_dict(resolve(resolve(config, 20), 20)).items() >= setting.items()


@pytest.mark.parametrize("name", ["delta_memory", "transformer", "res_mlp"])
def test_models_without_slots_have_any_number_of_layers(name: str) -> None:
    assert TrainConfig(model=name, layers=3).layers == 3


def test_the_seed_recipe_keeps_the_old_settings() -> None:
    for ctx, batch in ((100, 32), (500, 16), (1000, 8), (2000, 4)):
        config = resolve(TrainConfig(recipe="seed"), ctx)
        assert (config.batch_size, config.accumulation) == (batch, 256 // batch)
        assert (config.lr, config.weight_decay, config.patience) == (1e-4, 1e-4, 3)
    assert resolve(TrainConfig(recipe="seed", lr=0.01), 100).lr == 0.01
