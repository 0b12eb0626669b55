"""The training loop, which knows nothing of logging or of how validation scores a model."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lvm.bank import Bank
from lvm.batches import Batch, Batches
from lvm.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from lvm.models import build_model, size_names
from lvm.objectives import SampledSoftmax, seed_loss
from lvm.optimisation import average_decay, lr_share, make_optimizer
from lvm.recipes import Settings, TrainConfig, as_dict, resolve
from lvm.seeding import torch_seed
from lvm.symptoms import training_warnings
from lvm.windows import Windows

Validate = Callable[[nn.Module], dict[str, float]]
OnEpoch = Callable[[dict[str, float]], None]

CLIP_NORM = 1.0
MAX_SKIPPED_IN_A_ROW = 20
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class TrainResult:
    """The best model by val Hit@5, the epoch that made it, every epoch's record, warnings."""

    model: nn.Module
    config: Settings
    best_epoch: int
    history: list[dict[str, float]]
    warnings: list[str]
    optimiser_steps: int
    examples_per_epoch: int


def train(
    bank: Bank,
    windows: Windows,
    config: TrainConfig,
    *,
    validate: Validate,
    on_epoch: OnEpoch = lambda record: None,
    state_path: Path | None = None,
) -> TrainResult:
    """Train `config.model` on the train rows of `windows`, best epoch by `validate`'s `hit_at_5`.

    validate maps a model to its val figures; on_epoch is called once an epoch, from epoch 1, with
    that epoch's record. With a `state_path`, the state is written there after each epoch; a run
    that finds the state of the same data and configuration goes on from it, to the same result.

    Raises:
        ValueError: no training window fits, or the loss is not finite for 20 steps in a row.
    """
    loop = _Loop(bank, windows, resolve(config, windows.ctx), state_path)
    while not loop.finished():
        record = loop.run_epoch()
        loop.keep_best(record, validate)
        loop.history.append(record)
        loop.save()
        on_epoch(record)
    return loop.result()


