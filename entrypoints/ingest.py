"""Command: text, chains or vectors to a bank."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("ingest")

import shlex
from dataclasses import asdict, fields

from entrypoints.cli import EntryPoint
from entrypoints.options import IngestOptions
from lvm.bank.bank import open_bank
from lvm.chains.ingest import ChainPlan, ChainReport, holds_chains, ingest_chains
from lvm.corpus.ingest import IngestReport, ingest
from lvm.corpus.reading import SourceOptions, row_limit
from lvm.report.data import chain_metrics, chains_text, counts_note, counts_table, drops_table
from lvm.report.tables import MARKDOWN
from lvm.tracking import datasets, runs
from lvm.tracking.datasets import DEFAULT_ENCODER
from lvm.tracking.registry import NAME, Registry
from lvm.tracking.runs import publish_report

OF_TEXT = ("max_rows", "language", "order")  # the other sources do not read these
OF_CHAINS = tuple("base pool root walk queries anchor neighbours coherence max_chains".split())


def check(options: IngestOptions) -> None:
    """Raise ValueError if max_rows is no number of rows, or an option is for another source."""
    row_limit(options.max_rows, options.source)
    is_chains = holds_chains(options.source)
    why = (
        "is for text or vectors, not for chains; omit it (max_chains limits chains)"
        if is_chains
        else "is read for chains alone; give source=ontology:...|graph:...|anchored:..., or omit it"
    )
    for one in fields(options):
        is_foreign = one.name in (OF_TEXT if is_chains else OF_CHAINS)
        if is_foreign and getattr(options, one.name) != one.default:
            raise ValueError(f"{one.name}: {why}")


def body(options: IngestOptions) -> None:
    """Read text, vectors or chains; embed text; write a bank.

    Chains are sequences of 8 to 14 concepts; with --base they are train rows. Their CPESH records
    are in the bank's folder as cpesh.parquet.
    """
    runs.log_config(asdict(options))
    if holds_chains(options.source):
        return ingest_as_chains(options)
    limit = row_limit(options.max_rows, options.source)
    reading = SourceOptions(limit, options.seed, options.language, options.lanes, options.order)
    report = ingest(options.source, options.encoder, options.bank, reading)
    bank = open_bank(options.bank)
    datasets.log_bank(bank, "ingestion")
    runs.log_metrics({"bank/rows": report.rows, "bank/dim": report.dim})
    if report.files:
        runs.log_artifact(drops_table(report, MARKDOWN) + "\n", "dropped.md")
    registry = Registry().name_for(bank)
    own = "" if registry == NAME else f" --registry {registry}"
    print(f"{counts_table(report)}\nnext: lvm train --bank {shlex.quote(options.bank)}{own}")
    describe(options.source, len(report.sequences), report)


def ingest_as_chains(options: IngestOptions) -> None:
    """Write a bank of chains."""
    values = {k: v for k, v in asdict(options).items() if k not in OF_TEXT}
    encoder = options.encoder or DEFAULT_ENCODER
    report = ingest_chains(ChainPlan(**values | {"encoder": encoder}))
    datasets.log_bank(open_bank(options.bank), "ingestion")
    runs.log_metrics(chain_metrics(report))
    runs.log_artifact(chains_text(report, MARKDOWN) + "\n", "chains.md")
    print(chains_text(report))
    describe(options.source, report.chains, report)


def describe(source: str, num_sequences: int, report: IngestReport | ChainReport) -> None:
    """Name the run by its source; describe the bank that it wrote; publish the report."""
    runs.name_run(f"{source} {report.encoder}")
    counts: dict[str, object] = {"rows": report.rows, "dim": report.dim}
    counts |= {"sequences": num_sequences, "lanes": len(report.lanes), "bank": report.path}
    runs.describe_run(counts_note(counts | {"sha256": report.sha256[:12]}, report.notes))
    publish_report(asdict(report), None)


main = EntryPoint("ingest", IngestOptions, body, check)
