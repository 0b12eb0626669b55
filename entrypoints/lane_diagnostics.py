"""Command: which lanes are weak, what to do about them."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from entrypoints.eval import MEASURED, MeasureOptions, measure_subject
from entrypoints.options import EntryPoint, option
from lvm.bank.store import FloatArray
from lvm.evaluation.evaluate import lane_report
from lvm.evaluation.lane_assignment import (
    BANK,
    METHODS,
    PROTOTYPES,
    Agreement,
    Assignment,
    assign_lanes,
    lane_agreement,
)
from lvm.evaluation.lane_ceilings import Ceilings, failing_queries, lane_ceilings, search_table
from lvm.evaluation.lane_diagnosis import Diagnosis, best_free_lanes, diagnose
from lvm.prediction.predict import predict_queries
from lvm.report.lanes import (
    agreement_figure,
    assignment_table,
    ceilings_table,
    confusion_figure,
    hits_table,
    lane_figure,
    lanes_table,
    larger_k_figure,
    supply_line,
)
from lvm.report.notes import lanes_note
from lvm.retrieval.index import ensure_index
from lvm.system.thresholds import LaneRules, read_lane_rules
from lvm.tracking import runs as tracking
from lvm.tracking.datasets import read_bank
from lvm.tracking.logged_models import Subject, open_subject
from lvm.tracking.runs import publish_report

SAME_MODEL = 0.99  # cosine of a prediction to the recorded one; arithmetic alone moves it by 1e-4
COMPARED = 8
EVAL = "eval"  # the entry whose runs can be judged


@dataclass(frozen=True)
class LaneOptions(MeasureOptions):
    """Options of `lane-diagnostics`."""

    eval_run: str | None = option(
        None, "Run of an eval whose answers are judged (none: measure here).", unset="none"
    )
    lanes: str = option(BANK, "The bank's labels, written domains, clusters.", choices=METHODS)
    encoder: str | None = option(
        None, "Encoder of the prototypes, wordllama or a local folder; auto: the bank's own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_run is not None:
            _refuse_measuring(self)
        if self.encoder is not None and self.lanes != PROTOTYPES:
            raise ValueError(
                f"encoder: {self.encoder} would not be used with lanes={self.lanes}; give "
                f"lanes={PROTOTYPES}, or leave it at auto"
            )


def _refuse_measuring(options: LaneOptions) -> None:
    """Raise ValueError where an option says how to measure if a finished run is judged."""
    for field in fields(MeasureOptions):
        if field.name != "report" and getattr(options, field.name) != field.default:
            raise ValueError(
                f"{field.name}: would not be used, eval_run measured with its own; leave it away"
            )


@dataclass(frozen=True)
class Answers:
    """What one predictor answered, with the per-query table of each that was asked."""

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


def body(options: LaneOptions) -> None:
    """Judge the lanes of a predictor: figures, lift, ceilings, supply, confusions, the decision."""
    rules = read_lane_rules()
    if options.eval_run is None:
        subject = open_subject(options.model, options.bank, options.ctx)
        subject, assignment, agreement = assigned(subject, options, rules)
        answers = measured_here(subject, options)
    else:
        answers = measured_by(options.eval_run)
        subject, assignment, agreement = assigned(answers.subject, options, rules)
        lanes = lane_report(answers.own, subject.inputs.bank, subject.inputs.windows.seed)
        answers = replace(answers, subject=subject, report=answers.report | {"lanes": lanes})
    bank, windows = subject.inputs.bank, subject.inputs.windows
    leaky = bool(answers.report["leaky"])
    diagnosis = diagnose(
        answers.report["model"], answers.tables, bank, windows, rules, leaky, windows.seed
    )
    ceilings = searched(answers, rules)
    failing = failing_queries(answers.own, bank, diagnosis.weak).assign(split=answers.split)
    tracking.log_artifact(failing.reset_index(drop=True), "failing_queries.parquet")
    draw(answers, diagnosis, ceilings)
    log_decision(diagnosis)
    tracking.describe_run(lanes_note(diagnosis))
    blocks = [lanes_table(diagnosis), supply_line(diagnosis)]
    blocks += [hits_table(diagnosis), ceilings_table(ceilings, leaky)]
    if assignment.method != BANK:
        blocks.insert(0, assignment_table(assignment, agreement))
    table = "\n\n".join(blocks)
    tracking.log_artifact(table + "\n", "lanes.txt")
    print(table)
    found = None if agreement is None else agreement.report()
    report = answers.report | {
        "diagnosis": diagnosis.report(),
        "assignment": {"method": assignment.method, **assignment.facts, "agreement": found},
        "ceilings": ceilings.report(),
        "failing_queries": len(failing),
    }
    publish_report(report, options.report)


def assigned(
    subject: Subject, options: LaneOptions, rules: LaneRules
) -> tuple[Subject, Assignment, Agreement | None]:
    """Give the subject's bank the lanes that are asked for; log how far they are its labels."""
    inputs = subject.inputs
    assignment = assign_lanes(
        inputs.bank, inputs.windows, rules, options.lanes, options.encoder, inputs.windows.seed
    )
    if options.lanes == BANK:
        return subject, assignment, None
    agreement = lane_agreement(inputs.bank, assignment.bank)
    if agreement is not None:
        tracking.log_artifact(agreement_figure(options.lanes, agreement), "agreement.png")
        figures = {"adjusted_rand": agreement.adjusted_rand, "nmi": agreement.nmi}
        tracking.log_metrics({f"assignment/{name}": value for name, value in figures.items()})
    return replace(subject, inputs=replace(inputs, bank=assignment.bank)), assignment, agreement


