"""The options of every command, declared without loading what the commands need.

Names and defaults of `TrainConfig` are written out, since to import them would load torch; a test
compares them.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT_BANK = "data/bank"
DEFAULT_CTX = 1000
BANK_HELP = "Bank folder or .npz file."
REGISTRY = "lvm"
REGISTRY_HELP = "Registered model of the bank: its versions, its alias baseline."
REPORT_HELP = "File to write the JSON report to."
BASELINE_URI = "models:/lvm@baseline"
MODEL_HELP = (
    "A version's number, models:/lvm@baseline, models:/lvm/latest, runs:/<id>/model or a free "
    "predictor: copy-last, ema, context-mean, ridge, nn-successor, context-ridge."
)
RERANKS = ("none", "lane")
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
    """Raise ValueError, before any work, if there is no bank at `path`; the default may be made."""
    if path in (None, DEFAULT_BANK) or Path(str(path)).exists():
        return
    raise ValueError(
        f"bank {path}: no such folder or .npz file; make it with `lvm ingest --bank {path}`"
    )


def check_writable(name: str, path: str | None) -> None:
    """Raise ValueError, before any work, if no file can be written to `path`."""
    if path is None:
        return
    try:
        is_folder = Path(path).is_dir()
        folder = next(one for one in Path(path).absolute().parents if one.exists())
    except OSError as error:  # a name that is too long
        why = f"{error.strerror}; give another file"
        raise ValueError(f"{name}: {path} cannot be written: {why}") from error
    if is_folder:
        raise ValueError(f"{name}: {path} is a folder; give a file such as {path}/{name}.json")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"{name}: {path} cannot be written, for {folder} {why}; give another file")


class Checked:
    """Options that are checked before any work: the bank is there, the report can be written."""

    def __post_init__(self) -> None:
        check_bank(getattr(self, "bank", None))
        check_writable("report", getattr(self, "report", None))


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


@dataclass(frozen=True)
class MeasureOptions(Checked):
    """What `eval` and `lane-diagnostics` measure."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context; auto: the model's own.", low=2)
    split: str = option("test", "Split whose queries are asked.", choices=("test", "val"))
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class EvalOptions(MeasureOptions):
    """Rank the true next passage among all rows of a bank.

    For a predictor and for the free ones, with intervals; controls, the serving index.
    """

    baselines: bool = option(True, "Measure the free predictors too.")
    controls: bool = option(
        True, "Ask with shorter, shuffled, reversed contexts, without parts of the model too."
    )
    rerank: str = option("none", "Order the best 200 again by the lane to come.", choices=RERANKS)


@dataclass(frozen=True)
class LaneOptions(MeasureOptions):
    """Judge a predictor lane by lane: proceed, or ingest."""

    eval_run: str | None = option(
        None, "Run of an eval whose answers are judged (none: measure here).", unset="none"
    )
    lanes: str = option(
        "bank",
        "The bank's labels, written domains, clusters.",
        choices=("bank", PROTOTYPES, "kmeans"),
    )
    encoder: str | None = option(
        None, "Encoder of the prototypes, wordllama or a local folder; auto: the bank's own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_run is not None:
            _refuse_measuring(self)
        if self.encoder is not None and self.lanes != PROTOTYPES:
            raise ValueError(
                f"encoder: {self.encoder} would not be used with lanes={self.lanes}; give "
                f"lanes={PROTOTYPES}, or leave it at auto"
            )


def _refuse_measuring(options: LaneOptions) -> None:
    """Raise ValueError where an option says how to measure if a finished run is judged."""
    for field in fields(MeasureOptions):
        if field.name != "report" and getattr(options, field.name) != field.default:
            raise ValueError(
                f"{field.name}: would not be used, eval_run measured with its own; leave it out"
            )


@dataclass(frozen=True)
class ShadowOptions(Checked):
    """Replay all candidates, decide who is the baseline.

    All answer the same queries; the gates decide.
    """

    candidates: str = option(
        "all", "all, or versions, models:/lvm@<alias>, runs:/<id>/model, models:/m-<id>, by commas."
    )
    queries: str = option(
        "test",
        "test, or a log of target_row and sequence (csv too) or context_rows: .parquet, .jsonl.",
    )
    promote: str = option(
        "dry_run", "Whether the winner takes the alias.", choices=("dry_run", "enabled")
    )
    bank: str | None = option(
        None, f"{BANK_HELP} auto: of the first candidate named, or the newest trained."
    )
    ctx: int | None = option(None, "Context of the free predictors; auto: the longest.", low=2)
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    rerank: str = option("none", "Show every candidate re-ranked by lane, too.", choices=RERANKS)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class PredictOptions(Checked):
    """Retrieve the passages that most likely come next."""

    model: str = option(BASELINE_URI, MODEL_HELP)
    text: str | None = option(None, "Context as .txt, .md, .rst or .html.", unset="none")
    context: str | None = option(None, "Contexts as .npy, (T, D) or (B, T, D) float.", unset="none")
    queries: str | None = option(None, "Contexts of test, val or a query log.", unset="none")
    out: str | None = option(None, "Table of all answers to write, .parquet.", unset="none")
    k: int = option(5, "Passages to retrieve.", low=1, high=1000)
    rerank: str = option("none", "Re-rank the best 200 by the predicted lane.", choices=RERANKS)
    keep_context: bool = option(False, "Also show passages that the context holds.")
    bank: str | None = option(None, f"{BANK_HELP} auto: the model's own.")
    ctx: int | None = option(None, "Rows of context at most; auto: the model's own.", low=2)
    format: str = option("table", "What is printed.", choices=("table", "json"))
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.text, self.context, self.queries].count(None) != 2:
            raise ValueError("text, context, queries: give exactly one of the three")


