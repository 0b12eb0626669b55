"""Experts that start from a trained trunk.

Shapes: B windows of a batch, T time.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lvm.bank.bank import UNASSIGNED, Bank
from lvm.models.table import build_model
from lvm.models.tmd_experts import has_gate
from lvm.training.checkpoint import starting_model
from lvm.training.config import TrainConfig, resolve
from lvm.training.data import Batches
from lvm.training.expert_gate import LaneSupervision
from lvm.training.loop import train
from lvm.windows.export import plan_windows
from tests.synthetic import lane_rotation_bank
from tests.training.test_loop import TOY, Killed, assert_same, hit_validation, train_toy, weights

pytestmark = pytest.mark.slow

GROWN = {"model": "tmd_experts", "init": "models:/lvm/1", "experts": 4, "expert_rank": 3}


def config(**changed: object) -> TrainConfig:
    """Return the grown toy; `experts`, `expert_rank` keep their defaults where none reads them."""
    chosen = vars(TOY) | GROWN | {"epochs": 3} | changed
    idle = {"experts"} if chosen["experts_control"] == "dense" else set()
    idle |= set() if chosen["model"] == "tmd_experts" else {"experts", "expert_rank"}
    return TrainConfig(**{name: value for name, value in chosen.items() if name not in idle})


def dense(dim: int = 16, seed: int = 5) -> nn.Module:
    """Return a memory_gru of the toy size that stands for a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {name: getattr(TOY, name) for name in ("hidden", "layers", "chunk", "slots")}
        model = build_model({"model": "memory_gru", "dim": dim, "dropout": 0.2, **sizes})
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def test_a_frozen_trunk_keeps_every_bit_while_the_experts_move(tiny_bank: Bank) -> None:
    initial = dense()
    result = train_toy(tiny_bank, config(dropout=0.2), initial=initial)
    found = weights(result)
    for name, value in initial.state_dict().items():
        assert torch.equal(found[name], value), name
    start = starting_model(resolve(config(), 20), 16, initial)
    for name, value in start.head.state_dict().items():
        assert not torch.equal(found[f"head.{name}"], value), name


def test_a_trained_trunk_moves_too(tiny_bank: Bank) -> None:
    initial = dense()
    found = weights(train_toy(tiny_bank, config(trunk="trained"), initial=initial))
    moved = {name for name, value in initial.state_dict().items() if (found[name] != value).any()}
    assert {"project_in.weight", "skip_change.weight", "lower.gru.weight_ih_l0"} <= moved


def test_the_trunk_is_frozen_where_there_is_an_init_only() -> None:
    assert resolve(config(), 20).trunk == "frozen"
    assert resolve(config(init=None), 20).trunk == "trained"
    assert resolve(config(model="memory_gru"), 20).trunk == "trained"
    assert resolve(resolve(config(), 20), 20) == resolve(config(), 20)


@pytest.mark.parametrize("control", ["none", "permuted", "dense"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_bank: Bank, tmp_path: Path, control: str
) -> None:
    """Killed inside an epoch, where the counts of the gate are under way."""
    chosen, initial = config(dropout=0.2, experts_control=control), dense()
    whole = train_toy(tiny_bank, chosen, initial=initial)
    state, windows = tmp_path / "state", plan_windows(tiny_bank, 20)
    limit = 1.5 * Batches(tiny_bank, windows, 4, 0).num_batches(1)

    def die(model: nn.Module, arguments: tuple) -> None:
        calls.append(1)
        if len(calls) > limit:
            raise Killed

    calls: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: die(module, given) if type(module).__name__ == "Supervised" else None
    )
    try:
        with pytest.raises(Killed):
            train_toy(tiny_bank, chosen, initial=initial, state_path=state, checkpoint_steps=5)
    finally:
        hook.remove()
    resumed = train_toy(tiny_bank, chosen, initial=initial, state_path=state, checkpoint_steps=5)
    assert_same(whole, resumed)


def test_another_init_of_the_same_name_begins_anew(tiny_bank: Bank, tmp_path: Path) -> None:
    state, seen = tmp_path / "state", []
    train_toy(tiny_bank, config(), initial=dense(), state_path=state)
    train_toy(
        tiny_bank,
        config(),
        initial=dense(seed=6),
        state_path=state,
        on_epoch=lambda record: seen.append(record["epoch"]),
    )
    assert seen[0] == 1


def test_loads_are_recorded_every_epoch(tiny_bank: Bank) -> None:
    for record in train_toy(tiny_bank, config(), initial=dense()).history:
        assert 0.25 <= record["train/expert_load_max"] <= 0.5
        assert 0 <= record["train/expert_load_entropy"] <= 1
        assert record["train/dead_experts"] in range(3)
    plain = train_toy(tiny_bank, config(experts_control="dense"), initial=dense()).history
    assert not any("expert" in name for record in plain for name in record)


