"""One optimizer step: the loss of a batch, its gradient, the optimizer with its schedule.

Several processes may share the batches of a step. Shapes: B batch, T time, D vector dim,
K negatives, P supervised positions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvm.system.seeding import torch_seed
from lvm.training.batches import Batch, Batches
from lvm.training.config import Settings
from lvm.training.distributed import World
from lvm.training.expert_gate import GateLoss, Guidance, Told
from lvm.training.hard_negatives import HardNegatives
from lvm.training.loss import OwnNegatives, SampledSoftmax, seed_loss

FINAL_LR_SHARE = 0.01


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


@dataclass
class Gradients:
    """Leaves gradients in the parameters of `supervised`; all processes see the same negatives."""

    supervised: Supervised
    batches: Batches
    hard: HardNegatives
    world: World
    device: torch.device
    guidance: Guidance | None = None
    _shared: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._shared = self.world.wrap(self.supervised, self.device)

    def backward(self, step: int, pending: Sequence[Batch]) -> float:
        """Leave the gradient of the batches' mean loss; return that loss, the same on all ranks.

        DistributedDataParallel averages gradients over processes, so each process weighs its mean
        by the number of processes times its share of the batch. Dropout is a function of seed,
        step, rank: with dropout, several processes draw other masks than one would.
        """
        config, rank, total = self.supervised.config, self.world.rank, 0.0
        stream = f"dropout of step {step}" + (f" rank {rank}" if rank else "")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(config.seed, stream))
            for number, batch in enumerate(pending, start=1):
                waits = self.world.size > 1 and number < len(pending)
                with self._shared.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    given = (*self._negatives(step, batch), self._told(step, batch))
                    mean = self._shared(batch.to(self.device), *given)
                    loss = mean * (batch.share * self.world.size / len(pending))
                    loss.backward()
                total += loss.item()
        return self.world.mean(total)

    def _told(self, step: int, batch: Batch) -> Told | None:
        if self.guidance is None:
            return None
        told = self.guidance.of_batch(batch, step)
        return replace(told, lane_BT=told.lane_BT.to(self.device))

    def _negatives(self, step: int, batch: Batch) -> tuple[Tensor | None, OwnNegatives | None]:
        config = self.supervised.config
        if config.recipe != "dense":
            return None, None
        shared_KD = self.batches.negatives(step, config.negatives)
        own = self.hard.of_batch(batch)
        return shared_KD.to(self.device), None if own is None else own.to(self.device)


def make_optimizer(
    model: nn.Module, objective: nn.Module, config: Settings
) -> torch.optim.Optimizer:
    """Return AdamW, whose weight decay acts on matrices alone."""
    parameters = [*model.parameters(), *objective.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def lr_share(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from 1 to `FINAL_LR_SHARE` over the remaining steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def focus_share(step: int, total: int) -> float:
    """Return the share of the loss's `focus` at a step: from 0 to 1 over the first half.

    Cross entropy has a gradient while every answer is far; the bounded loss has none.
    """
    return min(1.0, 2 * step / max(1, total))