@dataclass(frozen=True)
class PromoteOptions:
    """Make a version the baseline by hand, with a reason.

    The gates are passed over; the reason is logged.
    """

    version: str | None = option(None, "Version of lvm to promote; needed.", unset="none")
    reason: str | None = option(None, "Why, in a few words; needed.", unset="none")
    registry: str = option(REGISTRY, REGISTRY_HELP)

    def __post_init__(self) -> None:
        if self.version is None:
            raise ValueError("version: none was given; name the version of lvm to promote")
        if self.reason is None:
            raise ValueError("reason: none was given; say why the gates are passed over")


@dataclass(frozen=True)
class RollbackOptions:
    """Restore the previous baseline."""

    registry: str = option(REGISTRY, REGISTRY_HELP)


@dataclass(frozen=True)
class TrainOptions(Checked):
    """Train a model; val Hit@5 chooses the epoch.

    The bank and the windows are made first where they are missing. The model is logged and
    registered.
    """

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int | None = option(
        None,
        f"Rows of context (auto: the phase's, else {DEFAULT_CTX}, or the longest there is).",
        low=2,
    )
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    phase: str | None = option(
        None, "Phase of lvm/phases.yaml, which decides what is auto.", unset="none"
    )
    model: str | None = option(
        None, "Predictor (auto: the phase's, else delta_memory).", choices=MODELS
    )
    init: str | None = option(
        None,
        "Predictor whose weights training starts from: a version, models:/..., runs:/...",
        unset="none",
    )
    recipe: str = option("dense", "Decides what is auto.", choices=RECIPES)
    epochs: int | None = option(None, "Epochs at most.", low=1)
    max_steps: int | None = option(None, "Optimizer steps at most (auto: epochs decide).", low=1)
    batch_size: int | None = option(None, "Windows a batch.", low=1)
    accumulation: int | None = option(None, "Batches a step.", low=1)
    lr: float | None = option(None, "Peak learning rate.", low=0)
    weight_decay: float | None = option(None, "AdamW's weight decay.", low=0)
    alpha: float | None = option(
        None, "Weight of a loss term: dense: of 1 - cos; seed: of InfoNCE.", low=0
    )
    temperature: float | None = option(None, "Softmax temperature.", low=0)
    focus: float | None = option(
        None, "Weight of targets within reach: 0 (cross entropy) to 1.", low=0
    )
    negatives: int | None = option(None, "Bank negatives a step.", low=0)
    hard_negatives: int = option(0, "Negatives a position that the model confuses.", low=0)
    hard_from: float = option(0.25, "Share of the steps before hard negatives.", low=0)
    patience: int | None = option(None, "Epochs without a better Hit@5.", low=1)
    averaging: str | None = option(None, "Average of the weights.", choices=("ema", "swa", "none"))
    chunk: int | None = option(None, "Steps of a chunk (auto: the phase's, else 200).", low=1)
    slots: int = option(16, "Slots of the memory.", low=1)
    cell: str = option("gru", "Recurrent cell.", choices=CELLS)
    hidden: int | None = option(
        None, "Width of the states (auto: the phase's, else the model's).", low=1
    )
    layers: int | None = option(None, "Layers (auto: the phase's, else the model's).", low=1)
    dropout: float = option(0.2, "Share of states dropped in training.", low=0)
    trunk: str | None = option(
        None,
        "What experts share (auto: frozen where tmd_experts has an init).",
        choices=("frozen", "trained"),
    )
    experts: int = option(16, "Experts of tmd_experts.", low=1)
    expert_rank: int = option(64, "Rank of each expert's map.", low=1)
    experts_control: str = option(
        "none",
        "Rival of the experts: one expert of twice the rank, lanes permuted among documents.",
        choices=("none", "dense", "permuted"),
    )
    gate_balance: float = option(0.01, "Weight of the gate's balance.", low=0)
    gate_z: float = option(1e-3, "Weight of the gate's z-loss.", low=0)
    gate_lanes: float = option(0.1, "First weight of the targets' lanes, 0 at the end.", low=0)
    device: str = option("auto", "Where to train.", choices=DEVICES)
    precision: str = option("auto", "Arithmetic.", choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "Compute activations twice, keep none.")
    seed: int = option(0, "Seed of weights, batches, negatives.", low=0)
    resume: str = option(
        "auto",
        "Go on from an interrupted run of this very configuration (auto: where there is one).",
        choices=("auto", "true", "false"),
    )
    register: bool = option(True, "Register the model as a version of lvm.")
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
    """Tell whether more data or a wider model is worth it.

    Trains a grid of data fractions, widths and seeds; the verdict has intervals.
    """

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    fractions: str = option("0.125,0.25,0.5,1", "Fractions of the train documents, ascending.")
    widths: str = option("128,256,512", "Widths of the model, ascending.")
    seeds: str = option("0,1,2", "Seeds of each cell: documents, weights, batches.")
    model: str = option("delta_memory", "Predictor.", choices=DENSE_MODELS)
    max_steps: int = option(600, "Optimizer steps of each cell.", low=1)
    max_queries: int | None = option(None, "Measured val queries at most (auto: 10,000).", low=1)
    batch_size: int | None = option(None, "Windows a batch.", low=1)
    lr: float | None = option(None, "Peak learning rate.", low=0)
    negatives: int | None = option(None, "Bank negatives a step.", low=0)
    chunk: int = option(200, "Steps of one chunk of the cache.", low=1)
    slots: int = option(16, "Slots of the memory.", low=1)
    cell: str = option("gru", "Recurrent cell.", choices=CELLS)
    layers: int | None = option(None, "Layers (auto: the model's).", low=1)
    dropout: float = option(0.2, "Share of states dropped in training.", low=0)
    device: str = option("auto", "Where to train.", choices=DEVICES)
    precision: str = option("auto", "Arithmetic.", choices=PRECISIONS)
    report: str | None = option(None, REPORT_HELP, unset="none")


@dataclass(frozen=True)
class PhasesOptions(Checked):
    """Train the table of phases, replay them together.

    Each is trained once, all answer the same queries, and the old figures stand beside theirs.
    """

    phases: str = option("1,2,2B,3,3.5,4", "Phases of lvm/phases.yaml, by commas, in order.")
    recipe: str = option(
        "dense", "seed: as the old phases were trained.", choices=(*RECIPES, "both")
    )
    size: str = option(
        "quick",
        "full: train's own; quick: 256 wide, 8 epochs (seed: 30); tiny: does it run.",
        choices=("full", "quick", "tiny"),
    )
    bank: str = option(DEFAULT_BANK, BANK_HELP)
    seed: int = option(0, "Seed of every training.", low=0)
    epochs: int | None = option(None, "Epochs at most; auto: size, recipe.", low=1)
    max_steps: int | None = option(None, "Optimizer steps of a phase at most.", low=1)
    max_queries: int | None = option(None, "Queries at most; auto: 10,000.", low=1)
    gates: str = option("none", "Show the old criteria of success.", choices=("none", "old"))
    promote: str = option(
        "enabled",
        "enabled: the winner takes the alias if the gates agree; dry_run: it stays.",
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
