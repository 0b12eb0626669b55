"""Command: splits, windows, frozen queries, leak audit."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("export")

from dataclasses import asdict

from entrypoints.cli import EntryPoint
from entrypoints.options import ExportOptions
from lvm.report.data import counts_note, export_report, windows_text
from lvm.tracking import runs
from lvm.tracking.datasets import log_inputs, read_bank
from lvm.tracking.runs import publish_report
from lvm.windows.export import export_windows


def body(options: ExportOptions) -> None:
    """Split a bank by document, cut its windows, freeze its queries, audit it for leaks."""
    overlap = options.ctx // 2 if options.overlap is None else options.overlap
    runs.log_config(asdict(options) | {"overlap": overlap})
    plan = {"overlap": overlap, "split": options.split, "seed": options.seed}
    bank = read_bank(options.bank)
    inputs = log_inputs(bank, export_windows(bank, options.ctx, options.windows, **plan), "export")
    report = export_report(inputs.bank, inputs.windows, inputs.windows_path)
    runs.log_metrics({f"windows/{k}": v for k, v in inputs.windows.counts.items()})
    print(windows_text(report))
    runs.name_run(f"ctx {options.ctx} {options.split}")
    leaks = "LEAKY (split=random)" if report["leaky"] else "no leak"
    runs.describe_run(counts_note(inputs.windows.counts, [f"audit: {leaks}"]))
    publish_report(report, options.report)


main = EntryPoint("export", ExportOptions, body)