def measured_here(subject: Subject, options: LaneOptions) -> Answers:
    """Evaluate the predictor now."""
    found = measure_subject(subject, options)
    own = found.evaluations[0]
    tables = {one.name: one.per_query for one in found.evaluations}
    return Answers(
        subject, found.report, tables, options.split, own.predictions, own.row_correction
    )


def measured_by(run_id: str) -> Answers:
    """Read what an `eval` measured; raises ValueError where its bank or model changed since."""
    entry = tracking.entry_of(run_id)
    if entry != EVAL:
        raise ValueError(f"eval_run: {run_id} is a run of {entry or 'no entry'}; give one of eval")
    report, config = tracking.read_json(run_id, "report.json"), tracking.read_json(run_id)
    tracking.log_config(config | {"eval_run": run_id})
    bank = read_bank(config["bank"])
    if bank.sha256 != report["bank_sha256"]:
        raise ValueError(f"eval_run: {run_id} was measured on another bank than {bank.path} is now")
    subject = open_subject(config["model"], config["bank"], config["ctx"])
    tracking.name_run(f"{subject.name} ctx {subject.inputs.windows.ctx} {config['split']}")
    tracking.set_tags(subject.tags())
    prediction_QD = tracking.read_array(run_id, "predictions.npy")
    queries = subject.inputs.windows.queries[config["split"]].head(COMPARED)
    again_QD = predict_queries(subject.predictor.model, bank, queries)
    cosine_Q = np.einsum("qd,qd->q", again_QD, prediction_QD[: len(queries)])
    if cosine_Q.min() < SAME_MODEL:
        raise ValueError(
            f"eval_run: {run_id} was measured with another model than {config['model']} is now; "
            "run eval again"
        )
    by_name = dict(iter(tracking.read_frame(run_id, MEASURED).groupby("predictor", sort=False)))
    tables = {str(name): table.reset_index(drop=True) for name, table in by_name.items()}
    correction = tracking.read_array(run_id, "row_correction.npy")
    return Answers(subject, report, tables, config["split"], prediction_QD, correction)


def searched(answers: Answers, rules: LaneRules) -> Ceilings:
    """Search with the truths and the predictions, exactly and through the serving index."""
    subject, inputs = answers.subject, answers.subject.inputs
    windows = inputs.windows
    plan = {"ctx": windows.ctx, "split": windows.split, "seed": windows.seed}
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
    """Log the figures: lanes beside the best free predictor, confusions, Hit@k of a larger k."""
    inputs, leaky = answers.subject.inputs, diagnosis.leaky
    measured = {diagnosis.model: diagnosis.lanes}
    free = best_free_lanes(diagnosis, answers.tables, inputs.bank, inputs.windows.seed)
    if free:
        names = {lane.best_baseline for lane in diagnosis.lanes}
        name = f"{names.pop()} (best free)" if len(names) == 1 else "best free of the lane"
        measured[name] = tuple(free)
    bars = lane_figure(measured, {diagnosis.model: diagnosis.hit_at_5}, leaky)
    tracking.log_artifact(bars, "lanes.png")
    tracking.log_artifact(confusion_figure(diagnosis), "confusion.png")
    tracking.log_artifact(larger_k_figure(diagnosis.model, ceilings, leaky), "larger_k.png")


def log_decision(diagnosis: Diagnosis) -> None:
    """Log the decision as a tag, the Hit@5 of each lane as a metric."""
    tracking.set_tags({"decision": diagnosis.decision})
    hits = {f"lanes/{lane.lane}/hit_at_5": lane.figures["hit_at_5"] for lane in diagnosis.lanes}
    tracking.log_metrics(hits)


main = EntryPoint("lane-diagnostics", LaneOptions, body)

if __name__ == "__main__":
    sys.exit(main())
