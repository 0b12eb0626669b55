"""Command: exact ranks of a predictor over the whole bank."""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrypoints._measuring import MEASURED, Measurement, MeasureOptions, measure
from entrypoints._options import EntryPoint, option
from entrypoints._reports import publish
from lvm import tracking
from lvm.controls import run_controls
from lvm.controls_report import controls_table
from lvm.figures import context_figure
from lvm.report import evaluation_table


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Options of `eval`."""

    controls: bool = option(True, "Ask with shorter, shuffled, reversed contexts too.")


def body(options: EvalOptions) -> None:
    """Rank the true next passage among all rows of a bank, for a predictor and the free ones."""
    measurement = measure(options)
    own = measurement.evaluations[0]
    tracking.log_file("per_query.parquet", own.per_query.to_parquet)
    tracking.log_file(MEASURED, measurement.long_table().to_parquet)
    tracking.log_file("predictions.npy", lambda path: np.save(path, own.predictions))
    tracking.log_file("row_correction.npy", lambda path: np.save(path, own.row_correction))
    table = evaluation_table(measurement.report)
    print(table, flush=True)
    report = measurement.report
    if options.controls:
        report |= {"controls": control(measurement, options.split)}
        shown = controls_table(report["controls"], report["leaky"])
        print(f"\n{shown}")
        table += f"\n\n{shown}"
    tracking.log_text(table + "\n", "eval.txt")
    publish(report, options.report)


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
