"""Command: splits, windows, frozen queries, leak audit."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import asdict, dataclass
from typing import Any

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.report.notes import counts_note
from lvm.tracking import runs as tracking
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, Inputs, log_inputs, read_bank
from lvm.tracking.runs import publish_report
from lvm.windows.export import export_windows
from lvm.windows.planning import SPLIT_KINDS, SPLITS


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
    tracking.log_config(asdict(options) | {"overlap": overlap})
    plan = {"overlap": overlap, "split": options.split, "seed": options.seed}
    bank = read_bank(options.bank)
    inputs = log_inputs(bank, export_windows(bank, options.ctx, options.windows, **plan), "export")
    report = export_report(inputs)
    tracking.log_metrics({f"windows/{k}": v for k, v in inputs.windows.counts.items()})
    print_counts(report)
    tracking.name_run(f"ctx {options.ctx} {options.split}")
    leaks = "LEAKY (split=random)" if report["leaky"] else "no leak"
    tracking.describe_run(counts_note(inputs.windows.counts, [f"audit: {leaks}"]))
    publish_report(report, options.report)


def export_report(inputs: Inputs) -> dict[str, Any]:
    """Return the counts with the audit of a plan, as JSON-able values."""
    windows = inputs.windows
    num_bytes = sum(path.stat().st_size for path in inputs.windows_path.iterdir() if path.is_file())
    bank_bytes = inputs.bank.vectors.nbytes
    return {
        "bank": str(inputs.bank.path),
        "bank_sha256": inputs.bank.sha256,
        "bank_rows": inputs.bank.num_rows,
        "windows": str(inputs.windows_path),
        "windows_sha256": windows.sha256,
        "ctx": windows.ctx,
        "overlap": windows.overlap,
        "split": windows.split,
        "seed": windows.seed,
        "leaky": windows.leaky,
        "counts": windows.counts,
        "audit": windows.audit,
        "bytes": num_bytes,
        "share_of_bank": num_bytes / bank_bytes,
    }


def print_counts(report: dict[str, Any]) -> None:
    """Print rows, windows, queries of each split, then the audit."""
    counts = report["counts"]
    print(f"{report['windows']}: ctx {report['ctx']}, overlap {report['overlap']}")
    print(f"{'split':8}{'rows':>12}{'windows':>12}{'queries':>12}")
    for split in SPLITS:
        queries = counts.get(f"{split}_queries", 0)
        print(
            f"{split:8}{counts[split + '_rows']:12,}{counts[split + '_windows']:12,}{queries:12,}"
        )
    mark = "LEAKY (split=random)" if report["leaky"] else "no leak"
    print(f"audit: {mark}; {report['bytes']:,} bytes, {report['share_of_bank']:.2%} of the bank")


main = EntryPoint("export", ExportOptions, body)

if __name__ == "__main__":
    sys.exit(main())
