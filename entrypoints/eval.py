"""Command: exact ranks of a predictor over the whole bank."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import dataclass, replace
from typing import Any

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.evaluation.ablations import run_ablations
from lvm.evaluation.controls import run_controls
from lvm.evaluation.evaluate import Evaluation, evaluate, long_table
from lvm.evaluation.examples import example_table
from lvm.evaluation.latency import measure_serving
from lvm.evaluation.reranking import evaluate_reranking
from lvm.models.skip import Skip
from lvm.report.evaluation import (
    ablations_table,
    context_figure,
    controls_table,
    evaluation_table,
    examples_page,
    reranking_table,
    serving_lines,
)
from lvm.report.notes import evaluation_note
from lvm.report.tables import HITS
from lvm.retrieval.hubness import omits_own_document
from lvm.retrieval.index import ensure_index
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import LANE, NONE, RERANKS
from lvm.tracking import runs as tracking
from lvm.tracking.alias import BASELINE_URI
from lvm.tracking.logged_models import MODEL_HELP, Subject, open_subject
from lvm.tracking.runs import publish_report
from lvm.windows.queries import Queries

MEASURED = "measured.parquet"


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `eval`, shared by `lane-diagnostics`."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context; auto: the model's own.", low=2)
    split: str = option("test", "Split whose queries are asked.", choices=("test", "val"))
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Options of `eval`."""

    baselines: bool = option(True, "Measure the free predictors too.")
    controls: bool = option(
        True, "Ask with shorter, shuffled, reversed contexts, without parts of the model too."
    )
    rerank: str = option(NONE, "Order the best 200 again by the lane to come.", choices=RERANKS)


@dataclass(frozen=True)
class Measurement:
    """The report of one predictor; `evaluations` has its own first, then the free ones."""

    subject: Subject
    queries: Queries
    report: dict[str, Any]
    evaluations: list[Evaluation]

    @property
    def own(self) -> Evaluation:
        """Return the evaluation of the predictor itself."""
        return self.evaluations[0]


def measure_subject(
    subject: Subject, options: MeasureOptions, baselines: bool = True
) -> Measurement:
    """Evaluate the predictor beside the free ones; log its figures.

    The column `split` of the per-query tables names the split of the queries.
    """
    inputs, split = subject.inputs, options.split
    bank, windows = inputs.bank, inputs.windows
    plan = {"split_kind": windows.split, "split_seed": windows.seed}
    tracking.log_config(vars(options) | {"ctx": windows.ctx, "bank": str(bank.path)} | plan)
    tracking.name_run(f"{subject.name} ctx {windows.ctx} {split}")
    tracking.set_tags(subject.tags())
    report, evaluations = evaluate(
        subject.name,
        subject.predictor.model,
        bank,
        windows,
        split,
        options.max_queries,
        baselines,
        counts_own=not omits_own_document(subject.predictor.facts.fit_version),
    )
    evaluations = [replace(e, per_query=e.per_query.assign(split=split)) for e in evaluations]
    report["leaky"] = subject.is_leaky()
    figures = {f"{split}/{key}": report[key] for key in HITS}
    figures[f"{split}/corrected_hit_at_5"] = report["corrected"]["hit_at_5"]
    tracking.log_metrics(figures, model_id=subject.predictor.model_id, dataset=inputs.dataset)
    queries = windows.queries[split].head(report["queries"])
    return Measurement(subject, queries, report, evaluations)


def body(options: EvalOptions) -> None:
    """Rank the true next passage among all rows of a bank, for a predictor and the free ones."""
    subject = open_subject(options.model, options.bank, options.ctx)
    if options.rerank == LANE:
        check_lanes(subject.inputs.bank, subject.inputs.windows, subject.inputs.windows.seed)
    measurement = measure_subject(subject, options, options.baselines)
    report, own = measurement.report, measurement.own
    tracking.log_artifact(own.per_query, "per_query.parquet")
    tracking.log_artifact(long_table(measurement.evaluations), MEASURED)
    tracking.log_artifact(own.predictions, "predictions.npy")
    tracking.log_artifact(own.row_correction, "row_correction.npy")
    log_examples(measurement, options.split)
    blocks = [evaluation_table(report)]
    print(blocks[0], flush=True)
    report |= {"index": serve(measurement)}
    blocks[0] += f"\n{serving_lines(report)}"
    print(serving_lines(report), flush=True)
    if options.rerank == LANE:
        report |= {"reranked": rerank(measurement, options.split)}
        blocks.append(reranking_table(report["reranked"], report, report["leaky"]))
        print(f"\n{blocks[-1]}", flush=True)
    if options.controls and isinstance(subject.predictor.model, Skip):
        report |= {"ablations": ablate(measurement, options.split)}
        blocks.append(ablations_table(report["ablations"], report["leaky"]))
        print(f"\n{blocks[-1]}", flush=True)
    if options.controls:
        report |= {"controls": control(measurement, options.baselines)}
        blocks.append(controls_table(report["controls"], report["leaky"]))
        print(f"\n{blocks[-1]}")
    tracking.log_artifact("\n\n".join(blocks) + "\n", "eval.txt")
    tracking.describe_run(evaluation_note(report))
    publish_report(report, options.report)


