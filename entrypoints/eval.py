"""Command: exact ranks of a predictor over the whole bank."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("eval")

from entrypoints.cli import EntryPoint
from entrypoints.options import EvalOptions
from lvm.models.skip import Skip
from lvm.report.evaluation import (
    ablations_table,
    controls_table,
    evaluation_note,
    evaluation_table,
    reranking_table,
    serving_lines,
)
from lvm.retrieval.rerank import NONE, check_rerank
from lvm.tracking import runs
from lvm.tracking.evaluation_runs import (
    ablate,
    control,
    log_answers,
    measure_subject,
    measure_twins,
    rerank,
    serve,
)
from lvm.tracking.initial import twin_line, twins_of
from lvm.tracking.logged_models import check_subject, open_subject
from lvm.tracking.registry import Registry
from lvm.tracking.runs import publish_report


def check(options: EvalOptions) -> None:
    """Raise ValueError if there is no such predictor."""
    check_subject(options.model, Registry(options.registry))


def body(options: EvalOptions) -> None:
    """Rank the true next passage among all rows of a bank, for a predictor and the free ones."""
    registry = Registry(options.registry)
    subject = open_subject(options.model, options.bank, options.ctx, registry)
    windows = subject.inputs.windows
    if options.rerank != NONE:
        check_rerank(options.rerank, subject.inputs.bank, windows, windows.seed)
    measurement = measure_subject(subject, vars(options), options.baselines)
    report = measurement.report
    log_answers(measurement, options.split)
    blocks = [evaluation_table(report)]
    twin_row = twins_of(subject)
    if twin_row is not None:
        report |= {"init_twins": measure_twins(measurement, options.split, twin_row)}
        blocks[0] += f"\n{twin_line(report['init_twins'], report['queries'])}"
    print(blocks[0], flush=True)
    report |= {"index": serve(measurement)}
    blocks[0] += f"\n{serving_lines(report)}"
    print(serving_lines(report), flush=True)

    def show(table: str) -> None:
        blocks.append(table)
        print(f"\n{table}", flush=True)

    if options.rerank != NONE:
        report |= {"reranked": rerank(measurement, options.split, options.rerank)}
        show(reranking_table(report["reranked"], report, report["leaky"]))
    if options.controls and isinstance(subject.predictor.model, Skip):
        report |= {"ablations": ablate(measurement, options.split)}
        show(ablations_table(report["ablations"], report["leaky"]))
    if options.controls:
        report |= {"controls": control(measurement, options.baselines)}
        show(controls_table(report["controls"], report["leaky"]))
    runs.log_artifact("\n\n".join(blocks) + "\n", "eval.txt")
    runs.describe_run(evaluation_note(report))
    publish_report(report, options.report)


main = EntryPoint("eval", EvalOptions, body, check)