def test_a_gate_is_told_the_lanes_of_the_targets(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 20)
    batches = Batches(tiny_bank, windows, 4, 0)
    batch = next(batches.epoch(1))

    def told(step: int, **changed: object):
        settings = resolve(config(**changed), 20)
        return LaneSupervision(tiny_bank, windows, batches, settings, 100).of_batch(batch, step)

    own = told(0)
    for place, window in enumerate(batch.window_B):
        start, count = batches.extent(window)
        expected = tiny_bank.lane_N[start + 1 : start + count + 1].astype(np.int64)
        assert own.lane_BT[place, :count].tolist() == expected.tolist()
    assert torch.equal(own.lane_BT != UNASSIGNED, batch.real_BT)
    assert [told(step).weight for step in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0])
    permuted = told(0, experts_control="permuted")
    assert not torch.equal(permuted.lane_BT, own.lane_BT)
    assert torch.equal(permuted.lane_BT != UNASSIGNED, batch.real_BT)


def test_a_bank_without_lanes_leaves_the_gate_to_equal_shares(tiny_bank: Bank) -> None:
    bank = Bank(**(vars(tiny_bank) | {"lane_N": None, "lanes": ()}))
    result = train_toy(bank, config(), initial=dense())
    assert has_gate(result.model)
    with pytest.raises(ValueError, match="experts_control: bank .* no two lanes"):
        train_toy(bank, config(experts_control="permuted"), initial=dense())


def test_lanes_that_need_other_maps_are_won_by_experts(tmp_path: Path) -> None:
    """Eight rotations of 12 dims: two experts of rank 6 turn one, one of rank 12 not all."""
    bank = lane_rotation_bank(tmp_path / "bank", num_lanes=8)
    windows, initial = plan_windows(bank, 20), dense(bank.dim)
    shared = {"experts": 8, "expert_rank": 6, "epochs": 12, "patience": 12, "lr": 0.02}
    hits = {}
    for control in ("none", "dense"):
        chosen = config(experts_control=control, dropout=0.0, **shared)
        validate = hit_validation(bank, windows)
        result = train(bank, windows, chosen, validate=validate, initial=initial)
        hits[control] = hit_validation(bank, windows, "test")(result.model)["hit_at_5"]
    assert hits["none"] > 0.6
    assert hits["none"] > hits["dense"] + 0.2


@pytest.mark.parametrize(
    ("changed", "other", "named"),
    [
        ({"hidden": 16}, {}, "hidden 24, here 16"),
        ({"slots": 3}, {}, "slots 4, here 3"),
        ({"cell": "mingru"}, {}, "cell gru, here mingru"),
        ({"decay": 0.7}, {}, "decay 0.5, here 0.7"),
        ({}, {"dim": 8}, "dim 8, here 16"),
        ({"model": "transformer", "slots": 16}, {}, "is a memory_gru, from which no transformer"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changed: dict, other: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"init: models:/lvm/1 .*{named}") as caught:
        starting_model(resolve(config(**changed), 20), 16, dense(**other))
    assert "\n" not in str(caught.value)


def test_experts_are_not_taken_into_a_dense_model() -> None:
    initial = starting_model(resolve(config(), 20), 16, dense())
    again = starting_model(resolve(config(), 20), 16, initial)
    assert json.dumps(again.config) == json.dumps(initial.config)
    assert torch.equal(again.head.gate.weight, initial.head.gate.weight)
    with pytest.raises(ValueError, match="is a tmd_experts, from which no memory_gru"):
        starting_model(resolve(config(model="memory_gru"), 20), 16, initial)
    with pytest.raises(ValueError, match="experts 4, here 8"):
        starting_model(resolve(config(experts=8), 20), 16, initial)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"model": "tmd_experts", "trunk": "frozen"}, "trunk: frozen needs"),
        ({"trunk": "frozen", "init": "1"}, "trunk: delta_memory is all trunk"),
        ({"trunk": "thawed"}, "trunk: unknown 'thawed'"),
        ({"experts_control": "dense"}, "experts_control: delta_memory has no experts"),
        ({"model": "tmd_experts", "experts_control": "swap"}, "experts_control: unknown 'swap'"),
        (
            {"model": "tmd_experts", "experts_control": "permuted", "experts": 1},
            "experts_control: permuted lanes need 2 experts",
        ),
        ({"experts": 0}, "experts: 0"),
        ({"expert_rank": 0}, "expert_rank: 0"),
        ({"gate_lanes": -0.1}, "gate_lanes: -0.1"),
        ({"gate_balance": float("nan")}, "gate_balance: nan"),
    ],
)
def test_impossible_settings_are_refused(setting: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrainConfig(**setting)


def test_the_dense_control_has_the_rank_of_the_active_experts() -> None:
    grown, control = (
        starting_model(resolve(config(experts_control=name), 20), 16, dense())
        for name in ("none", "dense")
    )
    sizes = [(model.config["experts"], model.config["expert_rank"]) for model in (grown, control)]
    assert sizes == [(4, 3), (1, 6)]
