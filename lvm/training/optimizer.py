"""Optimizer steps: their plan, the loss and gradient of a batch, AdamW, schedules, weight average.

Several processes may share the batches of a step. Shapes: B batch, T time, D vector dim, K
negatives, P supervised positions.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lvm.system.distributed import World
from lvm.system.seeding import torch_seed
from lvm.training.config import Settings
from lvm.training.data import Batch, Batches, HardNegatives
from lvm.training.expert_gate import GateLoss, LaneLabels, LaneSupervision
from lvm.training.loss import OwnNegatives, SampledSoftmax, seed_loss

WARMUP_SHARE = 0.05
FINAL_LR_SHARE = 0.01
UNIFORM_SHARE = 0.25  # averaging=swa averages this last share of all steps


@dataclass(frozen=True)
class TrainingPlan:
    """Optimizer steps per epoch and in all, warm-up steps, examples per epoch.

    Windows take turns, so figures per epoch are means over all `epochs`, the number that `steps`
    can reach. An example is a supervised position; with recipe=seed it is a window. `own_negatives`
    is the number of other windows in a batch if these are the only negatives (recipe=seed), else
    None.
    """

    epochs: int
    steps_per_epoch: int
    steps: int
    warmup: int
    examples_per_epoch: int
    own_negatives: int | None

    def report(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
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


class Supervised(nn.Module):
    """A model with its loss in one module, so that one backward pass serves both.

    bf16 is used inside the model only; the loss and its softmax are float32. With
    `gradient_checkpointing` the backward pass recomputes the activations of each part of the model
    instead of storing them (Chen et al., arXiv 1604.06174); loss and gradients stay the same.
    `gate_loss` is added if the model has a gate.
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
        self.trained = recomputing(model) if config.gradient_checkpointing else model

    def forward(
        self,
        batch: Batch,
        negative_KD: Tensor | None,
        own: OwnNegatives | None,
        labels: LaneLabels | None = None,
    ) -> Tensor:
        """Return the mean loss over the batch's positions (recipe=seed: windows), a scalar."""
        if self.gate_loss is None or labels is None:
            return self._loss(batch, self._predict(batch, self.trained), negative_KD, own)
        prediction_BTD, logit_BTX = self._predict(batch, self.trained.routed)  # type: ignore[arg-type]
        real_BT = batch.real_BT
        cost: Tensor = self.gate_loss(logit_BTX[real_BT], labels.lane_BT[real_BT], labels.weight)
        return cost + self._loss(batch, prediction_BTD, negative_KD, own)

    def _predict(self, batch: Batch, model: Callable[[Tensor], Any]) -> Any:
        device, half = batch.context_BTD.device.type, self.config.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return model(batch.context_BTD)

    def _loss(
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


class Recomputed(nn.Module):
    """Runs `part`; the backward pass recomputes its activations instead of storing them."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.part, *inputs, use_reentrant=False)


def recomputing(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that shares its weights and stores only the inputs of its parts.

    A part is a child of the model, or each layer of a stack of layers. The copy is in training
    mode. Recomputation draws the same dropout masks again.
    """
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared).train()
    _recompute_parts(twin)
    return twin


def _recompute_parts(module: nn.Module) -> None:
    for name, child in module.named_children():
        holds_list = any(isinstance(part, nn.ModuleList) for part in child.children())
        if holds_list or isinstance(child, nn.ModuleList):
            _recompute_parts(child)
        else:
            setattr(module, name, Recomputed(child))


@dataclass
class Gradients:
    """Computes the gradients of `supervised`; all processes see the same negatives."""

    supervised: Supervised
    batches: Batches
    hard: HardNegatives
    world: World
    device: torch.device
    lanes: LaneSupervision | None = None
    _shared: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._shared = self.world.wrap(self.supervised, self.device)

    def backward(self, step: int, pending: Sequence[Batch]) -> float:
        """Compute the gradient of the batches' mean loss; return that loss, the same on all ranks.

        DistributedDataParallel averages gradients over processes, so each process multiplies its
        mean by the number of processes and by its share of the batch. Dropout depends on seed, step
        and rank: several processes draw other masks than a single one.
        """
        config, rank, total = self.supervised.config, self.world.rank, 0.0
        stream = f"dropout of step {step}" + (f" rank {rank}" if rank else "")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(config.seed, stream))
            for number, batch in enumerate(pending, start=1):
                waits = self.world.size > 1 and number < len(pending)
                with self._shared.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    negative_KD, own = self._negatives(step, batch)
                    labels = self._labels(step, batch)
                    mean = self._shared(batch.to(self.device), negative_KD, own, labels)
                    loss = mean * (batch.share * self.world.size / len(pending))
                    loss.backward()
                total += loss.item()
        return self.world.mean(total)

    def _labels(self, step: int, batch: Batch) -> LaneLabels | None:
        if self.lanes is None:
            return None
        labels = self.lanes.of_batch(batch, step)
        return replace(labels, lane_BT=labels.lane_BT.to(self.device))

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
    """Return AdamW with weight decay on matrices only."""
    parameters = [*model.parameters(), *objective.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def lr_share(step: int, total: int, warmup: int) -> float:
    """Return lr / peak lr at a step: linear warm-up, then a cosine from 1 to `FINAL_LR_SHARE`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


class WeightAverage:
    """Average of the weights over training steps, beside the raw weights.

    `ema`: exponential, over about the last tenth of training, at most 1,000 steps. `swa`: uniform
    over the last quarter of the steps (Izmailov et al., arXiv 1803.05407, section 3.2, with the
    usual learning-rate schedule). `none`: no average.
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
        """Add the weights after optimizer step `step`, counted from 0."""
        if self._averaged is not None and step >= self._first_step:
            self._averaged.update_parameters(model)

    def model(self) -> nn.Module | None:
        """Return the model with the averaged weights; None before the first update."""
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
    """Return the decay of the exponential average in a training of `total_steps`."""
    return min(0.999, max(0.5, 1 - 10 / max(1, total_steps)))
