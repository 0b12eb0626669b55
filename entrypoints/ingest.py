"""Command: text, chains or vectors to a bank."""

import sys
from dataclasses import asdict, dataclass

from entrypoints._inputs import DEFAULT_BANK, DEFAULT_ENCODER, DEFAULT_SOURCE
from entrypoints._options import EntryPoint, option
from entrypoints._reports import publish
from lvm import tracking
from lvm.bank.store import open_bank
from lvm.corpus.ingest import IngestReport, ingest

SHOWN = 12


@dataclass(frozen=True)
class IngestOptions:
    """Options of `ingest`."""

    source: str = option(
        DEFAULT_SOURCE,
        "python-docs, a folder of .md/.txt/.rst/.jsonl files, an .npz file or a bank folder.",
    )
    encoder: str = option(DEFAULT_ENCODER, "wordllama, or a sentence-transformers name or folder.")
    bank: str = option(DEFAULT_BANK, "Folder to write the bank to.")
    max_rows: int | None = option(None, "Keep about so many rows at most (auto: all).", low=1)


def body(options: IngestOptions) -> None:
    """Read text, chains or vectors, embed what is text, write a bank."""
    tracking.log_config(asdict(options))
    report = ingest(options.source, options.encoder, options.bank, options.max_rows)
    tracking.log_bank(open_bank(options.bank), "ingestion")
    tracking.log_metrics({"bank/rows": report.rows, "bank/dim": report.dim})
    print(counts_table(report))
    publish(asdict(report), None)


def counts_table(report: IngestReport) -> str:
    """Return the rows of each sequence with those of each lane, then what was left out."""
    verb = "found as asked" if report.reused else f"written in {report.seconds:.0f} s"
    lines = [f"bank {report.path}: {report.rows:,} rows x {report.dim} dims, {verb}"]
    for title, counts in (("sequences", report.sequences), ("lanes", report.lanes)):
        largest = sorted(counts.items(), key=lambda item: -item[1])
        shown = [f"{name or 'none'} {count:,}" for name, count in largest[:SHOWN]]
        rest = [f"{len(largest) - SHOWN} more"] if len(largest) > SHOWN else []
        lines.append(f"{len(counts):,} {title}: {', '.join(shown + rest)}")
    lines += [f"dropped {count:,} rows: {reason}" for reason, count in report.dropped.items()]
    return "\n".join([*lines, *report.notes, f"sha256 {report.sha256}"])


main = EntryPoint("ingest", IngestOptions, body)

if __name__ == "__main__":
    sys.exit(main())
