"""Config of a training: options, recipes that fill the unset ones, checks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lvm.models.recurrent import CELLS
from lvm.models.table import SIZES, TRAINED_MODELS, size_names
from lvm.models.weights import MAX_SIZE
from lvm.system.processes import bf16_speedup
from lvm.training.loss import TEMPERATURE_RANGE

RECIPES = ("dense", "seed")
AVERAGES = ("ema", "swa", "none")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
TRUNKS = ("frozen", "trained")
EXPERTS_CONTROLS = ("none", "dense", "permuted")
MIN_BF16_SPEEDUP = 1.5  # of products; at 2.2 a whole training step took 0.75 of its time in fp32
MANY_ROWS = 80_000  # with this many train rows batches are large and epochs few
LEAST_EPOCHS, LEAST_STEPS = 6, 500  # of a training under recipe=dense
HARD_DEPTH = 200  # hard negatives are chosen among this many nearest train rows


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training; None means that the recipe decides (`resolve`).

    lr is the peak learning rate of AdamW. patience counts epochs without a better val Hit@5,
    accumulation counts batches per optimizer step, batch_size counts windows. max_steps ends the
    training and its schedule early (None: `epochs` decides). hard_negatives is the number per
    position, used after the share `hard_from` of all steps. init names the predictor whose weights
    training starts from; trunk None freezes the weights that an expert head takes from it.
    """

    model: str = "delta_memory"
    init: str | None = None
    recipe: str = "dense"
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    alpha: float | None = None
    temperature: float | None = None
    focus: float | None = None
    negatives: int | None = None
    hard_negatives: int = 0
    hard_from: float = 0.25
    patience: int | None = None
    averaging: str | None = None
    chunk: int = 200
    slots: int = 16
    cell: str = "gru"
    hidden: int | None = None
    layers: int | None = None
    dropout: float = 0.2
    trunk: str | None = None
    experts: int = 16
    expert_rank: int = 64
    experts_control: str = "none"
    gate_balance: float = 0.01
    gate_z: float = 1e-3
    gate_lanes: float = 0.1
    device: str = "auto"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    decay: float = 0.5

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> "TrainConfig":
        """Return the config of those options that it knows and that are not None."""
        known = {field.name for field in fields(cls)} & options.keys()
        return cls(**{name: options[name] for name in known if options[name] is not None})

    def __post_init__(self) -> None:
        _one_of("model", self.model, tuple(TRAINED_MODELS))
        _one_of("recipe", self.recipe, RECIPES)
        _one_of("cell", self.cell, CELLS)
        _one_of("device", self.device, DEVICES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("averaging", self.averaging or AVERAGES[0], AVERAGES)
        for name in ("epochs", "max_steps", "batch_size", "accumulation", "patience"):
            _at_least(name, getattr(self, name), 1)
        for name in ("hidden", "layers", "chunk", "slots", "experts", "expert_rank"):
            _at_least(name, getattr(self, name), 1)
            _can_be_saved(name, getattr(self, name))
        for name in ("lr", "temperature"):
            _above_zero(name, getattr(self, name))
        for name in ("weight_decay", "alpha", "negatives", "hard_negatives", "seed"):
            _at_least(name, getattr(self, name), 0)
        for name in ("gate_balance", "gate_z", "gate_lanes"):
            _at_least(name, getattr(self, name), 0)
        known = size_names(self.model) & {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
        SIZES[self.model](dim=1, **given)
        low, high = TEMPERATURE_RANGE
        if self.recipe == "dense" and not low <= (self.temperature or low) <= high:
            raise ValueError(f"temperature: {self.temperature} is outside {low} ... {high}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: 'cuda' is not available here; use device=auto or device=cpu")
        if not 0 <= (self.focus or 0) <= 1:
            raise ValueError(f"focus: {self.focus} is outside 0 ... 1")
        for name in ("dropout", "hard_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share from 0 to below 1")
        if self.focus and self.recipe != "dense":
            raise ValueError("focus: recipe=seed has another loss; use recipe=dense")
        if self.negatives and self.recipe != "dense":
            raise ValueError("negatives: recipe=seed reads none of the bank; use recipe=dense")
        if self.hard_negatives and self.recipe != "dense":
            raise ValueError("hard_negatives: need bank negatives beside them; use recipe=dense")
        if self.hard_negatives > HARD_DEPTH:
            raise ValueError(
                f"hard_negatives: {self.hard_negatives} are more than the {HARD_DEPTH} rows among "
                "which they are found"
            )
        self._check_experts()
        self._check_readers()

    def _check_experts(self) -> None:
        _one_of("experts_control", self.experts_control, EXPERTS_CONTROLS)
        _one_of("trunk", self.trunk or TRUNKS[0], TRUNKS)
        has_experts = self.model == "tmd_experts"
        if self.experts_control != "none" and not has_experts:
            raise ValueError(f"experts_control: {self.model} has no experts; use model=tmd_experts")
        if self.experts_control == "permuted" and self.experts < 2:
            raise ValueError(f"experts_control: permuted lanes need 2 experts, not {self.experts}")
        if self.trunk == "frozen" and not has_experts:
            raise ValueError(f"trunk: {self.model} is all trunk, nothing would train; use auto")
        if self.trunk == "frozen" and self.init is None:
            raise ValueError("trunk: frozen needs the weights of a trained one; give init, or auto")

    def _check_readers(self) -> None:
        """Raise ValueError for a changed option that the model does not use.

        A phase sets `chunk` for every model, so `chunk` may be unused.
        """
        sizes = size_names(self.model)
        chooses = "experts" in sizes and self.experts_control != "dense"
        experts = "model=tmd_experts without experts_control=dense"
        gated = chooses and self.experts > 1, f"the gate of 2 experts or more ({experts})"
        readers = {
            "slots": ("slots" in sizes, "a memory (model=memory_gru, tmd_experts)"),
            "hidden": ("hidden" in sizes, "models with an encoder (all but model=skip)"),
            "layers": ("layers" in sizes, "models with an encoder (all but model=skip)"),
            "cell": ("cell" in sizes, "recurrent layers (model=memory_gru, tmd_experts)"),
            "experts": (chooses, experts),
            "expert_rank": ("expert_rank" in sizes, "model=tmd_experts"),
            "gate_balance": gated,
            "gate_z": gated,
            "gate_lanes": gated,
            "hard_from": (self.hard_negatives > 0, "hard_negatives of 1 or more"),
        }
        defaults = {field.name: field.default for field in fields(TrainConfig)}
        for name, (is_read, reader) in readers.items():
            value, default = getattr(self, name), defaults[name]
            if not is_read and value != default:
                raise ValueError(f"{name}: {value} is for {reader} alone; leave it at {default}")


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """A `TrainConfig` with every option decided but `max_steps` and sizes that the model lacks."""

    epochs: int
    batch_size: int
    accumulation: int
    lr: float
    weight_decay: float
    alpha: float
    temperature: float
    focus: float
    negatives: int
    patience: int
    averaging: str
    trunk: str


def resolve(config: TrainConfig, ctx: int, num_train_rows: int = MANY_ROWS) -> Settings:
    """Return `config` with every None replaced by its recipe's value.

    The values follow the context length `ctx` and, under recipe=dense, the number of train rows.
    """
    if config.recipe == "dense":
        recipe = _dense(ctx, config.batch_size, num_train_rows)
    else:
        recipe = _seed(ctx, config.batch_size)
    chosen = {name: value for name, value in as_dict(config).items() if value is not None}
    device, precision = chosen_device(config.device), config.precision
    if precision == "auto":
        # bf16 changes the numbers: runs on other machines agree only to its eight bits.
        is_faster = device == "cuda" or bf16_speedup() > MIN_BF16_SPEEDUP
        precision = "bf16" if is_faster else "fp32"
    grows = config.model == "tmd_experts" and config.init is not None
    recipe["trunk"] = "frozen" if grows else "trained"
    widths = {f.name: f.default for f in fields(SIZES[config.model])}
    recipe |= {name: widths[name] for name in ("hidden", "layers") if name in widths}
    return Settings(**(recipe | chosen | {"device": device, "precision": precision}))


def chosen_device(name: str) -> str:
    """Return the device to use: `name`, or for auto cuda if it is available, else cpu."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as JSON scalars."""
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _dense(ctx: int, batch_size: int | None, num_train_rows: int) -> dict[str, Any]:
    """Return the settings of recipe=dense: batches of about 2,000 positions, 500 steps or more.

    A small bank gets batches of about 1,000 positions.
    """
    positions = 2000 if num_train_rows >= MANY_ROWS else 1000
    batch = batch_size or max(1, positions // ctx)
    steps_per_epoch = num_train_rows / (batch * ctx)
    return {
        "epochs": max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / steps_per_epoch)),
        "batch_size": batch,
        "accumulation": 1,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "alpha": 0.1,
        "temperature": 0.035,
        "focus": 0.3,
        "negatives": 4096,
        "patience": 3,
        "averaging": "ema",
    }


def _seed(ctx: int, batch_size: int | None) -> dict[str, Any]:
    """Return the old system's settings: batches shrink with ctx and accumulate to 256 windows."""
    batch = batch_size or next((b for c, b in ((100, 32), (500, 16), (1000, 8)) if ctx <= c), 4)
    return {
        "epochs": 30,
        "batch_size": batch,
        "accumulation": max(1, 256 // batch),
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "alpha": 0.05 if ctx <= 100 else 0.03,
        "temperature": 0.07,
        "focus": 0.0,
        "negatives": 0,
        "patience": 3,
        "averaging": "none",
    }


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: unknown '{value}'; known: {', '.join(known)}")


def _at_least(name: str, value: float | None, low: float) -> None:
    if value is not None and not low <= value < float("inf"):
        raise ValueError(f"{name}: {value} is not a finite number of at least {low}")


def _can_be_saved(name: str, size: int | None) -> None:
    if size is not None and size > MAX_SIZE:
        raise ValueError(f"{name}: {size} is above {MAX_SIZE:,}, the largest size of a saved model")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{name}: {value} is not a finite number above 0")
