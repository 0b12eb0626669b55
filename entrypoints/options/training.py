"""Options of the commands that train; those of `TrainConfig` have its defaults.

Names and defaults are written out, since to import them would load torch; a test compares them.
"""

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

RECIPES = ("dense", "seed")
CELLS = ("gru", "mingru")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
MODELS = ("memory_gru", "delta_memory", "skip", "transformer", "res_mlp", "tmd_experts")
# Models of any width; experts grow from a trained one.
DENSE_MODELS = ("delta_memory", "memory_gru", "transformer", "res_mlp")


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
        None,
        "Phase of lvm/phases.yaml, which decides what is auto.",
        unset="none",
    )
    model: str | None = option(
        None,
        "Predictor (auto: the phase's, else delta_memory).",
        choices=MODELS,
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
    gradient_checkpointing: bool = option(
        False, "Compute activations twice instead of keeping them."
    )
    seed: int = option(0, "Seed of weights, batches, negatives.", low=0)
    resume: str = option(
        "auto",
        "Go on from an interrupted run of this very configuration (auto: where there is one).",
        choices=("auto", "true", "false"),
    )
    register: bool = option(True, "Register the model as a version of lvm.")
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


@dataclass(frozen=True)
class TuneOptions(Checked):
    """Search a space for better settings than the defaults.

    Each trial is a training, stopped early where it falls behind; the first is the default. The
    best is registered, and its gain on val is measured again on test.
    """

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int | None = option(
        None,
        f"Rows of context of the default (auto: {DEFAULT_CTX}, or the longest there is).",
        low=2,
    )
    space: str | None = option(None, "YAML file of what is varied (auto: lvm/tune.yaml).")
    trials: int = option(20, "Trials of the study in all.", low=1)
    study: str | None = option(None, "Name of the study, which goes on (auto: the registry's).")
    model: str = option("delta_memory", "Predictor.", choices=MODELS)
    epochs: int | None = option(None, "Epochs of each trial at most.", low=1)
    max_steps: int | None = option(None, "Optimizer steps of each trial at most.", low=1)
    batch_size: int | None = option(None, "Windows a batch.", low=1)
    negatives: int | None = option(None, "Bank negatives a step.", low=0)
    max_queries: int | None = option(None, "Test queries at most (auto: 10,000).", low=1)
    device: str = option("auto", "Where to train.", choices=DEVICES)
    precision: str = option("auto", "Arithmetic.", choices=PRECISIONS)
    seed: int = option(0, "Seed of every training and of the draws.", low=0)
    registry: str = option(REGISTRY, REGISTRY_HELP)
    report: str | None = option(None, REPORT_HELP, unset="none")
