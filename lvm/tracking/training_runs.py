"""Runs of `train`: header, validation of each epoch, what is logged, the registered model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import MAX_QUERIES, Evaluation, evaluate, evaluate_together
from lvm.evaluation.metrics import figures, hit_at, smallest_detectable
from lvm.models.facts import facts_of
from lvm.models.predict import predict_queries, predict_routed
from lvm.models.tmd_experts import TMDExperts, has_gate
from lvm.models.weights import load_state
from lvm.report.evaluation import (
    evaluation_table,
    experts_figure,
    second_stage_line,
    training_figure,
    training_note,
)
from lvm.report.tables import order_metrics
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.rerank import fit_reranker
from lvm.system.processes import num_cores
from lvm.system.progress import part
from lvm.tracking import logged_models, runs
from lvm.tracking.datasets import Inputs
from lvm.tracking.initial import Start
from lvm.tracking.registry import ARTIFACT, NAME, Registry, metric_tags
from lvm.tracking.runs import WarningLog, publish_report
from lvm.training.checkpoint import state_sha256
from lvm.training.config import Settings, as_dict
from lvm.training.expert_gate import lane_table, mutual_information
from lvm.training.guard import validation_warnings
from lvm.training.loop import OnEpoch, TrainResult, train
from lvm.training.optimizer import TrainingPlan
from lvm.windows.planning import Windows

STATES = Path("data/training")
CHOICE_QUERIES = 2000
# The free predictors that can be the best; `eval` shows the others as well.
SHOWN_FREE = ("copy-last", "ema", "ridge", "context-ridge")
# Settings that have their own line, or that few models have.
DERIVED = ("model", "device", "precision", "decay", "init", "trunk")


def training_header(
    bank: Bank,
    windows: Windows,
    config: Settings,
    automatic: Collection[str],
    plan: TrainingPlan,
    num_parameters: int,
) -> str:
    """Return what is trained, on what and how; `automatic` names the settings that were auto."""
    cores = f" (cores: {num_cores()})" if config.device == "cpu" else ""
    lanes = f", {len(bank.lanes)} lanes" if bank.lanes else ""
    counts = windows.counts
    values = as_dict(config).items()
    chosen = [f"{k} {v}" for k, v in values if k in automatic and k not in DERIVED]
    lines = {
        "bank": f"{bank.path}: {bank.num_rows:,} rows of {bank.dim} dims{lanes}, {bank.encoder}",
        "windows": f"ctx {windows.ctx}, split by {windows.split}: {counts['train_windows']:,} to "
        f"train on, {len(windows.queries['val']):,} val queries",
        "model": f"{config.model}, {num_parameters:,} parameters",
        "device": f"{config.device}{cores}, {config.precision}",
        "auto": ", ".join(one for one in chosen if not one.endswith(" None")) or "nothing",
        "plan": f"{plan.steps:,} steps, {plan.steps_per_epoch:,} of them an epoch; "
        f"{plan.examples_per_epoch:,} examples an epoch",
    }
    return "\n".join(f"{name:<8} {words}" for name, words in lines.items())


def pace_line(seconds: float, num_steps: int) -> str:
    """Return the time that `num_steps` will take at `seconds` per step."""
    minutes = seconds * num_steps / 60
    total = f"{minutes:.0f} min" if minutes >= 2 else f"{60 * minutes:.0f} s"
    return f"time     {num_steps:,} steps of {seconds:.2f} s: {total}, and a validation each epoch"


class Validation:
    """The val queries of a training, the same that `eval` asks with split=val.

    An epoch is measured on `sample`, the first CHOICE_QUERIES of them; their frozen order is
    random. Differences between epochs are paired, so a few queries tell them apart.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.bank, self.windows = inputs.bank, inputs.windows
        self.queries = inputs.windows.queries["val"].head(MAX_QUERIES)
        self.sample = self.queries.head(CHOICE_QUERIES)
        self.truth_QD = inputs.bank.unit(self.sample.target_row_Q)
        self._measured: list[NDArray[np.float64]] = []

    @part("validate")
    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the plain filtered figures on the sample, and the mean cosine to the truth."""
        found = {}
        if has_gate(model):
            asked = (model, self.bank, self.sample)
            prediction_QD, gate_QX = predict_routed(*asked)
            found["gate_lane_mi"] = mutual_information(self.lane_table(gate_QX))
        else:
            prediction_QD = predict_queries(model, self.bank, self.sample)
        found["cosine"] = float((prediction_QD * self.truth_QD).sum(axis=1).mean())
        groups = self.windows.representative_N
        (ranks,) = exact_ranks(prediction_QD, self.sample, self.bank, groups)
        return figures(ranks.rank_Q) | found

    def lane_table(self, gate_QX: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the weight of each expert over the val queries of each lane, (L, X)."""
        if self.bank.lane_N is None:
            return gate_QX.sum(axis=0, keepdims=True)
        lane_Q = self.bank.lane_N[self.sample.target_row_Q]
        return lane_table(gate_QX, lane_Q, len(self.bank.lanes))

    @part("free predictors on val")
    def measure(self, models: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """Return the figures of the free predictors, plain and corrected, in one pass of the bank.

        They are of all queries, with intervals by document; `sample` holds the plain ones of the
        sample.
        """
        measured = {}
        seed = self.windows.seed
        for one in evaluate_together(models, self.bank, self.windows, self.queries, seed):
            rank_Q = one.per_query["rank"].to_numpy()
            measured[one.name] = one.report | {"sample": figures(rank_Q[: len(self.sample)])}
            self._measured.append(hit_at(rank_Q, 5))
        return measured

    def summary(self, measured: Mapping[str, Mapping[str, Any]]) -> str:
        """Return a line with the Hit@5 of the free predictors on the sample."""
        few, many = len(self.sample), len(self.queries)
        on = f"{few:,} of {many:,} val queries, which choose the epoch" if few < many else "val"
        hits = [f"{name} {100 * one['sample']['hit_at_5']:.2f} %" for name, one in measured.items()]
        return f"Hit@5 of free predictors on {on}: {', '.join(hits)}"

    def warnings(self) -> list[str]:
        """Return warnings on what these queries cannot detect."""
        second_Q, first_Q = sorted(self._measured, key=lambda hit_Q: float(hit_Q.mean()))[-2:]
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        detectable = smallest_detectable(first_Q - second_Q, document_Q)
        return validation_warnings(len(self.queries), detectable)

    def experts_figure(self, model: TMDExperts) -> Figure:
        """Draw which experts the model chooses in each lane."""
        table_LX = self.lane_table(predict_routed(model, self.bank, self.sample)[1])
        return experts_figure(table_LX, self.bank.lanes or ("no lanes",), self.windows.leaky)


def name_training(config: Settings, phase: str | None, ctx: int, typed: str) -> None:
    """Name and tag the run so that it can be told apart in the run list."""
    words = [typed, config.model, "ctx", str(ctx), config.recipe, f"phase {phase}" if phase else ""]
    runs.name_run(" ".join(filter(None, words)))
    tags = {"model": config.model, "phase": phase or "none", "recipe": config.recipe}
    tags |= {"init": config.init or "none", "experts_control": config.experts_control}
    runs.set_tags(tags)


def train_logged(
    inputs: Inputs,
    config: Settings,
    validation: Validation,
    automatic: Collection[str],
    state: Path,
    **shared: Any,
) -> TrainResult:
    """Train; log each epoch; print the header, the pace, and each warning once.

    `automatic` names the settings that were auto; `shared` are the world and the first weights.
    """
    warnings = WarningLog(validation.warnings())
    result = train(
        inputs.bank,
        inputs.windows,
        config,
        validate=validation.figures,
        on_epoch=lambda record: log_epoch(record, inputs),
        on_warnings=warnings.update,
        on_start=lambda plan, size: print(
            training_header(inputs.bank, inputs.windows, config, automatic, plan, size),
            flush=True,
        ),
        on_pace=lambda seconds, steps: tqdm.write(pace_line(seconds, steps)),
        state_path=state,
        **shared,
    )
    return replace(result, warnings=warnings.update(result.warnings))


def log_epoch(record: dict[str, float], inputs: Inputs) -> None:
    """Log one epoch in one batch; print it as a line."""
    epoch = int(record["epoch"])
    values = {name: value for name, value in record.items() if name != "epoch"}
    runs.log_metrics(values, step=epoch, dataset=inputs.dataset)
    hits = "  ".join(f"Hit@{k} {100 * record[f'val/hit_at_{k}']:.2f} %" for k in (1, 5, 10))
    seconds = record["train/seconds"]
    print(
        f"epoch {epoch}: loss {record['train/loss']:.4f}  val {hits}  ({seconds:.0f} s)", flush=True
    )


def state_path(
    config: Settings, windows: Windows, num_processes: int = 1, initial: nn.Module | None = None
) -> Path:
    """Return the file of an unfinished training, from which the same training goes on."""
    key = state_sha256(config, windows, num_processes, initial)[:12]
    return STATES / f"{config.model}-ctx{windows.ctx}-{key}.safetensors"


def prepare_state(state: Path, resume: str, on_epoch: OnEpoch) -> None:
    """Apply `resume`; call `on_epoch` for each epoch that an interrupted run has finished.

    Raises ValueError if `resume` is true and there is nothing to resume.
    """
    if resume == "true" and not state.is_file():
        raise ValueError("resume: no interrupted run of this configuration is there; use auto")
    if resume == "false":
        state.unlink(missing_ok=True)
    if state.is_file():
        print(f"going on from {state}")
        for record in load_state(state)[1]["history"]:
            on_epoch(record)


@dataclass(frozen=True)
class Publication:
    """How a trained model is published; `registry` None: it is not registered.

    `start` is the model that its training started from, if any.
    """

    phase: str
    registry: Registry | None
    log_bank: bool
    report_path: str | None
    start: Start | None = None


def finish_training(
    inputs: Inputs,
    result: TrainResult,
    rivals: Mapping[str, Mapping[str, Any]],
    wanted: Publication,
) -> None:
    """Evaluate the best model on val; log it, and register it if wanted."""
    registry = wanted.registry
    name = result.config.model
    bank, windows = inputs.bank, inputs.windows
    report, (own,) = evaluate(name, result.model, bank, windows, "val", baselines=False)
    report |= {
        "baselines": dict(rivals),
        "best_epoch": result.best_epoch,
        "warnings": result.warnings,
    }
    report |= {"plan": result.plan.report(), "optimiser_steps": result.optimiser_steps}
    facts = facts_of(name, wanted.phase, bank, windows, result.config.recipe)
    twin_row = None
    if wanted.start is not None:
        facts, twin_row = wanted.start.told_by(facts), wanted.start.twin_row
    step = result.best_epoch
    reranker = fit_reranker(result.model, bank, windows, own.row_correction, windows.seed)
    model_id = logged_models.log_predictor(
        result.model, facts, own.row_correction, step, reranker, wanted.log_bank, twin_row
    )
    log_best(inputs, model_id, result, own)
    orders = {} if reranker is None else reranker.report()
    hits = {name: rival["sample"]["hit_at_5"] for name, rival in rivals.items()}
    corrected = own.report["corrected"]
    curve = training_figure(result.history, result.best_epoch, hits, windows.leaky)
    runs.log_artifact(curve, "training.png")
    reached = metric_tags(own.report, own.report["ci95"], corrected, corrected["ci95"])
    version = None if registry is None else registry.register(model_id, facts, reached)
    print(evaluation_table(report))
    print(second_stage_line(orders))
    where = "not registered" if registry is None else f"version {version} of {registry.name}"
    print(f"best epoch {result.best_epoch}; model {model_id}, {where}")
    reference = version or f"runs:/{runs.active_run_id()}/{ARTIFACT}"
    print(next_commands(reference, None if registry is None else registry.name), flush=True)
    report |= {"history": result.history, "model_id": model_id, "version": version}
    report |= {"second_stage": orders}
    report |= {"init": {} if wanted.start is None else wanted.start.counts(windows)}
    runs.describe_run(training_note(report, where))
    publish_report(report, wanted.report_path)


def next_commands(reference: str, registry: str | None) -> str:
    """Return the commands to type after a training; `registry` is None if it was not registered."""
    named = "" if registry in (None, NAME) else f" --registry {registry}"
    lines = [f"next: lvm eval --model {reference}{named}   # test figures, beside free predictors"]
    if registry is not None:
        lines.append(f"then: lvm shadow-eval --promote enabled{named}   # the new baseline?")
    return "\n".join(lines)


def log_best(inputs: Inputs, model_id: str, result: TrainResult, own: Evaluation) -> None:
    """Log the figures of the best epoch with the model."""
    best = order_metrics("best/", own.report, own.report["corrected"])
    runs.log_metrics(
        best | {"best/epoch": result.best_epoch},
        step=len(result.history),  # after the epochs, whose figures are of the sample
        model_id=model_id,
        dataset=inputs.dataset,
    )
