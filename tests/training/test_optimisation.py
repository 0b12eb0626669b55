"""One optimizer step: its groups of parameters, its gradient, what it does to both."""

import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lvm.bank.bank import Bank
from lvm.models.table import TRAINED_MODELS, build_model, size_names
from lvm.system.distributed import World
from lvm.training.config import Settings, TrainConfig, resolve
from lvm.training.data import Batches, HardNegatives
from lvm.training.loss import FIRST_WARMTH, TEMPERATURE_RANGE, SampledSoftmax
from lvm.training.optimizer import Gradients, Supervised, make_optimizer
from lvm.windows.export import plan_windows
from tests.training.test_loop import TOY, train_toy


def settings(model: str = "memory_gru", recipe: str = "dense", **options: object) -> Settings:
    chosen = {"device": "cpu", "precision": "fp32", "batch_size": 3, **options}
    return resolve(TrainConfig(model=model, recipe=recipe, **chosen), 20)


def toy(model: str) -> nn.Module:
    sizes = {"hidden": 8, "layers": 2, "chunk": 5, "slots": 2, "dropout": 0.0}
    own = {name: size for name, size in sizes.items() if name in size_names(model)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build_model({"model": model, "dim": 16, **own})
        if hasattr(built, "project_out"):
            nn.init.normal_(built.project_out.weight, std=0.3)
    return built


@pytest.mark.parametrize("model", TRAINED_MODELS)
@pytest.mark.parametrize("recipe", ["dense", "seed"])
def test_every_parameter_has_its_decay(model, recipe) -> None:
    built, objective = toy(model), SampledSoftmax()
    config = settings(model, recipe, weight_decay=0.3, lr=0.02)
    optimizer = make_optimizer(built, objective, config)
    found = {
        id(parameter): (group["weight_decay"], group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {id(objective.log_temperature): (0.0, 0.02)}
    for parameter in built.parameters():
        expected[id(parameter)] = (0.3 if parameter.ndim == 2 else 0.0, 0.02)
    assert found == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)
    decays = {name: found[id(p)][0] for name, p in built.named_parameters()}
    flat = {decay for name, decay in decays.items() if "bias" in name or "norm" in name}
    assert flat == {0.0}


@pytest.mark.parametrize("num_train_rows", [5_000, 54_000, 79_999, 80_000, 600_000])
@pytest.mark.parametrize("ctx", [100, 1000, 2000])
def test_the_defaults_plan_enough_steps_for_any_number_of_train_rows(num_train_rows, ctx) -> None:
    config = resolve(TrainConfig(), ctx, num_train_rows)
    steps = config.epochs * num_train_rows / (config.batch_size * ctx)
    assert config.epochs >= 6
    assert steps >= 500
    assert config.epochs == 6 or steps < 500 + num_train_rows / (config.batch_size * ctx)
    typed = resolve(TrainConfig(batch_size=8, epochs=2), ctx, num_train_rows)
    assert (typed.batch_size, typed.epochs) == (8, 2)


@pytest.fixture
def gradients(tiny_bank: Bank, request) -> Gradients:
    config = settings(
        recipe=request.param, negatives=32 if request.param == "dense" else None, hard_negatives=0
    )
    windows = plan_windows(tiny_bank, 20)
    batches = Batches(tiny_bank, windows, 3, 0, request.param == "dense")
    hard = HardNegatives(tiny_bank, windows.representative_N, batches, 0)
    supervised = Supervised(toy("memory_gru"), SampledSoftmax(), config).train()
    return Gradients(supervised, batches, hard, World(), torch.device("cpu"))


@pytest.mark.parametrize("gradients", ["dense", "seed"], indirect=True)
def test_batches_of_a_step_count_by_their_mean(gradients: Gradients) -> None:
    epoch = gradients.batches.epoch(1)
    pending = [next(epoch), next(epoch)]

    def of(batches: list) -> tuple[float, dict[str, torch.Tensor]]:
        gradients.supervised.zero_grad()
        loss = gradients.backward(7, batches)
        named = gradients.supervised.named_parameters()
        return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}

    (first, one), (second, other), (loss, both) = of(pending[:1]), of(pending[1:]), of(pending)
    assert abs(first - second) > 1e-3
    assert loss == pytest.approx((first + second) / 2, rel=1e-5)
    assert both.keys() == one.keys() == other.keys()
    for name, gradient in both.items():
        mean = (one[name] + other[name]) / 2
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture
def at_step():
    """Let a function of the optimizer run right before each of its steps."""
    handles = []
    yield lambda call: handles.append(
        register_optimizer_step_pre_hook(lambda optimizer, *_: call(optimizer))
    )
    for handle in handles:
        handle.remove()


def one_step(bank: Bank, **options: object) -> dict[str, float]:
    """Return the record of a training of one step."""
    model = {"model": "res_mlp", "slots": TrainConfig.slots}
    config = TrainConfig(**(vars(TOY) | {"max_steps": 1} | model | options))
    return train_toy(bank, config, validate=lambda model: {"hit_at_5": 0.0}).history[0]


@pytest.mark.parametrize(("strength", "clipped"), [(1000.0, True), (1e-3, False)])
def test_a_gradient_is_no_longer_than_one(
    tiny_bank: Bank, monkeypatch, at_step, strength: float, clipped: bool
) -> None:
    norms, loss = [], SampledSoftmax.forward
    monkeypatch.setattr(SampledSoftmax, "forward", lambda *parts: strength * loss(*parts))

    def watch(optimizer: torch.optim.Optimizer) -> None:
        parts = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(math.sqrt(sum(float(part.square().sum()) for part in parts)))

    at_step(watch)
    one_step(tiny_bank)
    assert len(norms) == 1
    assert norms[0] == pytest.approx(1.0, rel=1e-4) if clipped else 0 < norms[0] < 0.1


def test_every_group_learns_at_the_rate_of_the_step(tiny_bank: Bank, at_step) -> None:
    rates = []
    at_step(lambda optimizer: rates.extend(group["lr"] for group in optimizer.param_groups))
    record = one_step(tiny_bank, lr=0.02)
    assert rates == pytest.approx([0.02] * 2)
    assert record["train/lr"] == pytest.approx(0.02)


@pytest.mark.parametrize("pushed", [-9.0, 5.0])
def test_a_step_leaves_the_temperature_in_its_range(tiny_bank, at_step, pushed: float) -> None:
    def push(optimizer: torch.optim.Optimizer) -> None:
        # A residual MLP has no scalar of its own.
        (scalar,) = (p for g in optimizer.param_groups for p in g["params"] if p.ndim == 0)
        scalar.data.fill_(pushed)

    at_step(push)
    bound = FIRST_WARMTH * TEMPERATURE_RANGE[pushed > 0]
    assert one_step(tiny_bank)["train/temperature"] == pytest.approx(bound)


def test_the_temperature_of_a_recipe_that_learns_none_is_the_given_one(tiny_bank: Bank) -> None:
    seed = {"recipe": "seed", "negatives": None}
    assert one_step(tiny_bank, **seed, temperature=0.5)["train/temperature"] == 0.5
    assert one_step(tiny_bank, **seed)["train/temperature"] == 0.07