def log_examples(measurement: Measurement, split: str) -> None:
    """Log some of the hits and misses with their contexts and the passages found."""
    inputs = measurement.subject.inputs
    examples = example_table(measurement.own, measurement.queries, inputs.bank, inputs.windows)
    tracking.log_artifact(examples, "examples.json")
    title = f"{measurement.subject.name}: examples of the {split} queries"
    tracking.log_artifact(
        examples_page(title, examples, measurement.report["leaky"]), "examples.html"
    )


def serve(measurement: Measurement) -> dict[str, Any]:
    """Search the serving index with the predictions; add its times to the report's latency."""
    subject, own = measurement.subject, measurement.own
    bank, windows, model = subject.inputs.bank, subject.inputs.windows, subject.predictor.model
    # The index is tuned on val queries of these windows: the model's own may not fit this bank.
    plan = {"ctx": windows.ctx, "split": windows.split, "seed": windows.seed}
    index = ensure_index(bank, model, replace(subject.predictor.facts, **plan), own.row_correction)
    groups = windows.representative_N
    measured, times = measure_serving(index, model, windows.ctx, own.predictions, groups)
    measurement.report["latency_ms"] |= times
    logged = {f"latency_ms/{name}": value for name, value in times.items()}
    tracking.log_metrics(logged | {"index/agreement": measured["agreement"]})
    return measured


def rerank(measurement: Measurement, split: str) -> dict[str, Any]:
    """Order the answers again by lane; log the figures with the new ranks."""
    predictor, inputs = measurement.subject.predictor, measurement.subject.inputs
    found, ranks = evaluate_reranking(
        predictor.model, inputs.bank, inputs.windows, measurement.queries, measurement.own
    )
    tracking.log_artifact(ranks, "reranked.parquet")
    figures = {f"{split}/reranked_{key}": found["plain"][key] for key in HITS}
    figures[f"{split}/reranked_corrected_hit_at_5"] = found["corrected"]["hit_at_5"]
    tracking.log_metrics(figures, model_id=predictor.model_id, dataset=inputs.dataset)
    return found


def ablate(measurement: Measurement, split: str) -> dict[str, Any]:
    """Ask without each part of the model on the first of the measured queries; log Hit@5."""
    subject, queries = measurement.subject, measurement.queries
    predictor, inputs = subject.predictor, subject.inputs
    rank_Q = measurement.own.per_query["rank"].to_numpy()
    ablations = run_ablations(predictor.model, inputs.bank, inputs.windows, queries, rank_Q)
    figures = {
        f"{split}/without_{one['part']}_hit_at_5": one["hit_at_5"] for one in ablations["without"]
    }
    tracking.log_metrics(figures, model_id=predictor.model_id, dataset=inputs.dataset)
    return ablations


def control(measurement: Measurement, ridge: bool) -> dict[str, Any]:
    """Run the controls on the first of the measured queries; log figures with an image."""
    subject, queries = measurement.subject, measurement.queries
    bank, windows = subject.inputs.bank, subject.inputs.windows
    rank_Q = measurement.own.per_query["rank"].to_numpy()
    controls = run_controls(subject.predictor.model, bank, windows, queries, rank_Q, ridge)
    for entry in controls["context"]:
        tracking.log_metrics({"controls/hit_at_5_by_ctx": entry["hit_at_5"]}, step=entry["ctx"])
    figures = {"controls/shuffled_hit_at_5": controls["shuffled"]["hit_at_5"]}
    if controls["reversed_ridge"] is not None:
        for way in ("forward", "backward"):
            figures[f"controls/{way}_ridge_hit_at_5"] = controls["reversed_ridge"][way]["hit_at_5"]
    tracking.log_metrics(figures)
    image = context_figure(subject.name, controls, measurement.report["leaky"])
    tracking.log_artifact(image, "context.png")
    return controls


main = EntryPoint("eval", EvalOptions, body)

if __name__ == "__main__":
    sys.exit(main())
