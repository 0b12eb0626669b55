"""Command: exact ranks of a predictor over the whole bank."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from entrypoints._measuring import MEASURED, Measurement, MeasureOptions, measure_subject
from entrypoints._options import EntryPoint, option
from entrypoints._reports import HITS, publish
from entrypoints._subjects import open_subject
from lvm.evaluation.ablations import run_ablations
from lvm.evaluation.controls import run_controls
from lvm.evaluation.examples import example_table
from lvm.evaluation.latency import measure_search, measure_warm_latency
from lvm.evaluation.reranking import evaluate_reranking
from lvm.models.skip import Skip
from lvm.report.evaluation import (
    ablations_table,
    context_figure,
    controls_table,
    evaluation_table,
    examples_page,
    reranking_table,
)
from lvm.report.notes import evaluation_note
from lvm.retrieval.index import DEPTH, agreement, ensure_index
from lvm.retrieval.lanes import check_lanes
from lvm.retrieval.rerank import LANE, NONE, RERANKS
from lvm.retrieval.search import top_rows
from lvm.tracking import runs as tracking

SEARCHED = 500  # predictions whose index search is compared with exact search


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Options of `eval`."""

    controls: bool = option(
        True, "Ask with shorter, shuffled, reversed contexts, without parts of the model too."
    )
    rerank: str = option(NONE, "Order the best 200 anew by the lane to come.", choices=RERANKS)


def body(options: EvalOptions) -> None:
    """Rank the true next passage among all rows of a bank, for a predictor and the free ones."""
    subject = open_subject(options.model, options.bank, options.ctx)
    if options.rerank == LANE:
        check_lanes(subject.inputs.bank, subject.inputs.windows, subject.inputs.windows.seed)
    measurement = measure_subject(subject, options)
    own = measurement.evaluations[0]
    tracking.log_file("per_query.parquet", own.per_query.to_parquet)
    tracking.log_file(MEASURED, measurement.long_table().to_parquet)
    tracking.log_file("predictions.npy", lambda path: np.save(path, own.predictions))
    tracking.log_file("row_correction.npy", lambda path: np.save(path, own.row_correction))
    log_examples(measurement, options.split)
    table = evaluation_table(measurement.report)
    print(table, flush=True)
    report = measurement.report
    report |= {"index": serve(measurement)}
    served = index_line(report)
    print(served, flush=True)
    table += f"\n{served}"
    if options.rerank == LANE:
        report |= {"reranked": rerank(measurement, options.split)}
        shown = reranking_table(report["reranked"], report, report["leaky"])
        print(f"\n{shown}", flush=True)
        table += f"\n\n{shown}"
    if options.controls and isinstance(subject.predictor.model, Skip):
        report |= {"ablations": ablate(measurement, options.split)}
        shown = ablations_table(report["ablations"], report["leaky"])
        print(f"\n{shown}", flush=True)
        table += f"\n\n{shown}"
    if options.controls:
        report |= {"controls": control(measurement, options.split)}
        shown = controls_table(report["controls"], report["leaky"])
        print(f"\n{shown}")
        table += f"\n\n{shown}"
    tracking.log_text(table + "\n", "eval.txt")
    tracking.describe_run(evaluation_note(report))
    publish(report, options.report)


def log_examples(measurement: Measurement, split: str) -> None:
    """Log some of the hits, some of the misses, with what was read and found."""
    inputs, own = measurement.subject.inputs, measurement.evaluations[0]
    queries = inputs.windows.queries[split].head(len(own.per_query))
    examples = example_table(own, queries, inputs.bank, inputs.windows)
    tracking.log_table(examples, "examples.json")
    title = f"{measurement.subject.name}: examples of the {split} queries"
    tracking.log_text(examples_page(title, examples, measurement.report["leaky"]), "examples.html")


