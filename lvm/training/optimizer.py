"""Optimizer steps: their plan, the loss and gradient of a batch, AdamW, schedules, weight average.

Several processes may share the batches of a step. Shapes: B batch, T time, D vector dim,
K negatives, P supervised positions.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lvm.system.seeding import torch_seed
from lvm.training.config import Settings
from lvm.training.data import Batch, Batches, HardNegatives
from lvm.training.distributed import World
from lvm.training.expert_gate import GateLoss, Guidance, Told
from lvm.training.loss import OwnNegatives, SampledSoftmax, seed_loss

WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.01
UNIFORM_SHARE = 0.25  # of all steps: the last ones, which averaging=swa averages


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


class WeightAverage:
    """`ema`: exponential, over about the last tenth of training, at most 1,000 steps.

    `swa`: uniform over the last quarter of the steps (Izmailov et al., arXiv 1803.05407, section
    3.2, with the learning rate left to its schedule). `none`: no average.
    """

    def __init__(self, model: nn.Module, kind: str, total_steps: int) -> None:
        self._averaged: AveragedModel | None = None
        self._first_step = math.floor((1 - UNIFORM_SHARE) * total_steps) if kind == "swa" else 0
        if kind == "ema":
            decay = average_decay(total_steps)
            self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        elif kind == "swa":
            self._averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        if self._averaged is not None and step >= self._first_step:
            self._averaged.update_parameters(model)

    def model(self) -> nn.Module | None:
        """Return the model with the averaged weights; None while nothing is averaged yet."""
        if self._averaged is None or not int(self._averaged.n_averaged):
            return None
        averaged: nn.Module = self._averaged.module
        return averaged

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._averaged is None else self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._averaged is not None:
            self._averaged.load_state_dict(dict(state))


def average_decay(total_steps: int) -> float:
    """Return the decay of the exponential average for a training of `total_steps`."""
    return min(0.999, max(0.5, 1 - 10 / max(1, total_steps)))


@dataclass(frozen=True)
class TrainingPlan:
    """Optimiser steps of an epoch, of all; steps of warm-up; examples of an epoch.

    Windows take turns: what is said of an epoch is the mean over all `epochs`, which are those that
    `steps` reach at most. An example is a supervised position, a window under recipe=seed.
    `own_negatives` are the other windows of a batch where they alone are the negatives
    (recipe=seed), else None.
    """

    epochs: int
    steps_per_epoch: int
    steps: int
    warmup: int
    examples_per_epoch: int
    own_negatives: int | None

    def report(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def plan_training(batches: Batches, config: Settings) -> TrainingPlan:
    """Count the steps of `config` over these batches."""
    steps = [
        math.ceil(batches.num_batches(epoch) / config.accumulation)
        for epoch in range(1, config.epochs + 1)
    ]
    total = min(sum(steps), config.max_steps or sum(steps))
    epochs = 1 + sum(1 for done in itertools.accumulate(steps) if done < total)
    is_dense = config.recipe == "dense"
    count = batches.num_positions if is_dense else batches.num_windows
    return TrainingPlan(
        epochs=epochs,
        steps_per_epoch=round(sum(steps[:epochs]) / epochs),
        steps=total,
        warmup=math.ceil(WARMUP_SHARE * total) if is_dense else steps[0],
        examples_per_epoch=round(sum(count(epoch) for epoch in range(1, epochs + 1)) / epochs),
        own_negatives=None if is_dense else min(config.batch_size, batches.num_windows()) - 1,
    )
