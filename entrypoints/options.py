"""The options of every command, with their defaults and help texts.

Importing this file loads nothing of lvm, so that help is fast. Values that lvm defines are written
out; a test compares them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT_BANK = "data/bank"
DEFAULT_CTX = 1000
BANK_HELP = "Bank folder or .npz file"
REGISTRY = "lvm"
REGISTRY_HELP = "Registered model that holds the versions of this bank."
REPORT_HELP = "File to write the JSON report to."
BASELINE_URI = "models:/lvm@baseline"
MODEL_HELP = (
    "A version number, models:/lvm@baseline (the baseline of --registry), models:/lvm/latest, "
    "runs:/<id>/model, or a free predictor: "
    "copy-last, ema, context-mean, ridge, nn-successor, context-ridge."
)
RERANKS = ("none", "lane", "lexical", "hybrid")
RERANK_HELP = "Order the best 200 by the lane, the words of the last rows (lexical), or both."
PROTOTYPES = "prototypes"
RECIPES = ("dense", "seed")
CELLS = ("gru", "mingru")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
MODELS = ("memory_gru", "delta_memory", "skip", "transformer", "res_mlp", "tmd_experts")
# Models of any width; experts grow from a trained one.
DENSE_MODELS = ("delta_memory", "memory_gru", "transformer", "res_mlp")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    unset: str = "auto",
) -> Any:
    """Return a dataclass field that becomes a click option.

    `unset` is the word that stands for None; `low` and `high` are inclusive bounds.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "unset": unset}
    return dataclasses.field(default=default, metadata=metadata)


def check_bank(path: str | None) -> None:
    """Raise ValueError if there is no bank at `path`; the default bank can still be made."""
    if path in (None, DEFAULT_BANK) or Path(str(path)).exists():
        return
    raise ValueError(
        f"bank {path}: no such folder or .npz file; make it with `lvm ingest --bank {path}`"
    )


class Checked:
    """Options that check, before any work, the bank and the path of the report."""

    def __post_init__(self) -> None:
        from lvm.system.atomic import check_writable

        check_bank(getattr(self, "bank", None))
        check_writable("report", getattr(self, "report", None))


