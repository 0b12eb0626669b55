"""Gradients with recomputed activations, arithmetic in half precision."""

import pytest
import torch
from torch import nn

from lvm.bank.bank import Bank
from lvm.models.table import TRAINED_MODELS, build_model, size_names
from lvm.training.config import TrainConfig, resolve
from lvm.training.data import Batch, Batches
from lvm.training.loss import SampledSoftmax
from lvm.training.optimizer import Supervised, recomputing
from lvm.windows.export import plan_windows


def supervised(recipe: str, model: str = "memory_gru", **options: object) -> Supervised:
    config = resolve(
        TrainConfig(model=model, recipe=recipe, device="cpu", **{"precision": "fp32", **options}),
        20,
    )
    sizes = {"hidden": 8, "layers": 4, "chunk": 5, "slots": 2, "dropout": 0.3, "decay": 0.5}
    own = {name: size for name, size in sizes.items() if name in size_names(model)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = build_model({"model": model, "dim": 16, **own})
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.3)
    return Supervised(built, SampledSoftmax(), config).train()


def gradients(module: Supervised, batch: Batch, negative_KD: torch.Tensor):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = module(batch, negative_KD, None)
        loss.backward()
    return loss, {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def data(tiny_bank: Bank) -> tuple[Batch, torch.Tensor]:
    batches = Batches(tiny_bank, plan_windows(tiny_bank, 20), 4, 0, dense=False)
    return next(batches.epoch(1)), batches.negatives(0, 32)


@pytest.mark.parametrize("model", TRAINED_MODELS)
@pytest.mark.parametrize("recipe", ["dense", "seed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_no_gradient(data, precision, recipe, model) -> None:
    """With dropout: masks repeat."""
    loss, expected = gradients(supervised(recipe, model, precision=precision), *data)
    recomputing = {"precision": precision, "gradient_checkpointing": True}
    again, found = gradients(supervised(recipe, model, **recomputing), *data)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_parts_keep_nothing_but_their_inputs() -> None:
    """Saved tensors are counted as autograd packs them; the model itself stays as it was."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([Deep(), Deep()])})

    def saved_bytes(enabled: bool) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        state = torch.randn(32, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            blocks = (recomputing(model) if enabled else model)["blocks"]  # type: ignore[index]
            for block in blocks:
                state = block(state)
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(isinstance(block, Deep) for block in model["blocks"])
    assert {*map(id, recomputing(model).parameters())} == {*map(id, model.parameters())}


class Deep(nn.Module):
    """Keeps many activations for one input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.layers(state)


def test_half_precision_stays_inside_the_model(data) -> None:
    loss, _ = gradients(supervised("dense"), *data)
    half, _ = gradients(supervised("dense", precision="bf16"), *data)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=0.02)
    assert half.item() != loss.item()
