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

from entrypoints._validation import Validation
from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.evaluation.evaluate import Evaluation, evaluate
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models.facts import facts_of
from lvm.models.recurrent import CELLS
from lvm.models.table import TRAINED_MODELS
from lvm.models.tmd_experts import has_gate
from lvm.models.weights import load_state
from lvm.report.evaluation import evaluation_table
from lvm.report.notes import training_note
from lvm.report.tables import HITS
from lvm.report.training import training_figure
from lvm.retrieval.rerank import reranker_if_lanes
from lvm.studies.phases.table import read_phases
from lvm.system.processes import SIGNALS
from lvm.tracking import alias, logged_models
from lvm.tracking import runs as tracking
from lvm.tracking import versions as registered
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, Inputs, make_inputs, read_bank
from lvm.tracking.logged_models import read_initial
from lvm.tracking.runs import WarningLog, publish_report
from lvm.tracking.versions import metric_tags
from lvm.training.averaging import AVERAGES
from lvm.training.config import (
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
from lvm.training.fingerprint import state_sha256, training_sha256
from lvm.training.loop import TrainResult, train
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
        tracking.log_config(shown, decided)
        label = f" phase {options.phase}" if options.phase else ""
        tracking.name_run(f"{config.model} ctx {inputs.windows.ctx} {config.recipe}{label}")
        tags = {"model": config.model, "phase": options.phase or "none", "recipe": config.recipe}
        tags |= {"init": config.init or "none", "experts_control": config.experts_control}
        tags |= {"training_sha256": training_sha256(config, inputs.windows, initial)}
        tracking.set_tags(tags)
        key = state_sha256(config, inputs.windows, launched_size(), initial)[:12]
        state = STATES / f"{config.model}-ctx{inputs.windows.ctx}-{key}.safetensors"
        prepare_state(state, options.resume, inputs)
        rivals = {name: validation.measure(model) for name, model in free.items()}
        told = [f"{name} {100 * rival['hit_at_5']:.2f} %" for name, rival in rivals.items()]
        print(f"val Hit@5 of the free predictors: {', '.join(told)}", flush=True)
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
    finish(options, inputs, replace(result, warnings=warnings.update(result.warnings)), rivals)
    if has_gate(result.model):
        tracking.log_artifact(validation.experts_figure(result.model), "experts.png")
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


def log_epoch(record: dict[str, float], inputs: Inputs) -> None:
    """Log one epoch in one batch; print it as a line."""
    epoch = int(record["epoch"])
    values = {name: value for name, value in record.items() if name != "epoch"}
    tracking.log_metrics(values, step=epoch, dataset=inputs.dataset)
    hits = "  ".join(f"Hit@{k} {100 * record[f'val/hit_at_{k}']:.2f} %" for k in (1, 5, 10))
    seconds = record["train/seconds"]
    print(
        f"epoch {epoch}: loss {record['train/loss']:.4f}  val {hits}  ({seconds:.0f} s)", flush=True
    )


def prepare_state(state: Path, resume: str, inputs: Inputs) -> None:
    """Apply `resume`; log the epochs that an interrupted run has behind it.

    Raises ValueError where it is true without anything to go on from.
    """
    if resume == "true" and not state.is_file():
        raise ValueError("resume: no interrupted run of this configuration is there; use auto")
    if resume == "false":
        state.unlink(missing_ok=True)
    if state.is_file():
        print(f"going on from {state}")
        for record in load_state(state)[1]["history"]:
            log_epoch(record, inputs)


def finish(
    options: TrainOptions, inputs: Inputs, result: TrainResult, rivals: dict[str, Any]
) -> None:
    """Evaluate the best model on val, log it with its figures, register it."""
    name, phase = result.config.model, options.phase or "none"
    bank, windows = inputs.bank, inputs.windows
    report, (own,) = evaluate(name, result.model, bank, windows, "val", baselines=False)
    report |= {"baselines": rivals, "best_epoch": result.best_epoch, "warnings": result.warnings}
    report |= {"plan": result.plan.report(), "optimiser_steps": result.optimiser_steps}
    facts = facts_of(name, phase, bank, windows, result.config.recipe)
    step = result.best_epoch
    reranker = reranker_if_lanes(result.model, bank, windows, own.row_correction, windows.seed)
    model_id = logged_models.log_predictor(result.model, facts, own.row_correction, step, reranker)
    log_best(inputs, model_id, result, own)
    hits = {name: rival["hit_at_5"] for name, rival in rivals.items()}
    corrected = own.report["corrected"]
    curve = training_figure(result.history, result.best_epoch, hits, windows.leaky)
    tracking.log_artifact(curve, "training.png")
    reached = metric_tags(own.report, own.report["ci95"], corrected, corrected["ci95"])
    version = registered.register(model_id, facts, reached) if options.register else None
    print(evaluation_table(report))
    for warning in result.warnings:
        print(f"warning: {warning}")
    where = "not registered" if version is None else f"version {version} of {alias.NAME}"
    print(f"best epoch {result.best_epoch}; model {model_id}, {where}")
    report |= {"history": result.history, "model_id": model_id, "version": version}
    tracking.describe_run(training_note(report, version))
    publish_report(report, options.report)


def log_best(inputs: Inputs, model_id: str, result: TrainResult, own: Evaluation) -> None:
    """Log the figures of the best epoch with the model, beside the training curve."""
    best = {f"best/{name}": own.report[name] for name in HITS}
    best |= {"best/corrected_hit_at_5": own.report["corrected"]["hit_at_5"]}
    tracking.log_metrics(
        best | {"best/epoch": result.best_epoch},
        step=result.best_epoch,
        model_id=model_id,
        dataset=inputs.dataset,
    )


main = SharedEntryPoint("train", TrainOptions, body)

if __name__ == "__main__":
    sys.exit(main())
