"""Command: train a predictor, log it, register it."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import os
import signal
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models.recurrent import CELLS
from lvm.models.table import TRAINED_MODELS
from lvm.models.tmd_experts import has_gate
from lvm.studies.phases import read_phases
from lvm.system.processes import SIGNALS
from lvm.tracking import runs
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, make_inputs, read_bank
from lvm.tracking.logged_models import read_initial
from lvm.tracking.runs import WarningLog
from lvm.tracking.training_runs import Validation, finish_training, log_epoch, prepare_state
from lvm.training.checkpoint import state_sha256, training_sha256
from lvm.training.config import (
    AVERAGES,
    DEVICES,
    EXPERTS_CONTROLS,
    PRECISIONS,
    RECIPES,
    TRUNKS,
    TrainConfig,
    as_dict,
    chosen_device,
    resolve,
)
from lvm.training.distributed import joined, launched_rank, launched_size
from lvm.training.loop import train
from lvm.windows.export import ensure_windows

STATES = Path("data/training")


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; those of `TrainConfig` have its defaults."""

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int | None = option(
        None, f"Rows of context (auto: the phase's, else {DEFAULT_CTX}).", low=2
    )
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    phase: str | None = option(
        None,
        "Phase of lvm/phases.yaml, which decides what is auto; another name is a label.",
        unset="none",
    )
    model: str | None = option(
        None,
        f"Predictor (auto: the phase's, else {TrainConfig.model}).",
        choices=tuple(TRAINED_MODELS),
    )
    init: str | None = option(
        TrainConfig.init,
        "Predictor whose weights training starts from: a version, models:/..., runs:/...",
        unset="none",
    )
    recipe: str = option(TrainConfig.recipe, "Decides what is auto.", choices=RECIPES)
    epochs: int | None = option(TrainConfig.epochs, "Epochs at most.", low=1)
    max_steps: int | None = option(
        TrainConfig.max_steps, "Optimiser steps at most (auto: epochs decide).", low=1
    )
    batch_size: int | None = option(TrainConfig.batch_size, "Windows a batch.", low=1)
    accumulation: int | None = option(TrainConfig.accumulation, "Batches a step.", low=1)
    lr: float | None = option(TrainConfig.lr, "Peak learning rate.", low=0)
    weight_decay: float | None = option(TrainConfig.weight_decay, "AdamW's weight decay.", low=0)
    alpha: float | None = option(
        TrainConfig.alpha, "Weight of a loss term: dense: of 1 - cos; seed: of InfoNCE.", low=0
    )
    temperature: float | None = option(TrainConfig.temperature, "Softmax temperature.", low=0)
    focus: float | None = option(
        TrainConfig.focus, "Weight of targets within reach: 0 (cross entropy) to 1.", low=0
    )
    negatives: int | None = option(TrainConfig.negatives, "Bank negatives a step.", low=0)
    hard_negatives: int = option(
        TrainConfig.hard_negatives, "Negatives a position that the model confuses.", low=0
    )
    hard_from: float = option(
        TrainConfig.hard_from, "Share of the steps before hard negatives.", low=0
    )
    patience: int | None = option(TrainConfig.patience, "Epochs without a better Hit@5.", low=1)
    averaging: str | None = option(
        TrainConfig.averaging, "Average of the weights.", choices=AVERAGES
    )
    chunk: int | None = option(
        None, f"Steps of a chunk (auto: the phase's, else {TrainConfig.chunk}).", low=1
    )
    slots: int = option(TrainConfig.slots, "Slots of the memory.", low=1)
    cell: str = option(TrainConfig.cell, "Recurrent cell.", choices=CELLS)
    hidden: int | None = option(
        TrainConfig.hidden, "Width of the states (auto: the phase's, else the model's).", low=1
    )
    layers: int | None = option(
        TrainConfig.layers, "Layers (auto: the phase's, else the model's).", low=1
    )
    dropout: float = option(TrainConfig.dropout, "Share of states dropped in training.", low=0)
    trunk: str | None = option(
        TrainConfig.trunk,
        "What experts share (auto: frozen where tmd_experts has an init).",
        choices=TRUNKS,
    )
    experts: int = option(TrainConfig.experts, "Experts of tmd_experts.", low=1)
    expert_rank: int = option(TrainConfig.expert_rank, "Rank of each expert's map.", low=1)
    experts_control: str = option(
        TrainConfig.experts_control,
        "Rival of the experts: one expert of twice the rank, lanes permuted among documents.",
        choices=EXPERTS_CONTROLS,
    )
    gate_balance: float = option(TrainConfig.gate_balance, "Weight of the gate's balance.", low=0)
    gate_z: float = option(TrainConfig.gate_z, "Weight of the gate's z-loss.", low=0)
    gate_lanes: float = option(
        TrainConfig.gate_lanes, "First weight of the targets' lanes, 0 at the end.", low=0
    )
    device: str = option(TrainConfig.device, "Where to train.", choices=DEVICES)
    precision: str = option(TrainConfig.precision, "Arithmetic.", choices=PRECISIONS)
    gradient_checkpointing: bool = option(
        TrainConfig.gradient_checkpointing, "Compute activations twice instead of keeping them."
    )
    seed: int = option(TrainConfig.seed, "Seed of weights, batches, negatives.", low=0)
    resume: str = option(
        "auto",
        "Go on from an interrupted run of this very configuration (auto: where there is one).",
        choices=("auto", "true", "false"),
    )
    register: bool = option(True, "Register the model as a version of lvm.")
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)
        self.config()

    def decided(self) -> dict[str, Any]:
        """Return what the phase decides: its settings of the options that are auto.

        Its sizes are those of its own model; another model keeps its own sizes. A phase that the
        table does not have decides nothing.
        """
        phase = read_phases().get(self.phase or "")
        settings = {} if phase is None else phase.settings(self.recipe)
        if phase is not None and self.model not in (None, settings["model"], phase.grown):
            settings = {k: v for k, v in settings.items() if k not in ("hidden", "layers")}
        return {name: value for name, value in settings.items() if getattr(self, name) is None}

    def with_phase(self) -> "TrainOptions":
        """Return the options with what their phase decides, with a context length."""
        decided = self.decided()
        return replace(self, **{"ctx": self.ctx or decided.get("ctx", DEFAULT_CTX)} | decided)

    def config(self) -> TrainConfig:
        """Return the part that training reads; what is auto is left to `TrainConfig`."""
        given = vars(self) | self.decided()
        shared = {field.name for field in fields(TrainConfig)} & given.keys()
        return TrainConfig(**{name: given[name] for name in shared if given[name] is not None})


