"""The loss of one batch: model, arithmetic, objective.

Shapes: B batch, T time, D vector dim, K negatives, P supervised positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvm.training.batches import Batch
from lvm.training.config import Settings
from lvm.training.gate_losses import GateLoss, Told
from lvm.training.loss import OwnNegatives, SampledSoftmax, seed_loss


class Supervised(nn.Module):
    """A model with its objective, so that one backward pass serves both.

    bf16 holds inside the model only; the loss, with its softmax, is float32. With
    `gradient_checkpointing` the backward pass computes the activations of each part of the model a
    second time instead of keeping them (Chen et al., arXiv 1604.06174): the same loss and
    gradients. A `gate_loss` is added where the model has a gate.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: SampledSoftmax,
        config: Settings,
        gate_loss: GateLoss | None = None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.gate_loss = model, config, gate_loss
        self.objective = objective if config.recipe == "dense" else None

    def forward(
        self,
        batch: Batch,
        negative_KD: Tensor | None,
        own: OwnNegatives | None,
        told: Told | None = None,
    ) -> Tensor:
        """Return the scalar mean loss over this batch's positions, or windows for recipe=seed."""
        if self.gate_loss is None or told is None:
            return self._missed(batch, self._predict(batch, self.model), negative_KD, own)
        prediction_BTD, logit_BTX = self._predict(batch, self.model.routed)  # type: ignore[arg-type]
        real_BT = batch.real_BT
        cost: Tensor = self.gate_loss(logit_BTX[real_BT], told.lane_BT[real_BT], told.weight)
        return cost + self._missed(batch, prediction_BTD, negative_KD, own)

    def _predict(self, batch: Batch, model: Callable[[Tensor], Any]) -> Any:
        config, device = self.config, batch.context_BTD.device
        half = config.precision == "bf16"
        with (
            torch.autocast(device.type, torch.bfloat16, enabled=half),
            recomputed(self.model, config.gradient_checkpointing),
        ):
            return model(batch.context_BTD)

    def _missed(
        self,
        batch: Batch,
        prediction_BTD: Tensor,
        negative_KD: Tensor | None,
        own: OwnNegatives | None,
    ) -> Tensor:
        config, prediction_BTD = self.config, prediction_BTD.float()
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
