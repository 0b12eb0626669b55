"""Command: which lanes are weak, what to do about them."""

import sys
from dataclasses import dataclass
from typing import Any

import pandas as pd

from entrypoints._inputs import Inputs, make_inputs, read_bank
from entrypoints._measuring import MEASURED, MeasureOptions, measure
from entrypoints._options import EntryPoint, option
from entrypoints._reports import publish
from lvm import tracking
from lvm.lanes.diagnosis import diagnose
from lvm.report.evaluation import lanes_table
from lvm.report.figures import confusion_figure
from lvm.rules import read_lane_rules


@dataclass(frozen=True)
class LaneOptions(MeasureOptions):
    """Options of `lane-diagnostics`."""

    eval_run: str | None = option(
        None, "Run of an eval whose answers are judged (none: measure here).", unset="none"
    )


@dataclass(frozen=True)
class Answers:
    """The per-query table of each predictor, the report of the one that is judged."""

    inputs: Inputs
    report: dict[str, Any]
    tables: dict[str, pd.DataFrame]


def body(options: LaneOptions) -> None:
    """Judge the lanes of a predictor: figures, lift, supply, confusions, the decision."""
    answers = measured_here(options) if options.eval_run is None else measured_by(options.eval_run)
    bank, windows = answers.inputs.bank, answers.inputs.windows
    name = answers.report["model"]
    diagnosis = diagnose(name, answers.tables, bank, windows, read_lane_rules(), windows.seed)
    tracking.log_figure(confusion_figure(diagnosis), "confusion.png")
    tracking.set_tags({"model": name, "decision": diagnosis.decision})
    hits = {f"lanes/{lane.lane}/hit_at_5": lane.figures["hit_at_5"] for lane in diagnosis.lanes}
    tracking.log_metrics(hits)
    table = lanes_table(diagnosis)
    tracking.log_text(table + "\n", "lanes.txt")
    print(table)
    publish(answers.report | {"diagnosis": diagnosis.report()}, options.report)


def measured_here(options: LaneOptions) -> Answers:
    """Evaluate the predictor now."""
    measurement = measure(options)
    tables = {one.name: one.per_query for one in measurement.evaluations}
    return Answers(measurement.subject.inputs, measurement.report, tables)


def measured_by(run_id: str) -> Answers:
    """Read what an `eval` measured; raises ValueError where its bank is another one by now."""
    report, config = tracking.read_json(run_id, "report.json"), tracking.read_json(run_id)
    tracking.log_config(config | {"eval_run": run_id})
    bank = read_bank(config["bank"])
    if bank.sha256 != report["bank_sha256"]:
        raise ValueError(f"eval_run: {run_id} was measured on another bank than {bank.path} is now")
    plan = {"split": config["split_kind"], "seed": config["split_seed"]}
    inputs = make_inputs(bank, config["ctx"], None, "evaluation", **plan)
    by_name = dict(iter(tracking.read_frame(run_id, MEASURED).groupby("predictor", sort=False)))
    return Answers(inputs, report, {str(name): table for name, table in by_name.items()})


main = EntryPoint("lane-diagnostics", LaneOptions, body)

if __name__ == "__main__":
    sys.exit(main())
