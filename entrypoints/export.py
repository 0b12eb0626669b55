"""Command: splits, windows, frozen queries, leak audit."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import asdict, dataclass

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.report.data import counts_note, export_report, windows_text
from lvm.tracking import runs
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, log_inputs, read_bank
from lvm.tracking.runs import publish_report
from lvm.windows.export import export_windows
from lvm.windows.planning import SPLIT_KINDS


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`."""

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    overlap: int | None = option(None, "Rows that two windows share (auto: ctx / 2).", low=0)
    split: str = option("document", "How rows are split; random is leaky.", choices=SPLIT_KINDS)
    windows: str | None = option(None, "Folder to write to (auto: data/windows/ctx<ctx>).")
    seed: int = option(0, "Seed of the split and of the queries' order.", low=0)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)


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

if __name__ == "__main__":
    sys.exit(main())
