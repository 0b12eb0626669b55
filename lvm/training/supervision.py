"""The loss of one batch: model, arithmetic, objective.

Shapes: B batch, T time, D vector dim, K negatives, P supervised positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvm.objectives import OwnNegatives, SampledSoftmax, seed_loss
from lvm.training.batches import Batch
from lvm.training.recipes import Settings


class Supervised(nn.Module):
    """A model with its objective, so that one backward pass serves both.

    bf16 holds inside the model only; the loss, with its softmax, is float32. With
    `gradient_checkpointing` the backward pass computes the activations of each part of the model a
    second time instead of keeping them (Chen et al., arXiv 1604.06174): the same loss and
    gradients.
    """

    def __init__(self, model: nn.Module, objective: SampledSoftmax, config: Settings) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.objective = objective if config.recipe == "dense" else None

    def forward(self, batch: Batch, negative_KD: Tensor | None, own: OwnNegatives | None) -> Tensor:
        """Return the scalar mean loss over this batch's positions, or windows for recipe=seed."""
        config, device = self.config, batch.context_BTD.device
        half = config.precision == "bf16"
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=half),
            recomputed(self.model, config.gradient_checkpointing),
        ):
            prediction_BTD = self.model(batch.context_BTD).float()
        if self.objective is None:
            last_BD = prediction_BTD[:, -1]
            return seed_loss(last_BD, batch.last_GD, batch.own_B, config.alpha, config.temperature)
        prediction_PD, target_PD = prediction_BTD[batch.real_BT], batch.target_BTD[batch.real_BT]
        loss_P: Tensor = self.objective(prediction_PD, target_PD, negative_KD, own)
        return loss_P.mean()


@contextmanager
def recomputed(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let every part of the model that runs in the block keep its inputs only.

    A part is a child of the model; of a stack of layers, each layer. Its dropout repeats itself
    exactly.
    """
    parts = list(_parts(model)) if enabled else []
    for part in parts:
        vars(part)["forward"] = partial(checkpoint, part.forward, use_reentrant=False)
    try:
        yield
    finally:
        for part in parts:
            del vars(part)["forward"]


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        holds_list = any(isinstance(part, nn.ModuleList) for part in child.children())
        if holds_list or isinstance(child, nn.ModuleList):
            yield from _parts(child)
        else:
            yield child
