"""Command: text, chains or vectors to a bank."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("ingest")

import shlex
from collections.abc import Mapping
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


def body(options: IngestOptions) -> None:
    """Read text, vectors or chains; embed text; write a bank.

    Chains are sequences of 8 to 14 concepts; with --base they are train rows. Their CPESH records
    are in the bank's folder as cpesh.parquet.
    """
    runs.log_config(asdict(options))
    if holds_chains(options.source):
        _ingest_chains(options)
        return
    _refuse_chain_options(options)
    reading = SourceOptions(
        max_rows=row_limit(options.max_rows, options.source),
        seed=options.seed,
        language=options.language,
        lanes=options.lanes,
        order=options.order,
    )
    report = ingest(options.source, options.encoder, options.bank, reading)
    bank = open_bank(options.bank)
    datasets.log_bank(bank, "ingestion")
    runs.log_metrics({"bank/rows": report.rows, "bank/dim": report.dim})
    if report.files:
        runs.log_artifact(drops_table(report, MARKDOWN) + "\n", "dropped.md")
    registry = Registry().name_for(bank)
    own = "" if registry == NAME else f" --registry {registry}"
    print(f"{counts_table(report)}\nnext: lvm train --bank {shlex.quote(options.bank)}{own}")
    describe(options, report.sequences, report)
    publish_report(asdict(report), None)


def _ingest_chains(options: IngestOptions) -> None:
    if options.max_rows is not None:
        raise ValueError("max_rows: is for text or vectors; for chains give max_chains")
    values = asdict(options)
    defaults = {one.name: one.default for one in fields(options)}
    for name in ("max_rows", "language", "order"):
        if values.pop(name) != defaults[name]:
            raise ValueError(f"{name}: is for text or vectors, not for chains; omit it")
    values["encoder"] = options.encoder or DEFAULT_ENCODER
    report = ingest_chains(ChainPlan(**values))
    datasets.log_bank(open_bank(options.bank), "ingestion")
    runs.log_metrics(chain_metrics(report))
    runs.log_artifact(chains_text(report, MARKDOWN) + "\n", "chains.md")
    print(chains_text(report))
    describe(options, report.chains, report)
    publish_report(asdict(report), None)


def describe(
    options: IngestOptions, sequences: Mapping[str, int] | int, report: IngestReport | ChainReport
) -> None:
    """Name the run by its source; describe the bank that it wrote."""
    runs.name_run(f"{options.source} {report.encoder}")
    num_sequences = sequences if isinstance(sequences, int) else len(sequences)
    counts: dict[str, object] = {"rows": report.rows, "dim": report.dim}
    counts |= {"sequences": num_sequences, "lanes": len(report.lanes), "bank": report.path}
    runs.describe_run(counts_note(counts | {"sha256": report.sha256[:12]}, report.notes))


def _refuse_chain_options(options: IngestOptions) -> None:
    names = [one.name for one in fields(options)]
    for one in fields(options)[names.index("base") :]:
        if one.name not in ("lanes", "seed") and getattr(options, one.name) != one.default:
            raise ValueError(
                f"{one.name}: is read for chains alone; give source=ontology:...|graph:...|"
                "anchored:..., or leave it out"
            )


def check(options: IngestOptions) -> None:
    """Raise ValueError if max_rows is not a number of rows."""
    row_limit(options.max_rows, options.source)


main = EntryPoint("ingest", IngestOptions, body, check)
