"""The chunked GRU, its dropout between layers above all.

Shapes: B batch, T time, H hidden.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvm.models.layers import Dropout
from lvm.models.recurrent import ChunkedGRU
from lvm.models.table import build_model

HIDDEN, CHUNK = 6, 5
DOUBLE = {"dtype": torch.float64}


class Uneven(nn.Module):
    """Stands for dropout: each feature has a factor of its own, whatever the layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0, 2, HIDDEN, **DOUBLE)


def chunked(layers: int, dropout: float = 0.5) -> ChunkedGRU:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ChunkedGRU(HIDDEN, layers, dropout).double()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter)
    return encoder


def rows() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, 4 * CHUNK, HIDDEN, generator=draw, **DOUBLE).requires_grad_()


def by_kernel(encoder: ChunkedGRU) -> Callable[[Tensor], Tensor]:
    """Return the forward pass of a GPU, on whose kernel torch has the same call for a CPU."""

    def forward(input_BTH: Tensor) -> Tensor:
        input_NSH = input_BTH.unflatten(1, (-1, CHUNK)).flatten(0, 1)
        return (input_NSH + encoder._last_by_kernel(input_NSH)).view_as(input_BTH)

    return forward


def gradients(encoder: nn.Module, output_BTH: Tensor, input_BTH: Tensor) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    weight_BTH = torch.randn(output_BTH.shape, generator=draw, **DOUBLE)
    return torch.autograd.grad((output_BTH * weight_BTH).sum(), [input_BTH, *encoder.parameters()])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_the_kernel_for_gpus_is_the_one_for_cpus(layers: int, training: bool) -> None:
    encoder, input_BTH = chunked(layers).train(training), rows()
    encoder.dropout = Uneven() if training else encoder.dropout
    expected_BTH, found_BTH = encoder(input_BTH, CHUNK), by_kernel(encoder)(input_BTH)
    torch.testing.assert_close(found_BTH, expected_BTH)
    torch.testing.assert_close(
        gradients(encoder, found_BTH, input_BTH), gradients(encoder, expected_BTH, input_BTH)
    )


def test_the_kernel_for_gpus_draws_the_same_mask_when_recomputed() -> None:
    encoder, input_BTH = chunked(layers=3).train(), rows()
    assert encoder.gru.dropout == 0, "the kernel's own dropout would not repeat itself"
    found = []
    with torch.random.fork_rng():
        for kept in (True, False):
            torch.manual_seed(3)
            forward = by_kernel(encoder)
            output_BTH = (
                forward(input_BTH) if kept else checkpoint(forward, input_BTH, use_reentrant=False)
            )
            torch.manual_seed(4)  # the backward pass finds another state
            found.append(gradients(encoder, output_BTH, input_BTH))
    torch.testing.assert_close(*found)
    assert not torch.equal(
        found[0][0], gradients(encoder, by_kernel(encoder)(input_BTH), input_BTH)[0]
    )


@pytest.mark.parametrize(("layers", "is_noisy"), [(2, False), (4, True)])
def test_dropout_acts_between_the_layers_of_an_encoder(layers: int, is_noisy: bool) -> None:
    sizes = {"hidden": HIDDEN, "layers": layers, "chunk": CHUNK, "slots": 2, "dropout": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model({"model": "memory_gru", "dim": HIDDEN, **sizes})
        nn.init.normal_(model.project_out.weight)
        for module in model.modules():
            if isinstance(module, Dropout) and module is not model.lower.dropout:
                module.p = 0.0
        context_BTD = nn.functional.normalize(rows().detach().float(), dim=-1)
        noisy_BTD, calm_BTD = (model.train(mode)(context_BTD) for mode in (True, False))
    assert torch.equal(noisy_BTD, calm_BTD) != is_noisy


def test_the_names_of_the_weights_are_those_of_torch_s_gru() -> None:
    names = {f"gru.{name}" for name, _ in nn.GRU(HIDDEN, HIDDEN, 2).named_parameters()}
    assert set(chunked(layers=2).state_dict()) == names | {"norm.weight"}
