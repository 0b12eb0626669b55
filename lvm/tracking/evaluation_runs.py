"""Runs of `eval` and `lane-diagnostics`: measure, log, and read back.

Shapes: Q queries, D vector dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.bank import FloatArray
from lvm.evaluation.controls import run_ablations, run_controls
from lvm.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_reranking,
    example_table,
    lane_report,
    long_table,
)
from lvm.evaluation.lane_assignment import (
    BANK,
    Agreement,
    Assignment,
    assign_lanes,
    lane_agreement,
)
from lvm.evaluation.lane_ceilings import Ceilings, lane_ceilings, search_table
from lvm.evaluation.lane_diagnosis import Diagnosis, best_free_lanes
from lvm.evaluation.latency import measure_serving
from lvm.models.facts import omits_own_document
from lvm.models.predict import predict_queries
from lvm.models.skip import Skip
from lvm.report.evaluation import context_figure, examples_page
from lvm.report.lanes import (
    agreement_figure,
    assignment_line,
    assignment_table,
    ceilings_table,
    confusion_figure,
    hits_table,
    lane_figure,
    lanes_note,
    lanes_screen,
    lanes_table,
    larger_k_figure,
    supply_line,
)
from lvm.report.tables import order_metrics
from lvm.retrieval.index import ensure_index
from lvm.system.settings import LaneRules
from lvm.tracking import runs
from lvm.tracking.datasets import read_bank
from lvm.tracking.initial import twin_figures
from lvm.tracking.logged_models import Subject, open_subject
from lvm.tracking.registry import NAME, Registry
from lvm.windows.planning import IntArray, Queries

MEASURED = "measured.parquet"
SAME_MODEL = 0.99  # least cosine to the recorded prediction; rounding alone moves it by 1e-4
COMPARED = 8
EVAL = "eval"  # the entry point whose runs can be judged


@dataclass(frozen=True)
class Measurement:
    """The report of one predictor; `evaluations` has its own first, then those of the free ones."""

    subject: Subject
    queries: Queries
    report: dict[str, Any]
    evaluations: list[Evaluation]

    @property
    def own(self) -> Evaluation:
        """Return the evaluation of the predictor itself."""
        return self.evaluations[0]


def measure_subject(
    subject: Subject, settings: Mapping[str, Any], baselines: bool = True
) -> Measurement:
    """Evaluate the predictor beside the free ones; log its figures.

    `settings` are the command's; `split` and `max_queries` are read from them.

    The column `split` of the per-query tables names the split of the queries.
    """
    inputs, split = subject.inputs, settings["split"]
    bank, windows = inputs.bank, inputs.windows
    plan = {"split_kind": windows.split, "split_seed": windows.seed}
    runs.log_config(dict(settings) | {"ctx": windows.ctx, "bank": str(bank.path)} | plan)
    asked = [f"{key} {settings[key]}" for key in ("max_queries", "rerank") if settings.get(key)]
    runs.name_run(" ".join([subject.title(), split, *asked]).removesuffix(" rerank none"))
    runs.set_tags(subject.tags())
    report, evaluations = evaluate(
        subject.name,
        subject.predictor.model,
        bank,
        windows,
        split,
        settings["max_queries"],
        baselines,
        counts_own=not omits_own_document(subject.predictor.facts.fit_version),
    )
    evaluations = [replace(e, per_query=e.per_query.assign(split=split)) for e in evaluations]
    report["leaky"] = subject.is_leaky()
    metrics = order_metrics(f"{split}/", report, report["corrected"])
    runs.log_metrics(metrics, model_id=subject.predictor.model_id, dataset=inputs.dataset)
    queries = windows.queries[split].head(report["queries"])
    return Measurement(subject, queries, report, evaluations)


def log_answers(measurement: Measurement, split: str) -> None:
    """Log the answers to all queries; some with their contexts and the retrieved passages."""
    own = measurement.own
    runs.log_artifact(own.per_query, "per_query.parquet")
    runs.log_artifact(long_table(measurement.evaluations), MEASURED)
    runs.log_artifact(own.predictions, "predictions.npy")
    runs.log_artifact(own.row_correction, "row_correction.npy")
    inputs = measurement.subject.inputs
    examples = example_table(measurement.own, measurement.queries, inputs.bank, inputs.windows)
    runs.log_artifact(examples, "examples.json")
    title = f"{measurement.subject.name}: examples of the {split} queries"
    runs.log_artifact(examples_page(title, examples, measurement.report["leaky"]), "examples.html")


def measure_twins(measurement: Measurement, split: str, twin_row: IntArray) -> dict[str, Any]:
    """Return the figures without the marked queries; log them and the marked answers."""
    per_query = measurement.own.per_query
    target_row_Q = per_query["target_row"].to_numpy()
    ranks = {"plain": per_query["rank"], "corrected": per_query["rank_corrected"]}
    found = twin_figures(twin_row, target_row_Q, ranks)
    runs.log_artifact(per_query[np.isin(target_row_Q, twin_row)], "init_twins.parquet")
    runs.log_metrics({f"{split}/init_twins": float(found["queries"])})
    return found


def serve(measurement: Measurement) -> dict[str, Any]:
    """Search the serving index with the predictions; add its latency to the report."""
    subject, own = measurement.subject, measurement.own
    bank, windows, model = subject.inputs.bank, subject.inputs.windows, subject.predictor.model
    # The index is tuned on val queries of these windows: the model's own may not fit this bank.
    plan: dict[str, Any] = {"ctx": windows.ctx, "split": windows.split, "seed": windows.seed}
    index = ensure_index(bank, model, replace(subject.predictor.facts, **plan), own.row_correction)
    groups = windows.representative_N
    measured, times = measure_serving(index, model, windows.ctx, own.predictions, groups)
    measurement.report["latency_ms"] |= times
    logged = {f"latency_ms/{name}": value for name, value in times.items()}
    runs.log_metrics(logged | {"index/agreement": measured["agreement"]})
    return measured


def rerank(measurement: Measurement, split: str, order: str) -> dict[str, Any]:
    """Re-rank the answers by a second stage; log the figures of the new ranks."""
    predictor, inputs = measurement.subject.predictor, measurement.subject.inputs
    found, ranks = evaluate_reranking(
        predictor.model, inputs.bank, inputs.windows, measurement.queries, measurement.own, order
    )
    runs.log_artifact(ranks, "reranked.parquet")
    metrics = order_metrics(f"{split}/reranked_", found["plain"], found["corrected"])
    runs.log_metrics(metrics, model_id=predictor.model_id, dataset=inputs.dataset)
    return found


def ablate(measurement: Measurement, split: str) -> dict[str, Any]:
    """Evaluate without each part of the model on the first of the measured queries; log Hit@5."""
    subject, queries = measurement.subject, measurement.queries
    predictor, inputs = subject.predictor, subject.inputs
    assert isinstance(predictor.model, Skip)
    rank_Q = measurement.own.per_query["rank"].to_numpy()
    ablations = run_ablations(predictor.model, inputs.bank, inputs.windows, queries, rank_Q)
    figures = {
        f"{split}/without_{one['part']}_hit_at_5": one["hit_at_5"] for one in ablations["without"]
    }
    runs.log_metrics(figures, model_id=predictor.model_id, dataset=inputs.dataset)
    return ablations


def control(measurement: Measurement, ridge: bool) -> dict[str, Any]:
    """Run the controls on the first of the measured queries; log figures and an image."""
    subject, queries = measurement.subject, measurement.queries
    bank, windows = subject.inputs.bank, subject.inputs.windows
    rank_Q = measurement.own.per_query["rank"].to_numpy()
    controls = run_controls(subject.predictor.model, bank, windows, queries, rank_Q, ridge)
    for entry in controls["context"]:
        runs.log_metrics({"controls/hit_at_5_by_ctx": entry["hit_at_5"]}, step=entry["ctx"])
    figures = {"controls/shuffled_hit_at_5": controls["shuffled"]["hit_at_5"]}
    if controls["reversed_ridge"] is not None:
        for way in ("forward", "backward"):
            figures[f"controls/{way}_ridge_hit_at_5"] = controls["reversed_ridge"][way]["hit_at_5"]
    runs.log_metrics(figures)
    image = context_figure(subject.name, controls, measurement.report["leaky"])
    runs.log_artifact(image, "context.png")
    return controls


@dataclass(frozen=True)
class Answers:
    """The answers of one predictor, with the per-query tables of it and of the free predictors."""

    subject: Subject
    report: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    split: str
    predictions: FloatArray
    row_correction: FloatArray

    @property
    def own(self) -> pd.DataFrame:
        """Return the table of the predictor that is judged."""
        return self.tables[self.report["model"]]


def measured_by(run_id: str) -> Answers:
    """Read the results of an `eval`; raises ValueError if its bank or model has changed since."""
    entry = runs.entry_of(run_id)
    if entry != EVAL:
        raise ValueError(f"eval_run: {run_id} is a run of {entry or 'no entry'}; give one of eval")
    report, config = runs.read_json(run_id, "report.json"), runs.read_json(run_id)
    runs.log_config(config | {"eval_run": run_id})
    bank = read_bank(config["bank"])
    if bank.sha256 != report["bank_sha256"]:
        raise ValueError(f"eval_run: {run_id} was measured on another bank than {bank.path} is now")
    registry = Registry(config.get("registry", NAME))  # an earlier lvm had this one alone
    subject = open_subject(config["model"], config["bank"], config["ctx"], registry)
    runs.name_run(f"{subject.title()} {config['split']}")
    runs.set_tags(subject.tags())
    prediction_QD = runs.read_array(run_id, "predictions.npy")
    queries = subject.inputs.windows.queries[config["split"]].head(COMPARED)
    again_QD = predict_queries(subject.predictor.model, bank, queries)
    cosine_Q = np.einsum("qd,qd->q", again_QD, prediction_QD[: len(queries)])
    if cosine_Q.min() < SAME_MODEL:
        raise ValueError(
            f"eval_run: {run_id} was measured with another model than {config['model']} is now; "
            "run eval again"
        )
    by_name = dict(iter(runs.read_frame(run_id, MEASURED).groupby("predictor", sort=False)))
    tables = {str(name): table.reset_index(drop=True) for name, table in by_name.items()}
    correction = runs.read_array(run_id, "row_correction.npy")
    return Answers(subject, report, tables, config["split"], prediction_QD, correction)


def measured_now(subject: Subject, settings: Mapping[str, Any]) -> Answers:
    """Evaluate the predictor now; `settings` are the command's."""
    found = measure_subject(subject, settings)
    tables = {one.name: one.per_query for one in found.evaluations}
    own, split = found.own, settings["split"]
    return Answers(subject, found.report, tables, split, own.predictions, own.row_correction)