@dataclass(frozen=True)
class MainOptions(Checked):
    """Run the whole pipeline on the embedded text.

    Runs ingest, export, train, eval, lane-diagnostics and shadow-eval (with promotion) as nested
    runs.
    """

    size: str = option(
        "quick",
        "full: all of python-docs, ctx 1000; quick: 40,000 rows, ctx 500; tiny: a smoke test.",
        choices=("quick", "full", "tiny"),
    )
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class IngestOptions:
    """Make a bank from text or vectors, or chains from ontologies or graphs.

    Text is split into sentences and embedded. The options from --base on are for chains, except
    --lanes and --seed, which text has, too. Chains are sequences of 8 to 14 concepts that widen the
    bank --base; they are only trained on. docs/chains.md explains them.
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
        "wordllama, or a sentence-transformers model (name or folder). For vectors: what made "
        "them (auto: wordllama for text, unknown for vectors).",
    )
    bank: str = option(DEFAULT_BANK, "Folder to write the bank to.")
    max_rows: str | None = option(
        None,
        "Most rows to keep, about; files are drawn by seed. all: every row (auto: 150,000 for "
        "python-docs, else all).",
    )
    language: str = option("auto", "Language of text: auto (by script), or a code such as de, pt.")
    order: str | None = option(None, "Column that sorts a table of vectors (auto, or none).")
    base: str | None = option(None, "Chains: the bank that they widen.", unset="none")
    pool: str | None = option(
        None, "graph:<edge list>: bank whose rows the edges name.", unset="none"
    )
    lanes: str | None = option(
        None,
        "Text: folder makes a file's top folder its lane. ontology: <subtree>=<lane>,...; other "
        "chains: lanes to take, a,b (none: all lanes of the source).",
        unset="none",
    )
    root: str | None = option(None, "ontology: roots to walk from, a,b (auto: all).")
    walk: str = option("both", "ontology: breadth or depth first.", choices=("bfs", "dfs", "both"))
    queries: str | None = option(
        None, "anchored: per_query.parquet of an eval of --base with split=val.", unset="none"
    )
    anchor: float | None = option(
        None, "anchored: least cosine to a missed answer (auto: percentile).", low=0, high=1
    )
    neighbours: int = option(10, "anchored, graph:<bank>: nearest rows of each row.", low=1)
    coherence: str = option(
        "auto", "Chains: least mean cosine of neighbours: auto, 0.7, p40 (percentile) or 0.5,p40."
    )
    max_chains: int | None = option(None, "Most chains to keep (auto: all).", low=1)
    seed: int = option(
        0, "Seed of the files drawn by max_rows; of the walks and negatives of chains.", low=0
    )


@dataclass(frozen=True)
class ExportOptions(Checked):
    """Split a bank by document, cut windows, freeze queries.

    Also audits the split for leaks.
    """

    bank: str = option(DEFAULT_BANK, f"{BANK_HELP}.")
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    overlap: int | None = option(None, "Rows that two windows share (auto: ctx / 2).", low=0)
    split: str = option(
        "document", "Split into train, val, test; random leaks.", choices=("document", "random")
    )
    windows: str | None = option(None, "Folder to write to (auto: data/windows/ctx<ctx>).")
    seed: int = option(0, "Seed of the split and of the queries' order.", low=0)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class MeasureOptions(Checked):
    """Options that `eval` and `lane-diagnostics` share."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    bank: str | None = option(None, f"{BANK_HELP} (auto: the model's own).")
    ctx: int | None = option(None, "Rows of context (auto: the model's own).", low=2)
    split: str = option("test", "Split that the queries come from.", choices=("test", "val"))
    max_queries: int | None = option(None, "Most queries to measure (auto: 10,000).", low=1)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Rank the true next passage among all rows of a bank.

    Measures a predictor and the free ones, with intervals, then controls and the serving index.
    """

    baselines: bool = option(True, "Measure the free predictors too.")
    controls: bool = option(
        True,
        "Also measure shorter, shuffled and reversed contexts, and the model without each part.",
    )
    rerank: str = option("none", RERANK_HELP, choices=RERANKS)


@dataclass(frozen=True)
class LaneOptions(MeasureOptions):
    """Evaluate a predictor lane by lane; say for which lanes more text is needed."""

    eval_run: str | None = option(
        None, "Run of an eval to take results of (none: measure now).", unset="none"
    )
    lanes: str = option(
        "bank",
        "Lanes from the bank's labels, lane descriptions (prototypes) or clusters (kmeans).",
        choices=("bank", PROTOTYPES, "kmeans"),
    )
    encoder: str | None = option(
        None, "Encoder of the prototypes: wordllama or a local folder (auto: the bank's own)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_run is not None:
            for field in fields(MeasureOptions):
                if field.name != "report" and getattr(self, field.name) != field.default:
                    raise ValueError(
                        f"{field.name}: would not be used, eval_run has its own; omit it"
                    )
        if self.encoder is not None and self.lanes != PROTOTYPES:
            raise ValueError(
                f"encoder: {self.encoder} would not be used with lanes={self.lanes}; give "
                f"lanes={PROTOTYPES}, or omit it"
            )


@dataclass(frozen=True)
class ShadowOptions(Checked):
    """Replay all candidates on the same queries; decide which one is the baseline.

    The gates of lvm/gates.yaml decide. Nothing changes without promote=enabled.
    """

    candidates: str = option(
        "all",
        "all, or a list: version numbers, models:/lvm@<alias>, runs:/<id>/model, models:/m-<id>.",
    )
    queries: str = option(
        "test",
        "test, or a query log: target_row with sequence (.csv, .tsv, .jsonl, .parquet) or "
        "context_rows (.jsonl, .parquet), or the folder of a server's LVM_REQUEST_LOG.",
    )
    promote: str = option(
        "dry_run",
        "enabled: the winner becomes the baseline; dry_run: only report.",
        choices=("dry_run", "enabled"),
    )
    bank: str | None = option(
        None, f"{BANK_HELP} (auto: that of the first candidate, or the newest trained one)."
    )
    ctx: int | None = option(
        None, "Context of the free predictors (auto: the longest of a candidate).", low=2
    )
    max_queries: int | None = option(None, "Most queries to measure (auto: 10,000).", low=1)
    rerank: str = option("none", f"{RERANK_HELP} The gates decide on it.", choices=RERANKS)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class PredictOptions(Checked):
    """Retrieve the passages that most likely come next."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    text: str | None = option(None, "Text to continue: .txt, .md, .rst or .html.", unset="none")
    context: str | None = option(
        None, "Vectors to continue: .npy of shape (T, D), or (B, T, D) for several.", unset="none"
    )
    queries: str | None = option(None, "Contexts of test, val or a query log.", unset="none")
    out: str | None = option(None, "Table of all answers to write, .parquet.", unset="none")
    k: int = option(5, "Passages to retrieve.", low=1, high=1000)
    rerank: str = option("none", RERANK_HELP, choices=RERANKS)
    keep_context: bool = option(False, "Also show passages that are in the context.")
    bank: str | None = option(None, f"{BANK_HELP} (auto: the model's own).")
    ctx: int | None = option(None, "Most rows of context to read (auto: the model's own).", low=2)
    format: str = option("table", "What is printed.", choices=("table", "json"))
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.text, self.context, self.queries].count(None) != 2:
            raise ValueError("text, context, queries: give exactly one of the three")