class SharedEntryPoint(EntryPoint[TrainOptions]):
    """Under torchrun, rank 0 alone opens a run, validates, logs, writes; the others train along."""

    def __call__(self, arguments: list[str] | None = None) -> int:
        if launched_rank() > 0:
            os.environ.pop("MLFLOW_RUN_ID", None)
        return super().__call__(arguments)

    def _run(self, **values: Any) -> None:
        if launched_rank() > 0:
            follow(TrainOptions(**values))
        else:
            super()._run(**values)


def body(options: TrainOptions) -> None:
    """Train a predictor on the train rows of a bank, choosing the epoch by val Hit@5."""
    decided, options = options.decided(), options.with_phase()
    if decided:
        print(f"phase {options.phase} decides: {', '.join(f'{k} {v}' for k, v in decided.items())}")
    with joined(chosen_device(options.device)) as world:
        inputs = make_inputs(read_bank(options.bank), options.ctx, options.windows, "training")
        validation = Validation(inputs)
        free = fit_free_predictors(inputs.bank, inputs.windows, seed=inputs.windows.seed)
        initial = read_initial(options.init, inputs)
        decay = float((initial or free["ema"]).config["decay"])  # type: ignore[index]
        config = resolve(replace(options.config(), decay=decay), inputs.windows.ctx)
        shown = vars(options) | as_dict(config) | {"overlap": inputs.windows.overlap}
        runs.log_config(shown, decided)
        label = f" phase {options.phase}" if options.phase else ""
        runs.name_run(f"{config.model} ctx {inputs.windows.ctx} {config.recipe}{label}")
        tags = {"model": config.model, "phase": options.phase or "none", "recipe": config.recipe}
        tags |= {"init": config.init or "none", "experts_control": config.experts_control}
        tags |= {"training_sha256": training_sha256(config, inputs.windows, initial)}
        runs.set_tags(tags)
        key = state_sha256(config, inputs.windows, launched_size(), initial)[:12]
        state = STATES / f"{config.model}-ctx{inputs.windows.ctx}-{key}.safetensors"
        prepare_state(state, options.resume, inputs)
        rivals = validation.measure_free(free)
        hits = {name: rival["corrected"]["hit_at_5"] for name, rival in rivals.items()}
        told = [f"{name} {100 * hit:.2f} %" for name, hit in hits.items()]
        print(f"val Hit@5 of the free predictors, corrected: {', '.join(told)}", flush=True)
        warnings = WarningLog(validation.warnings())
        world.from_main((config, initial, inputs.bank.sha256, inputs.windows.sha256))
        result = train(
            inputs.bank,
            inputs.windows,
            config,
            validate=validation.figures,
            on_epoch=lambda record: log_epoch(record, inputs),
            on_warnings=warnings.update,
            state_path=state,
            world=world,
            initial=initial,
        )
    result = replace(result, warnings=warnings.update(result.warnings))
    phase = options.phase or "none"
    finish_training(inputs, result, rivals, phase, options.register, options.report)
    if has_gate(result.model):
        runs.log_artifact(validation.experts_figure(result.model), "experts.png")
    state.unlink(missing_ok=True)


def follow(options: TrainOptions) -> None:
    """Train along with rank 0, whose configuration holds, once it has prepared the data.

    Raises ValueError where this process finds other data.
    """
    options = options.with_phase()
    for number in SIGNALS:  # nothing to record here: a stop ends the process, even in a collective
        signal.signal(number, signal.SIG_DFL)
    with joined(chosen_device(options.device)) as world:
        shared: tuple[TrainConfig, nn.Module | None, str, str] = world.from_main(None)
        config, initial, *digests = shared
        bank = read_bank(options.bank)
        windows = ensure_windows(bank, options.ctx, options.windows)
        if digests != [bank.sha256, windows.sha256]:
            raise ValueError(f"bank: rank {world.rank} reads other rows or windows than rank 0")
        train(bank, windows, config, validate=lambda model: {}, world=world, initial=initial)


main = SharedEntryPoint("train", TrainOptions, body)

if __name__ == "__main__":
    sys.exit(main())