def assigned(
    subject: Subject, lanes: str, encoder: str | None, rules: LaneRules
) -> tuple[Subject, Assignment, Agreement | None]:
    """Assign lanes by the method `lanes`; log how far they agree with the bank's own labels."""
    inputs = subject.inputs
    bank, windows = inputs.bank, inputs.windows
    assignment = assign_lanes(bank, windows, rules, lanes, encoder, windows.seed)
    if lanes == BANK:
        return subject, assignment, None
    agreement = lane_agreement(bank, assignment.bank)
    if agreement is not None:
        runs.log_artifact(agreement_figure(lanes, agreement), "agreement.png")
        figures = {"adjusted_rand": agreement.adjusted_rand, "nmi": agreement.nmi}
        runs.log_metrics({f"assignment/{name}": value for name, value in figures.items()})
    return replace(subject, inputs=replace(inputs, bank=assignment.bank)), assignment, agreement


def with_lanes(answers: Answers, subject: Subject) -> Answers:
    """Return the answers with figures for the lanes of the subject's bank."""
    lanes = lane_report(answers.own, subject.inputs.bank, subject.inputs.windows.seed)
    return replace(answers, subject=subject, report=answers.report | {"lanes": lanes})


def searched(answers: Answers, rules: LaneRules) -> Ceilings:
    """Search with the truths and the predictions, exactly and through the serving index."""
    subject, inputs = answers.subject, answers.subject.inputs
    windows = inputs.windows
    plan: dict[str, Any] = {"ctx": windows.ctx, "split": windows.split, "seed": windows.seed}
    facts = replace(subject.predictor.facts, **plan)
    index = ensure_index(inputs.bank, subject.predictor.model, facts, answers.row_correction)
    queries = windows.queries[answers.split].head(len(answers.predictions))
    table = search_table(
        index,
        answers.predictions,
        queries,
        inputs.bank,
        windows.representative_N,
        answers.row_correction,
    )
    return lane_ceilings(str(index.facts), answers.own, table, inputs.bank, rules, windows.seed)


