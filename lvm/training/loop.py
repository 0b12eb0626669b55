"""The training loop; it knows nothing of logging or of how validation scores a model."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from lvm.bank.bank import Bank
from lvm.models.tmd_experts import has_gate
from lvm.models.weights import optimizer_tensors, restore_optimizer
from lvm.system.distributed import World
from lvm.system.progress import add_products, count_products, part, steps
from lvm.system.seeding import generator
from lvm.training.checkpoint import Progress, StateFile, starting_model, state_sha256
from lvm.training.config import Settings, TrainConfig, resolve
from lvm.training.data import Batch, Batches, HardNegatives
from lvm.training.expert_gate import LaneSupervision, load_figures
from lvm.training.guard import (
    MAX_ROLLBACKS,
    MIN_STEPS,
    Guard,
    PartNorms,
    all_finite,
    forget,
    num_rollbacks,
    part_shares,
    training_warnings,
    warnings_by_now,
)
from lvm.training.loss import SampledSoftmax
from lvm.training.optimizer import (
    Gradients,
    Supervised,
    TrainingPlan,
    WeightAverage,
    lr_share,
    make_optimizer,
    plan_training,
)
from lvm.windows.planning import Windows

Validate = Callable[[nn.Module], dict[str, float]]
OnEpoch = Callable[[dict[str, float]], None]
OnWarnings = Callable[[list[str]], object]
OnStart = Callable[[TrainingPlan, int], object]
OnPace = Callable[[float, int], object]

ALONE = World()
MAX_SKIPPED_IN_A_ROW = 20
PACED_STEPS = 3  # after the first, which is slower, the pace is measured on so many


@dataclass(frozen=True)
class TrainResult:
    """The best model by val Hit@5, its epoch, the records of all epochs, warnings."""

    model: nn.Module
    config: Settings
    best_epoch: int
    history: list[dict[str, float]]
    warnings: list[str]
    optimiser_steps: int
    plan: TrainingPlan


def train(
    bank: Bank,
    windows: Windows,
    config: TrainConfig,
    *,
    validate: Validate,
    on_epoch: OnEpoch = lambda record: None,
    on_warnings: OnWarnings = lambda sentences: None,
    on_start: OnStart = lambda plan, num_parameters: None,
    on_pace: OnPace = lambda seconds, num_steps: None,
    state_path: Path | None = None,
    checkpoint_steps: int | None = None,
    world: World = ALONE,
    initial: nn.Module | None = None,
) -> TrainResult:
    """Train `config.model` on the train rows of `windows`; `validate`'s `hit_at_5` picks the epoch.

    validate maps a model to its val figures. on_epoch receives the record of each epoch, counted
    from 1; on_warnings receives all current warnings before each epoch. on_start receives the plan
    and the number of parameters before the first; on_pace, after a few steps, the seconds of a step
    and the number of steps to come. With a `state_path` the state is written after each epoch, and
    within epochs every `checkpoint_steps` optimizer steps (None: every two minutes). A run that
    finds the state of the same data and config resumes from it, to the same result. `initial` is
    the predictor that `config.init` names; training starts from its weights.

    Every process of `world` calls this and gets the result; each trains on its share of the windows
    of every batch. Rank 0 validates, assisted by the others; it alone calls on_epoch and writes the
    state.

    Raises:
        ValueError: no training window fits, a batch has fewer windows than there are processes,
            `initial` has other sizes, the loss is not finite for 20 steps in a row or a whole
            epoch, it spikes for the 11th time, or val Hit@5 is always NaN.
    """
    settings = resolve(config, windows.ctx, windows.num_train_rows)
    identity = state_sha256(settings, windows, world.size, initial)
    state = StateFile(state_path, identity, checkpoint_steps)
    loop = _Loop(bank, windows, settings, state, world, initial)
    loop.restore()
    loop.on_pace = on_pace
    if world.is_main:
        on_start(loop.plan, sum(one.numel() for one in loop.model.parameters()))
    while not loop.finished():
        if world.is_main:
            on_warnings(loop.warnings())
        record = loop.close_epoch(loop.run_epoch(), validate)
        if world.is_main:
            loop.save()
            on_epoch(record)
    return loop.result()


class _Loop:
    """State of a training: weights, their average, the optimizer, the best weights so far."""

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
        config: Settings,
        state: StateFile,
        world: World,
        initial: nn.Module | None,
    ) -> None:
        self.config, self.state, self.world = config, state, world
        self.device = world.device(config.device)
        if config.batch_size < world.size:
            raise ValueError(
                f"batch_size: {config.batch_size} windows cannot be shared among {world.size} "
                f"processes; use {world.size} or more"
            )
        place = {"rank": world.rank, "size": world.size}
        self.batches = Batches(
            bank, windows, config.batch_size, config.seed, config.recipe == "dense", **place
        )
        self.model = starting_model(config, bank.dim, initial).to(self.device)
        half = config.precision == "bf16"
        objective = SampledSoftmax(config.temperature, config.alpha, config.focus, half)
        self.objective = objective.to(self.device)
        self.optimizer = make_optimizer(self.model, self.objective, config)
        self.plan = plan_training(self.batches, config)
        self.averaged = WeightAverage(self.model, config.averaging, self.plan.steps)
        groups_N = windows.representative_N
        self.hard = HardNegatives(bank, groups_N, self.batches, config.hard_negatives)
        self.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.lanes, self.gate_loss = None, None
        if has_gate(self.model):
            self.lanes = LaneSupervision(bank, windows, self.batches, config, self.plan.steps)
            self.gate_loss = self.lanes.loss().to(self.device)
        self.guard = Guard(self.model, self.objective, self.averaged, self.optimizer, world)
        supervised = Supervised(self.model, self.objective, config, self.gate_loss)
        self.gradients = Gradients(
            supervised, self.batches, self.hard, world, self.device, self.lanes
        )
        self.progress = Progress()
        self.on_pace: OnPace = lambda seconds, num_steps: None
        self._step_ends: list[float] = []
        self.products: float | None = None  # operations of a step

    def finished(self) -> bool:
        """Tell whether all steps have run, or val Hit@5 has not improved for `patience` epochs."""
        epoch, progress = len(self.progress.history), self.progress
        # A memory is often learnt suddenly after a flat start: patience counts in the second half,
        # and not before the steps that a model can be judged by.
        least = MIN_STEPS if self.plan.steps >= MIN_STEPS else 0
        is_late = progress.step >= max(least, self.plan.steps / 2)
        waited = is_late and epoch - progress.best_epoch >= self.config.patience
        return epoch >= self.config.epochs or progress.step >= self.plan.steps or waited

    def warnings(self) -> list[str]:
        """Return the current warnings: those of the plan and those of the epochs so far."""
        return warnings_by_now(self.plan, self.progress.history, self.progress.best_epoch)

    def run_epoch(self) -> dict[str, float]:
        """Run the remaining optimizer steps of the current epoch; return its record."""
        progress, config = self.progress, self.config
        epoch, started = len(progress.history) + 1, time.monotonic()
        done = len(progress.losses) * config.accumulation
        num_batches = self.batches.num_batches(epoch)
        pending: list[Batch] = []
        self.model.train()
        title = f"epoch {epoch}/{config.epochs}" if self.world.is_main else None
        with part("train"), steps(None, title, "batches", num_batches, done) as bar:
            for number, batch in enumerate(self.batches.epoch(epoch, done), start=done + 1):
                pending.append(batch)
                bar.update()
                if len(pending) < config.accumulation and number < num_batches:
                    continue
                self._mine(epoch, number - len(pending))
                is_last = number == num_batches or progress.step + 1 >= self.plan.steps
                progress.losses.append(self._step(pending, is_last))
                self._tell_pace()
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}")
                pending = []
                if progress.step >= self.plan.steps:
                    break
                if self.world.is_main and self.state.due(progress.step):
                    now = time.monotonic()
                    progress.seconds, started = progress.seconds + now - started, now
                    self.save()
        return self._record(epoch, progress.seconds + time.monotonic() - started)

    def _tell_pace(self) -> None:
        """Tell the pace once the first steps of this process have been taken."""
        if len(self._step_ends) > PACED_STEPS or not self.world.is_main:
            return
        self._step_ends.append(time.monotonic())
        if len(self._step_ends) > PACED_STEPS:
            seconds = (self._step_ends[-1] - self._step_ends[0]) / PACED_STEPS
            self.on_pace(seconds, self.plan.steps - self.progress.step)

    def close_epoch(self, record: dict[str, float], validate: Validate) -> dict[str, float]:
        """Validate, remember the best weights; return the record of rank 0 on all ranks."""
        progress = self.progress
        with self.world.assisted() as leads:
            if leads:
                self._keep_best(record, validate)
                first = next(self.batches.epoch(int(record["epoch"]))).to(self.device)
                shares = part_shares(self.model, first.context_BTD)
                record |= {f"train/share_{name}": share for name, share in shares.items()}
        best = progress.best_epoch, progress.best_score
        record, best = self.world.from_main((record, best))
        progress.best_epoch, progress.best_score = best
        progress.history.append(record)
        progress.losses, progress.seconds, progress.rollbacks = [], 0.0, 0
        return record

    def save(self) -> None:
        """Write the whole state unless a value is not finite; the next step then rolls back."""
        parts = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "best": self.best_weights,
            "objective": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
            "hard": self.hard.state_dict(),
            "gate": self.gate_loss.state_dict() if self.gate_loss else {},
            "good": self.guard.tensors,
        }
        if all_finite(value for part in parts.values() for value in part.values()):
            self.state.write(parts, self.progress)

    def restore(self) -> None:
        """Resume from the state file if it belongs to this training; rank 0 reads it for all."""
        found = self.world.from_main(self.state.read() if self.world.is_main else None)
        if found is None:
            return
        parts, self.progress = found
        self.model.load_state_dict(parts["model"])
        self.averaged.load_state_dict(parts.get("averaged", {}))
        self.best_weights = {k: v.to(self.device) for k, v in parts["best"].items()}
        self.objective.load_state_dict(parts["objective"])
        restore_optimizer(self.optimizer, parts.get("optimizer", {}))
        self.hard.load_state_dict(parts.get("hard", {}))
        self.guard.load(parts.get("good", {}))
        if self.gate_loss:
            self.gate_loss.load_state_dict(parts["gate"])

    def result(self) -> TrainResult:
        """Return the best model, in evaluation mode on the CPU."""
        history, best_epoch = self.progress.history, self.progress.best_epoch
        if best_epoch == 0:
            raise self._diverged("val Hit@5 is NaN in every epoch")
        best_weights = {name: value.cpu() for name, value in self.best_weights.items()}
        self.model.load_state_dict(self.world.from_main(best_weights))
        return TrainResult(
            model=self.model.cpu().eval(),
            config=self.config,
            best_epoch=best_epoch,
            history=history,
            warnings=training_warnings(self.plan, history, best_epoch, self.progress.step),
            optimiser_steps=self.progress.step,
            plan=self.plan,
        )

    def _record(self, epoch: int, seconds: float) -> dict[str, float]:
        losses = self.progress.losses
        finite = [loss for loss in losses if math.isfinite(loss)]
        if losses and not finite:
            raise self._diverged("no loss of an epoch is finite")
        self._anneal(self.progress.step - 1)  # not done yet if a run resumes at an epoch's end
        learnt, given = self.objective.temperature().item(), self.config.temperature
        record = {
            "epoch": epoch,
            "train/loss": sum(finite) / max(1, len(finite)),
            "train/skipped_steps": len(losses) - len(finite),
            "train/rollbacks": self.progress.rollbacks,
            "train/temperature": learnt if self.config.recipe == "dense" else given,
            # Not read from the optimizer: it has taken no step then, either.
            "train/lr": self._rate(self.progress.step - 1),
            "train/seconds": seconds,
            **{f"train/{name}": value for name, value in self.progress.norms.items()},
        }
        if self.config.hard_negatives:
            record["train/hard_positions"] = self.hard.num_positions()
        if self.gate_loss:
            loads = load_figures(self.gate_loss.take_counts().cpu().numpy())
            record |= {f"train/{name}": value for name, value in loads.items()}
        return record

    def _keep_best(self, record: dict[str, float], validate: Validate) -> None:
        """Validate the raw and the averaged weights; remember the better if they are a new best."""
        averaged, progress = self.averaged.model(), self.progress
        better, figures = self.model, validate(self.model)
        record["val/raw_hit_at_5"] = figures["hit_at_5"]
        if averaged is not None:
            smooth = validate(averaged)
            record["val/averaged_hit_at_5"] = smooth["hit_at_5"]
            if smooth["hit_at_5"] >= figures["hit_at_5"]:
                better, figures = averaged, smooth
        record.update({f"val/{name}": value for name, value in figures.items()})
        if figures["hit_at_5"] > progress.best_score:
            progress.best_score = figures["hit_at_5"]
            progress.best_epoch = int(record["epoch"])
            self.best_weights = {k: v.detach().clone() for k, v in better.state_dict().items()}
        record["best/hit_at_5"] = progress.best_score

    def _mine(self, epoch: int, next_batch: int) -> None:
        """Mine the hard negatives of an epoch before its first step that uses them."""
        config, progress = self.config, self.progress
        is_late = progress.step >= config.hard_from * self.plan.steps
        if config.hard_negatives and is_late and progress.mined_epoch != epoch:
            draw = generator(config.seed, f"hard negatives of epoch {epoch}")
            self.hard.mine(self.model, self.batches.upcoming(epoch, next_batch), draw, self.world)
            progress.mined_epoch = epoch
            forget(progress)  # new negatives change the scale of the loss

    def _anneal(self, step: int) -> None:
        """Set the loss to what it is at a step."""
        if self.config.recipe == "dense":
            self.objective.anneal(self.config.focus, step / self.plan.steps)

    def _step(self, pending: list[Batch], is_last: bool) -> float:
        """Take one optimizer step over the accumulated batches; return their mean loss.

        The norms of the parts are recorded at the last step of an epoch. A step is skipped if a
        loss, gradient or weight is not finite; 20 skips in a row, or more than 10 rollbacks in all,
        stop the training.
        """
        progress = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(progress.step)
        self._anneal(progress.step)
        if self.config.focus and progress.step == (self.plan.steps + 1) // 2:
            forget(progress)  # the loss is the same from here on, and so is its scale
        total = self._backward(pending)
        norms = PartNorms(self.model) if is_last else None
        counts = self.guard.step(progress, total)
        if norms is not None:
            progress.norms = norms.figures()
        progress.skipped_in_a_row = 0 if counts else progress.skipped_in_a_row + 1
        progress.step += 1
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise self._diverged("loss, gradient or weights are not finite")
        if num_rollbacks(progress) > MAX_ROLLBACKS:
            raise self._diverged(f"the loss spiked more than {MAX_ROLLBACKS} times")
        return total if counts else math.nan

    def _backward(self, pending: list[Batch]) -> float:
        """Leave the gradient of the batches; count the products of the first step for all."""
        backward = partial(self.gradients.backward, self.progress.step, pending)
        if self.products is None and self.world.size == 1:
            total, self.products = count_products(backward)
        else:
            total = backward()
        add_products(self.products or 0.0)
        return total

    def _rate(self, step: int) -> float:
        return self.config.lr * lr_share(step, self.plan.steps, self.plan.warmup)

    def _diverged(self, reason: str) -> ValueError:
        return ValueError(f"lr: {self.config.lr} diverged, {reason}; use a smaller lr")
