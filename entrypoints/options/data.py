"""Options of the commands that make banks and windows, and of the whole pipeline."""

from dataclasses import dataclass

from entrypoints.options.fields import (
    BANK_HELP,
    DEFAULT_BANK,
    DEFAULT_CTX,
    REGISTRY,
    REGISTRY_HELP,
    REPORT_HELP,
    Checked,
    option,
)


@dataclass(frozen=True)
class MainOptions(Checked):
    """Run the whole pipeline on the embedded text.

    These are ingest, export, train, eval, lane-diagnostics and shadow-eval with promotion, as
    nested runs.
    """

    size: str = option(
        "quick",
        "full: all of python-docs, ctx 1000; quick: 40,000 rows, ctx 500; tiny: does it run at "
        "all.",
        choices=("quick", "full", "tiny"),
    )
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class IngestOptions:
    """Make a bank of text, vectors, ontologies or graphs.

    Text is embedded. Chains are runs of 8 to 14 concepts, each a sequence of the bank; with --base
    they are pinned to train. Their CPESH records lie in the bank's folder as cpesh.parquet. The
    options from --base on are for chains; --lanes and --seed for text, too.
    """

    source: str = option(
        "python-docs",
        "python-docs, a folder of .md/.rst/.html/.txt/.jsonl files, a table with text or vector "
        "(.parquet, .jsonl, .csv, .tsv), hf:<dataset or folder>[:split], an .npz file, a folder "
        "with vectors.npy and rows.parquet, or a bank folder. "
        "Chains: ontology:<.obo, edge list, WordNet folder>, graph:<edge list or bank folder>, "
        "anchored:<bank folder>.",
    )
    encoder: str | None = option(
        None,
        "wordllama, or a sentence-transformers name or folder; of vectors, what made them "
        "(auto: wordllama for text, not known for vectors).",
    )
    bank: str = option(DEFAULT_BANK, "Folder to write the bank to.")
    max_rows: str | None = option(
        None,
        "Keep about so many rows at most, files drawn by seed; all: every row (auto: of "
        "python-docs 150,000, else all).",
    )
    language: str = option("auto", "Of text: auto (by script), or a code such as de, pt, zh.")
    order: str | None = option(
        None, "Of a table of vectors: the column that sorts its rows (auto, or none)."
    )
    base: str | None = option(None, "Chains: bank whose rows come first.", unset="none")
    pool: str | None = option(
        None, "graph:<edge list>: bank whose row numbers the edges name.", unset="none"
    )
    lanes: str | None = option(
        None,
        "Text: folder makes the first folder of a file its lane. ontology: <subtree>=<lane>,...; "
        "else lanes to take, a,b (none: the source's own, all).",
        unset="none",
    )
    root: str | None = option(None, "ontology: roots to walk from, a,b (auto: all).")
    walk: str = option("both", "ontology: breadth or depth first.", choices=("bfs", "dfs", "both"))
    queries: str | None = option(
        None,
        "anchored: per_query.parquet of an eval over `base` with split=val; of others: refused.",
        unset="none",
    )
    anchor: float | None = option(
        None, "anchored: least cosine to a missed answer (auto: percentile).", low=0, high=1
    )
    neighbours: int = option(10, "anchored, graph:<bank>: nearest rows of each row.", low=1)
    coherence: str = option("auto", "Least mean adjacent cosine: auto, 0.7, p40 or 0.5,p40.")
    max_chains: int | None = option(None, "Keep so many chains at most (auto: all).", low=1)
    seed: int = option(
        0, "Seed of the draw of max_rows; of the order of walks, their lengths, negatives.", low=0
    )


@dataclass(frozen=True)
class ExportOptions(Checked):
    """Split a bank by document, cut windows, freeze queries.

    Also audits the split for leaks.
    """

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    overlap: int | None = option(None, "Rows that two windows share (auto: ctx / 2).", low=0)
    split: str = option(
        "document", "How rows are split; random is leaky.", choices=("document", "random")
    )
    windows: str | None = option(None, "Folder to write to (auto: data/windows/ctx<ctx>).")
    seed: int = option(0, "Seed of the split and of the queries' order.", low=0)
    report: str | None = option(None, REPORT_HELP, unset="none")