def draw(answers: Answers, diagnosis: Diagnosis, ceilings: Ceilings) -> None:
    """Log the figures: lanes beside the best free predictor, confusions, Hit@k for larger k."""
    inputs, leaky = answers.subject.inputs, diagnosis.leaky
    measured = {diagnosis.model: diagnosis.lanes}
    free = best_free_lanes(diagnosis, answers.tables, inputs.bank, inputs.windows.seed)
    if free:
        names = {lane.best_baseline for lane in diagnosis.lanes}
        name = f"{names.pop()} (best free)" if len(names) == 1 else "best free of the lane"
        measured[name] = tuple(free)
    bars = lane_figure(measured, {diagnosis.model: diagnosis.hit_at_5}, leaky)
    runs.log_artifact(bars, "lanes.png")
    runs.log_artifact(confusion_figure(diagnosis), "confusion.png")
    runs.log_artifact(larger_k_figure(diagnosis.model, ceilings, leaky), "larger_k.png")


def publish_lanes(
    diagnosis: Diagnosis,
    ceilings: Ceilings,
    assignment: Assignment,
    agreement: Agreement | None,
) -> dict[str, Any]:
    """Log and print the tables of a diagnosis; return its part of the report."""
    runs.describe_run(lanes_note(diagnosis))
    blocks = [lanes_table(diagnosis), supply_line(diagnosis)]
    blocks += [hits_table(diagnosis), ceilings_table(ceilings, diagnosis.leaky)]
    if assignment.method != BANK:
        blocks.insert(0, assignment_table(assignment, agreement))
        print(assignment_line(assignment, agreement), end="\n\n")
    runs.log_artifact("\n\n".join(blocks) + "\n", "lanes.txt")
    print(lanes_screen(diagnosis, ceilings), flush=True)
    found = None if agreement is None else agreement.report()
    return {
        "diagnosis": diagnosis.report(),
        "assignment": {"method": assignment.method, **assignment.facts, "agreement": found},
        "ceilings": ceilings.report(),
    }


def log_decision(diagnosis: Diagnosis) -> None:
    """Log the decision as a tag and the Hit@5 of each lane as a metric."""
    runs.set_tags({"decision": diagnosis.decision})
    hits = {f"lanes/{lane.lane}/hit_at_5": lane.figures["hit_at_5"] for lane in diagnosis.lanes}
    runs.log_metrics(hits)