def serve(measurement: Measurement) -> dict[str, Any]:
    """Search the serving index with the predictions; add its times to the report's latency."""
    subject, own = measurement.subject, measurement.evaluations[0]
    bank, windows = subject.inputs.bank, subject.inputs.windows
    model, correction = subject.predictor.model, own.row_correction
    # The index is tuned on val queries of these windows: the model's own may not fit this bank.
    plan = {"ctx": windows.ctx, "split": windows.split, "seed": windows.seed}
    index = ensure_index(bank, model, replace(subject.predictor.facts, **plan), correction)
    depth = min(DEPTH, index.facts.num_passages)
    asked_QD = own.predictions[:SEARCHED]
    exact, _ = top_rows(
        asked_QD, bank, depth, correction, representative_N=windows.representative_N
    )
    found, _ = index.search(asked_QD, depth)
    measured = asdict(index.facts) | {"description": str(index.facts)}
    measured |= {"queries": len(asked_QD), "agreement": float(agreement(found, exact).mean())}
    times = measure_search(index, asked_QD)
    times |= measure_warm_latency(model, bank, windows.ctx, index)
    measurement.report["latency_ms"] |= times
    logged = {f"latency_ms/{name}": value for name, value in times.items()}
    tracking.log_metrics(logged | {"index/agreement": measured["agreement"]})
    return measured


def index_line(report: Mapping[str, Any]) -> str:
    """Say in two lines how the predictor would be served, at what cost."""
    index, times = report["index"], report["latency_ms"]
    return (
        f"Serving: {index['description']}; on these queries {index['agreement']:.3f}.\n"
        f"One answer, P95 in ms: cold context {times['p95']:.1f}, "
        f"warm stream with search {times['warm_p95']:.1f}, search alone {times['index_p95']:.1f}."
    )


def rerank(measurement: Measurement, split: str) -> dict[str, Any]:
    """Order the answers anew by lane; log the figures with the new ranks."""
    subject, own = measurement.subject, measurement.evaluations[0]
    bank, windows = subject.inputs.bank, subject.inputs.windows
    queries = windows.queries[split].head(len(own.per_query))
    found, ranks = evaluate_reranking(subject.predictor.model, bank, windows, queries, own)
    tracking.log_file("reranked.parquet", ranks.to_parquet)
    figures = {f"{split}/reranked_{key}": found["plain"][key] for key in HITS}
    figures[f"{split}/reranked_corrected_hit_at_5"] = found["corrected"]["hit_at_5"]
    tracking.log_metrics(
        figures, model_id=subject.predictor.model_id, dataset=subject.inputs.dataset
    )
    return found


def ablate(measurement: Measurement, split: str) -> dict[str, Any]:
    """Ask without each part of the model on the first of the measured queries; log Hit@5."""
    subject, own = measurement.subject, measurement.evaluations[0]
    bank, windows = subject.inputs.bank, subject.inputs.windows
    rank_Q = own.per_query["rank"].to_numpy()
    queries = windows.queries[split].head(len(rank_Q))
    ablations = run_ablations(subject.predictor.model, bank, windows, queries, rank_Q)  # type: ignore[arg-type]
    figures = {
        f"{split}/without_{one['part']}_hit_at_5": one["hit_at_5"] for one in ablations["without"]
    }
    tracking.log_metrics(
        figures, model_id=subject.predictor.model_id, dataset=subject.inputs.dataset
    )
    return ablations


def control(measurement: Measurement, split: str) -> dict[str, Any]:
    """Run the controls on the first of the measured queries; log figures with an image."""
    subject, own = measurement.subject, measurement.evaluations[0]
    bank, windows = subject.inputs.bank, subject.inputs.windows
    rank_Q = own.per_query["rank"].to_numpy()
    queries = windows.queries[split].head(len(rank_Q))
    controls = run_controls(subject.predictor.model, bank, windows, queries, rank_Q)
    for entry in controls["context"]:
        tracking.log_metrics({"controls/hit_at_5_by_ctx": entry["hit_at_5"]}, step=entry["ctx"])
    figures = {"controls/shuffled_hit_at_5": controls["shuffled"]["hit_at_5"]}
    if controls["reversed_ridge"] is not None:
        for way in ("forward", "backward"):
            figures[f"controls/{way}_ridge_hit_at_5"] = controls["reversed_ridge"][way]["hit_at_5"]
    tracking.log_metrics(figures)
    image = context_figure(subject.name, controls, measurement.report["leaky"])
    tracking.log_figure(image, "context.png")
    return controls


main = EntryPoint("eval", EvalOptions, body)

if __name__ == "__main__":
    sys.exit(main())