@dataclass(frozen=True)
class PromoteOptions:
    """Make a version the baseline by hand, with a reason.

    No gate is checked; the reason is logged.
    """

    version: str | None = option(None, "Number of the version to promote; required.", unset="none")
    reason: str | None = option(None, "Why, in a few words; required.", unset="none")
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        if self.version is None:
            raise ValueError("version: none was given; give the number of the version to promote")
        if self.reason is None:
            raise ValueError(
                "reason: none was given; say why this version is promoted without the gates"
            )


@dataclass(frozen=True)
class RollbackOptions:
    """Restore the previous baseline."""

    registry: str = option(REGISTRY, REGISTRY_HELP)


@dataclass(frozen=True)
class TrainOptions(Checked):
    """Train a model, log it, register it.

    Missing windows are made first, and so is the default bank. The epoch with the best Hit@5 on val
    is kept. `auto` follows the phase, else the recipe and the size of the bank.
    """

    bank: str = option(DEFAULT_BANK, f"{BANK_HELP}.")
    ctx: int | None = option(
        None, f"Rows of context (auto: {DEFAULT_CTX}, or the longest sequence of the bank).", low=2
    )
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    phase: str | None = option(
        None, "Phase of lvm/phases.yaml; it sets what is auto.", unset="none"
    )
    model: str | None = option(None, "Architecture (auto: delta_memory).", choices=MODELS)
    init: str | None = option(
        None, "Model to start from: a version, models:/..., runs:/... or a folder.", unset="none"
    )
    recipe: str = option("dense", "Loss and defaults; seed: the old system's.", choices=RECIPES)
    epochs: int | None = option(None, "Most epochs.", low=1)
    max_steps: int | None = option(None, "Most optimizer steps (auto: no limit).", low=1)
    batch_size: int | None = option(None, "Windows per batch.", low=1)
    accumulation: int | None = option(None, "Batches per optimizer step.", low=1)
    lr: float | None = option(None, "Peak learning rate.", low=0)
    weight_decay: float | None = option(None, "AdamW's weight decay.", low=0)
    alpha: float | None = option(
        None, "Weight of the second loss term: 1 - cos (dense), InfoNCE (seed).", low=0
    )
    temperature: float | None = option(None, "Softmax temperature.", low=0)
    focus: float | None = option(
        None, "Above 0, unlikely targets count less (generalised cross entropy).", low=0
    )
    negatives: int | None = option(None, "Bank negatives per step.", low=0)
    hard_negatives: int = option(0, "Hard negatives per position.", low=0)
    hard_from: float = option(0.25, "Share of the steps before hard negatives begin.", low=0)
    patience: int | None = option(None, "Epochs without a better val Hit@5 before the end.", low=1)
    averaging: str | None = option(None, "Weight averaging.", choices=("ema", "swa", "none"))
    chunk: int | None = option(None, "Rows per chunk of the context (auto: 200).", low=1)
    slots: int = option(16, "Slots of the memory.", low=1)
    cell: str = option("gru", "Recurrent cell.", choices=CELLS)
    hidden: int | None = option(None, "Hidden width (auto: the model's default).", low=1)
    layers: int | None = option(None, "Layers (auto: the model's default).", low=1)
    dropout: float = option(0.2, "Dropout probability.", low=0)
    trunk: str | None = option(
        None,
        "Whether the shared trunk of tmd_experts is trained (auto: frozen with init).",
        choices=("frozen", "trained"),
    )
    experts: int = option(16, "Experts of tmd_experts.", low=1)
    expert_rank: int = option(64, "Rank of each expert's map.", low=1)
    experts_control: str = option(
        "none",
        "Control: dense is one expert of twice the rank; permuted shuffles lanes among documents.",
        choices=("none", "dense", "permuted"),
    )
    gate_balance: float = option(0.01, "Weight of the gate's load-balancing loss.", low=0)
    gate_z: float = option(1e-3, "Weight of the gate's z-loss.", low=0)
    gate_lanes: float = option(0.1, "Initial weight of the gate's lane loss; falls to 0.", low=0)
    device: str = option("auto", "Where to train.", choices=DEVICES)
    precision: str = option("auto", "Arithmetic.", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    seed: int = option(0, "Seed of weights, batches and negatives.", low=0)
    resume: str = option(
        "auto",
        "Resume an interrupted run of the same configuration (auto: if there is one).",
        choices=("auto", "true", "false"),
    )
    register: bool = option(True, "Register the model as a version.")
    log_bank: bool = option(False, "Log a copy of the bank with the model, for small banks.")
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class TuneOptions(Checked):
    """Search a space for better settings than the defaults, which are the first trial.

    The best trial is registered; its gain on val is measured again on test.
    """

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int | None = option(None, "Rows of context of the default (auto: as of train).", low=2)
    space: str | None = option(None, "YAML file of what is varied (auto: lvm/tune.yaml).")
    trials: int = option(20, "Trials of the study in all.", low=1)
    study: str | None = option(None, "Study, which goes on where it ended (auto: the registry's).")
    model: str = option("delta_memory", "Predictor.", choices=MODELS)
    epochs: int | None = option(None, "Epochs of each trial at most.", low=1)
    batch_size: int | None = option(None, "Windows a batch.", low=1)
    negatives: int | None = option(None, "Bank negatives a step.", low=0)
    seed: int = option(0, "Seed of every training and of the draws.", low=0)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class ScalingOptions(Checked):
    """Tell whether more data or a wider model would pay.

    Trains a grid of data fractions, widths and seeds; the verdict has intervals.
    """

    bank: str = option(DEFAULT_BANK, f"{BANK_HELP}.")
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    fractions: str = option("0.125,0.25,0.5,1", "Fractions of the train documents, ascending.")
    widths: str = option("128,256,512", "Widths of the model, ascending.")
    seeds: str = option("0,1,2", "Seeds of each cell.")
    model: str = option("delta_memory", "Predictor.", choices=DENSE_MODELS)
    max_steps: int = option(600, "Optimizer steps of each cell.", low=1)
    max_queries: int | None = option(None, "Most val queries to measure (auto: 10,000).", low=1)
    batch_size: int | None = option(None, "Windows per batch.", low=1)
    lr: float | None = option(None, "Peak learning rate.", low=0)
    negatives: int | None = option(None, "Bank negatives per step.", low=0)
    chunk: int = option(200, "Rows per chunk of the context.", low=1)
    slots: int = option(16, "Slots of the memory.", low=1)
    cell: str = option("gru", "Recurrent cell.", choices=CELLS)
    layers: int | None = option(None, "Layers (auto: the model's default).", low=1)
    dropout: float = option(0.2, "Dropout probability.", low=0)
    device: str = option("auto", "Where to train.", choices=DEVICES)
    precision: str = option("auto", "Arithmetic.", choices=PRECISIONS)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class PhasesOptions(Checked):
    """Train the phases of lvm/phases.yaml, replay all on the same queries.

    Each is trained once. The report shows the published figures beside the new ones.
    """

    phases: str = option("1,2,2B,3,3.5,4", "Comma-separated phases of lvm/phases.yaml, in order.")
    recipe: str = option("dense", "seed trains as the old system did.", choices=(*RECIPES, "both"))
    size: str = option(
        "quick",
        "full: the defaults of train; quick: width 256, 8 epochs (seed: 30); tiny: a smoke test.",
        choices=("full", "quick", "tiny"),
    )
    bank: str = option(DEFAULT_BANK, f"{BANK_HELP}.")
    seed: int = option(0, "Seed of every training.", low=0)
    epochs: int | None = option(None, "Most epochs (auto: by size and recipe).", low=1)
    max_steps: int | None = option(None, "Most optimizer steps of each phase.", low=1)
    max_queries: int | None = option(None, "Most queries to measure (auto: 10,000).", low=1)
    gates: str = option(
        "none", "old: also show the criteria of success of the old system.", choices=("none", "old")
    )
    promote: str = option(
        "enabled",
        "enabled: the winner becomes the baseline if it passes the gates; dry_run: only report.",
        choices=("dry_run", "enabled"),
    )
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


OPTIONS: dict[str, type[Any]] = {
    "main": MainOptions,
    "ingest": IngestOptions,
    "export": ExportOptions,
    "train": TrainOptions,
    "eval": EvalOptions,
    "lane-diagnostics": LaneOptions,
    "shadow-eval": ShadowOptions,
    "tune": TuneOptions,
    "scaling": ScalingOptions,
    "phases": PhasesOptions,
    "promote": PromoteOptions,
    "rollback": RollbackOptions,
    "predict": PredictOptions,
}