class _Loop:
    """All that changes while training: weights, their average, the optimiser, the best so far."""

    def __init__(
        self, bank: Bank, windows: Windows, config: Settings, state_path: Path | None
    ) -> None:
        self.config, self.state_path = config, state_path
        self.device = torch.device(config.device)
        self.is_dense = config.recipe == "dense"
        self.batches = Batches(bank, windows, config.batch_size, config.seed, self.is_dense)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(config.seed, "weights"))
            self.model = build_model(_sizes(config, bank.dim)).to(self.device)
        self.objective = SampledSoftmax(config.temperature, config.alpha)
        self.objective.to(self.device)
        self.optimizer = make_optimizer(self.model, self.objective, config)
        steps = [
            math.ceil(self.batches.num_batches(epoch) / config.accumulation)
            for epoch in range(1, config.epochs + 1)
        ]
        self.total_steps = sum(steps)
        self.warmup = math.ceil(WARMUP_SHARE * self.total_steps) if self.is_dense else steps[0]
        self.averaged = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(average_decay(self.total_steps))
        )
        self.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.best_epoch, self.best_score = 0, -math.inf
        self.step, self.skipped_in_a_row = 0, 0
        self.history: list[dict[str, float]] = []
        self.identity = _identity(windows, as_dict(config))
        self._restore()

    def finished(self) -> bool:
        """Tell whether all epochs have run or val Hit@5 has stood still for `patience` epochs."""
        epoch = len(self.history)
        return epoch >= self.config.epochs or epoch - self.best_epoch >= self.config.patience

    def run_epoch(self) -> dict[str, float]:
        """Run the next epoch's optimiser steps; return its record."""
        epoch, started = len(self.history) + 1, time.monotonic()
        losses: list[float] = []
        pending: list[Batch] = []
        description = f"epoch {epoch}/{self.config.epochs}"
        self.model.train()
        num_batches = self.batches.num_batches(epoch)
        with tqdm(
            total=num_batches, desc=description, unit="batch", leave=False, disable=None
        ) as bar:
            for number, batch in enumerate(self.batches.epoch(epoch), start=1):
                pending.append(batch)
                bar.update()
                if len(pending) < self.config.accumulation and number < num_batches:
                    continue
                losses.append(self._step(pending))
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                pending = []
        finite = [loss for loss in losses if math.isfinite(loss)]
        return {
            "epoch": epoch,
            "train/loss": sum(finite) / max(1, len(finite)),
            "train/skipped_steps": len(losses) - len(finite),
            "train/temperature": self.objective.temperature().item(),
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/seconds": time.monotonic() - started,
        }

    def keep_best(self, record: dict[str, float], validate: Validate) -> None:
        """Validate the raw and the averaged weights; remember the better if it is a best."""
        raw = validate(self.model)
        averaged = validate(self.averaged.module)
        use_averaged = averaged["hit_at_5"] >= raw["hit_at_5"]
        better, figures = (self.averaged.module, averaged) if use_averaged else (self.model, raw)
        record.update({f"val/{name}": value for name, value in figures.items()})
        record["val/raw_hit_at_5"] = raw["hit_at_5"]
        record["val/averaged_hit_at_5"] = averaged["hit_at_5"]
        if figures["hit_at_5"] > self.best_score:
            self.best_score, self.best_epoch = figures["hit_at_5"], int(record["epoch"])
            self.best_weights = {k: v.detach().clone() for k, v in better.state_dict().items()}
        record["best/hit_at_5"] = self.best_score

    def save(self) -> None:
        """Write the whole state, so that a killed run loses at most the epoch that it was in."""
        if self.state_path is None:
            return
        parts = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best_weights,
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        tensors = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
        names = ("step", "skipped_in_a_row", "best_epoch", "best_score", "history", "identity")
        save_state(self.state_path, tensors, {name: getattr(self, name) for name in names})

    def result(self) -> TrainResult:
        """Return the best model, in evaluation mode on the CPU."""
        self.model.load_state_dict(self.best_weights)
        return TrainResult(
            model=self.model.cpu().eval(),
            config=self.config,
            best_epoch=self.best_epoch,
            history=self.history,
            warnings=training_warnings(self.history, self.best_epoch, self.step),
            optimiser_steps=self.step,
            examples_per_epoch=(
                self.batches.num_positions() if self.is_dense else self.batches.num_windows()
            ),
        )

    def _restore(self) -> None:
        if self.state_path is None or not self.state_path.is_file():
            return
        tensors, meta = load_state(self.state_path)
        if meta["identity"] != self.identity:
            return
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = value
        self.model.load_state_dict(parts["model"])
        self.averaged.load_state_dict(parts["averaged"])
        self.best_weights = {k: v.to(self.device) for k, v in parts["best"].items()}
        self.objective.load_state_dict(parts["objective"])
        restore_optimizer(self.optimizer, parts["optimizer"])
        self.step, self.best_epoch = meta["step"], meta["best_epoch"]
        self.skipped_in_a_row = meta["skipped_in_a_row"]
        self.best_score, self.history = meta["best_score"], meta["history"]

    def _step(self, pending: list[Batch]) -> float:
        """Take one optimiser step over the accumulated batches; return their mean loss.

        A loss or gradient that is not finite skips the step; 20 skips in a row stop the training.
        """
        rate = self.config.lr * lr_share(self.step, self.total_steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_share"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.config.seed, f"dropout of step {self.step}"))
            total = 0.0
            for batch in pending:
                loss = self._loss(batch) / len(pending)
                loss.backward()
                total += loss.item()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        self.step += 1
        if math.isfinite(total) and bool(torch.isfinite(norm)):
            self.optimizer.step()
            self.objective.keep_in_range()
            self.averaged.update_parameters(self.model)
            self.skipped_in_a_row = 0
        else:
            total = math.nan
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise ValueError(f"lr: {self.config.lr} diverged, loss not finite; use a smaller lr")
        return total

    def _loss(self, batch: Batch) -> Tensor:
        context_BTD = batch.context_BTD.to(self.device)
        target_BTD = batch.target_BTD.to(self.device)
        half = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            prediction_BTD = self.model(context_BTD)
            if not self.is_dense:
                last_BD, truth_BD = prediction_BTD[:, -1], target_BTD[:, -1]
                return seed_loss(last_BD, truth_BD, self.config.alpha, self.config.temperature)
            negative_KD = self.batches.negatives(self.step, self.config.negatives)
            real_BT = batch.real_BT.to(self.device)
            loss: Tensor = self.objective(
                prediction_BTD[real_BT], target_BTD[real_BT], negative_KD.to(self.device)
            )
            return loss


def _sizes(config: Settings, dim: int) -> dict[str, Any]:
    own = size_names(config.model) & set(as_dict(config))
    return {name: getattr(config, name) for name in sorted(own)} | {
        "model": config.model,
        "dim": dim,
    }


def _identity(windows: Windows, config: dict[str, Any]) -> str:
    """Hash of all that decides the result: data, split, configuration, torch version, threads."""
    parts = [windows.bank_sha256, windows.sha256, config, torch.__version__]
    return hashlib.sha256(json.dumps([*parts, torch.get_num_threads()]).encode()).hexdigest()
