"""Command: which lanes are weak, and for which to ingest more."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("lane-diagnostics")

from dataclasses import replace

from entrypoints.cli import EntryPoint
from entrypoints.options import LaneOptions
from lvm.evaluation.evaluate import lane_report
from lvm.evaluation.lane_assignment import (
    BANK,
    Agreement,
    Assignment,
    assign_lanes,
    lane_agreement,
)
from lvm.evaluation.lane_ceilings import failing_queries
from lvm.evaluation.lane_diagnosis import diagnose
from lvm.report.lanes import (
    agreement_figure,
    assignment_line,
    assignment_table,
    ceilings_table,
    hits_table,
    lanes_note,
    lanes_screen,
    lanes_table,
    supply_line,
)
from lvm.system.settings import LaneRules, read_lane_rules
from lvm.tracking import runs
from lvm.tracking.evaluation_runs import (
    Answers,
    draw,
    log_decision,
    measure_subject,
    measured_by,
    searched,
)
from lvm.tracking.logged_models import Subject, check_subject, open_subject
from lvm.tracking.registry import Registry
from lvm.tracking.runs import publish_report


def check(options: LaneOptions) -> None:
    """Raise ValueError if there is no such predictor."""
    if options.eval_run is None:
        check_subject(options.model, Registry(options.registry))


def body(options: LaneOptions) -> None:
    """Evaluate a predictor lane by lane: figures, lift, ceilings, supply, confusions, decision."""
    rules = read_lane_rules()
    if options.eval_run is None:
        registry = Registry(options.registry)
        subject = open_subject(options.model, options.bank, options.ctx, registry)
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
    runs.log_artifact(failing.reset_index(drop=True), "failing_queries.parquet")
    draw(answers, diagnosis, ceilings)
    log_decision(diagnosis)
    runs.describe_run(lanes_note(diagnosis))
    blocks = [lanes_table(diagnosis), supply_line(diagnosis)]
    blocks += [hits_table(diagnosis), ceilings_table(ceilings, leaky)]
    if assignment.method != BANK:
        blocks.insert(0, assignment_table(assignment, agreement))
    table = "\n\n".join(blocks)
    runs.log_artifact(table + "\n", "lanes.txt")
    if assignment.method != BANK:
        print(assignment_line(assignment, agreement), end="\n\n")
    print(lanes_screen(diagnosis, ceilings), flush=True)
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
    """Assign the lanes that the options ask for; log how far they agree with the bank's labels."""
    inputs = subject.inputs
    assignment = assign_lanes(
        inputs.bank, inputs.windows, rules, options.lanes, options.encoder, inputs.windows.seed
    )
    if options.lanes == BANK:
        return subject, assignment, None
    agreement = lane_agreement(inputs.bank, assignment.bank)
    if agreement is not None:
        runs.log_artifact(agreement_figure(options.lanes, agreement), "agreement.png")
        figures = {"adjusted_rand": agreement.adjusted_rand, "nmi": agreement.nmi}
        runs.log_metrics({f"assignment/{name}": value for name, value in figures.items()})
    return replace(subject, inputs=replace(inputs, bank=assignment.bank)), assignment, agreement


def measured_here(subject: Subject, options: LaneOptions) -> Answers:
    """Evaluate the predictor now."""
    found = measure_subject(subject, vars(options))
    own = found.evaluations[0]
    tables = {one.name: one.per_query for one in found.evaluations}
    return Answers(
        subject, found.report, tables, options.split, own.predictions, own.row_correction
    )


main = EntryPoint("lane-diagnostics", LaneOptions, body, check)
