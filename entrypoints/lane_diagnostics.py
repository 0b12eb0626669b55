"""Command: which lanes are weak, and for which to ingest more."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("lane-diagnostics")

from entrypoints.cli import EntryPoint
from entrypoints.options import LaneOptions
from lvm.evaluation.lane_ceilings import failing_queries
from lvm.evaluation.lane_diagnosis import diagnose
from lvm.system.settings import read_lane_rules
from lvm.tracking import runs
from lvm.tracking.evaluation_runs import (
    assigned,
    draw,
    log_decision,
    measured_by,
    measured_now,
    publish_lanes,
    searched,
    with_lanes,
)
from lvm.tracking.logged_models import check_subject, open_subject
from lvm.tracking.registry import Registry
from lvm.tracking.runs import publish_report


def check(options: LaneOptions) -> None:
    """Raise ValueError if there is no such predictor."""
    if options.eval_run is None:
        check_subject(options.model, Registry(options.registry))


def body(options: LaneOptions) -> None:
    """Evaluate a predictor lane by lane: figures, lift, ceilings, supply, confusions, decision."""
    rules = read_lane_rules()
    asked = (options.lanes, options.encoder, rules)
    if options.eval_run is None:
        registry = Registry(options.registry)
        found = open_subject(options.model, options.bank, options.ctx, registry)
        subject, assignment, agreement = assigned(found, *asked)
        answers = measured_now(subject, vars(options))
    else:
        answers = measured_by(options.eval_run)
        subject, assignment, agreement = assigned(answers.subject, *asked)
        answers = with_lanes(answers, subject)
    bank, windows = subject.inputs.bank, subject.inputs.windows
    name, leaky = answers.report["model"], bool(answers.report["leaky"])
    diagnosis = diagnose(name, answers.tables, bank, windows, rules, leaky, windows.seed)
    ceilings = searched(answers, rules)
    failing = failing_queries(answers.own, bank, diagnosis.weak).assign(split=answers.split)
    runs.log_artifact(failing.reset_index(drop=True), "failing_queries.parquet")
    draw(answers, diagnosis, ceilings)
    log_decision(diagnosis)
    found_lanes = publish_lanes(diagnosis, ceilings, assignment, agreement)
    report = answers.report | found_lanes | {"failing_queries": len(failing)}
    publish_report(report, options.report)


main = EntryPoint("lane-diagnostics", LaneOptions, body, check)
