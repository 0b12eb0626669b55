"""Reports of `ingest`, `export` and `main`: counts, drops, chains, windows, the last screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lvm.bank.bank import Bank
from lvm.chains.ingest import ChainReport
from lvm.corpus.ingest import IngestReport
from lvm.report.tables import (
    MARKDOWN,
    NOTE_LINES,
    TEXT,
    bullets,
    page_table,
    queries_line,
    table,
    wrapped,
)
from lvm.windows.planning import SPLITS, Windows

SHOWN = 12


def counts_table(report: IngestReport) -> str:
    """Return the rows of each sequence and lane, then what was dropped and why."""
    verb = "found as asked" if report.reused else f"written in {report.seconds:.0f} s"
    lines = [f"bank {report.path}: {report.rows:,} rows x {report.dim} dims, {verb}"]
    for title, counts in (("sequences", report.sequences), ("lanes", report.lanes)):
        if counts:
            lines.append(f"{len(counts):,} {title}: {_largest(counts)}")
    lines += [f"dropped {count:,} rows: {reason}" for reason, count in report.dropped.items()]
    if report.files:
        lines += ["", drops_table(report), ""]
    return "\n".join([*lines, *report.notes, f"sha256 {report.sha256}"])


def drops_table(report: IngestReport, style: str = TEXT) -> str:
    """Return one line per file that lost sentences or gave none, the largest loss first."""
    reasons = list(report.dropped) if report.dropped else []
    reasons = [name for name in reasons if any(name in counts for counts in report.files.values())]
    ordered = sorted(
        report.files.items(),
        key=lambda item: (item[1]["kept"] > 0, item[1]["kept"] - sum(item[1].values())),
    )
    shown = ordered if style == MARKDOWN else ordered[:SHOWN]
    lines = [
        [name, *(f"{counts.get(column, 0):,}" for column in ("kept", *reasons))]
        for name, counts in shown
    ]
    if len(ordered) > len(shown):
        lines.append(
            [
                f"{len(ordered) - len(shown):,} more: dropped.md of the run",
                *[""] * (len(reasons) + 1),
            ]
        )
    return table(lines, ["sentences of", "kept", *reasons], "l" + "r" * (len(reasons) + 1), style)


def chains_text(report: ChainReport, style: str = TEXT) -> str:
    """Return the number of chains, their lanes, and a table of what each gate dropped."""
    verb = "found as asked" if report.reused else f"written in {report.seconds:.0f} s"
    cpesh, coherence = report.cpesh, report.coherence
    lines = [
        f"bank {report.path}: {report.rows:,} rows x {report.dim} dims ({report.base_rows:,} of "
        f"the base, then {report.chains:,} chains), {verb}",
        f"{len(report.lanes):,} lanes, in chains: {_largest(report.lanes)}",
        f"coherence of the chains kept: median {coherence['kept']['p50']:.3f}, asked for "
        f"{coherence['least']:.3f} or more",
        f"CPESH: {cpesh['records']:,} of {report.chains:,} chains have a record "
        f"({cpesh['rate']:.2%}); rule of cosines: {cpesh['rule']}, soft {cpesh['soft_low']:.2f} to "
        f"{cpesh['soft_high']:.2f}, hard below {cpesh['hard_high']:.2f}",
    ]
    counts = [
        [gate["name"], f"dropped: {gate['dropped']:,}", f"because of {gate['reason']}"]
        for gate in report.gates
    ]
    counts = [["candidates", f"{report.candidates:,}", ""], *counts]
    counts.append(["kept", f"{report.chains:,}", ""])
    body = table(counts, ["gate", "chains", "reason"], "lrl", style)
    joint = "\n\n" if style == MARKDOWN else "\n"
    notes = [*report.notes, f"sha256 {report.sha256}"]
    return joint.join(lines) + "\n\n" + body + "\n\n" + joint.join(notes)


def chain_metrics(report: ChainReport) -> Mapping[str, float]:
    """Return the metrics of the run: rows, chains, drops of each gate, CPESH."""
    return {
        "bank/rows": report.rows,
        "bank/dim": report.dim,
        "chains/candidates": report.candidates,
        "chains/kept": report.chains,
        **{f"chains/dropped_{gate['name']}": gate["dropped"] for gate in report.gates},
        "chains/coherence_least": report.coherence["least"],
        "chains/coherence_median": report.coherence["kept"]["p50"],
        "chains/cpesh_rate": report.cpesh["rate"],
        "chains/cpesh_absolute_rate": report.cpesh["absolute_rate"],
    }


def _largest(counts: Mapping[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{name or 'none'} {count:,}" for name, count in largest[:SHOWN]]
    return ", ".join(shown + ([f"{len(largest) - SHOWN} more"] if len(largest) > SHOWN else []))


def export_report(bank: Bank, windows: Windows, path: Path) -> dict[str, Any]:
    """Return the counts and the audit of the windows in the folder `path` as JSON values."""
    num_bytes = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    bank_bytes = bank.vectors.nbytes
    return {
        "bank": str(bank.path),
        "bank_sha256": bank.sha256,
        "bank_rows": bank.num_rows,
        "windows": str(path),
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


def windows_text(report: Mapping[str, Any]) -> str:
    """Return the rows, windows and queries of each split, then the audit."""
    counts = report["counts"]
    lines = [f"{report['windows']}: ctx {report['ctx']}, overlap {report['overlap']}"]
    lines.append(f"{'split':8}{'rows':>12}{'windows':>12}{'queries':>12}")
    for split in SPLITS:
        queries = counts.get(f"{split}_queries", 0)
        lines.append(
            f"{split:8}{counts[split + '_rows']:12,}{counts[split + '_windows']:12,}{queries:12,}"
        )
    mark = "LEAKY (split=random)" if report["leaky"] else "no leak"
    size = f"{report['bytes']:,} bytes, {report['share_of_bank']:.2%} of the bank"
    return "\n".join([*lines, f"audit: {mark}; {size}"])


def last_screen(
    ctx: int,
    shadow: Mapping[str, Any],
    example: Mapping[str, Any],
    model: str,
    commands: Mapping[str, str],
) -> str:
    """Return the end of `main`: the question, the winner and why, one prediction, commands.

    `example` is a line of `example_table` of `model`; `commands` maps a purpose to its command.
    """
    asked = (
        f"Which passage comes next, after up to {ctx:,} others? {shadow['num_queries']:,} test "
        f"queries from {shadow['num_documents']:,} documents; every one of the "
        f"{shadow['num_rows']:,} passages could be the answer."
    )
    decision = shadow["decision"]
    # The last two sentences of the context are enough to judge the prediction.
    before = " / ".join(str(example["context"]).split(" / ")[-2:])
    lines = [
        ("ASKED", asked),
        ("WON", f"{decision['winner'] or 'nobody'}: {'; '.join(decision['reasons'][:2])}"),
        ("EXAMPLE", f"of {model}, {example['outcome']} at rank {example['rank']:,.0f}"),
        ("  after", before),
        ("  found", str(example["found_1"])),
        ("  true", str(example["truth"])),
    ]
    body = [wrapped(f"{name:<9}{text}", TEXT, hanging=" " * 9) for name, text in lines]
    width = max(map(len, commands), default=0)
    typed = [f"  {want:<{width}}  {command}" for want, command in commands.items()]
    return "\n".join([*body, "TYPE NEXT", *typed])


def counts_note(counts: Mapping[str, object], remarks: Sequence[str] = ()) -> str:
    """Return what a run made as a table, one line per count."""
    lines = [
        [name, f"{value:,}" if isinstance(value, int) else str(value)]
        for name, value in counts.items()
    ]
    blocks = [page_table(lines, ["", ""], "lr")]
    return "\n\n".join([*blocks, bullets(remarks, MARKDOWN)] if remarks else blocks)


def pipeline_note(bank: str, ctx: int, shadow: Mapping[str, Any]) -> str:
    """Return the data of a pipeline, the queries of its replay, the decision with its reasons."""
    decision = shadow["decision"]
    asked = queries_line(shadow["num_queries"], shadow["num_documents"], shadow["num_rows"])
    blocks = [
        f"**Baseline: {decision['winner'] or 'none'}**",
        f"{bank}, ctx {ctx:,}: {asked}",
        bullets(decision["reasons"][:NOTE_LINES], MARKDOWN),
    ]
    return "\n\n".join(blocks)
