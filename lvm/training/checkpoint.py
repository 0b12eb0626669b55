"""Start and resume a training: its first weights, the state file, the hashes that identify it."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvm.models.table import build_model, size_names
from lvm.models.tmd_experts import ACTIVE, TMDExperts
from lvm.models.weights import FIT_VERSION, load_state, model_digest, save_state
from lvm.system.seeding import torch_seed
from lvm.training.config import Settings, as_dict
from lvm.windows.planning import Windows

TRAINING_VERSION = 6  # increase when the same settings and rows train a different model
CHECKPOINT_MINUTES = 2.0
Parts = Mapping[str, Mapping[str, Tensor]]
KIND_OR_NOISE = ("model", "dropout")


@dataclass
class Progress:
    """Counters and history of a training, saved in its state file.

    `losses` are those of the current epoch, one a step. `recent` are the last losses within their
    range, `above` later ones far above it. `rollbacks` counts the rollbacks of the current epoch to
    the weights before `snapshot_step`. `norms` are the norms of each part at the last step of an
    epoch.
    """

    step: int = 0
    skipped_in_a_row: int = 0
    best_epoch: int = 0
    best_score: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    mined_epoch: int = 0
    recent: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    rollbacks: int = 0
    rollbacks_in_a_row: int = 0
    snapshot_step: int = -(10**9)
    norms: dict[str, float] = field(default_factory=dict)


class StateFile:
    """The state file from which an interrupted training resumes; without a path nothing is written.

    It is written every `every_steps` optimizer steps, or every `CHECKPOINT_MINUTES` if that is
    None.
    """

    def __init__(self, path: Path | None, identity: str, every_steps: int | None = None) -> None:
        self.path, self.identity, self.every_steps = path, identity, every_steps
        self._written = time.monotonic()

    def due(self, step: int) -> bool:
        """Tell whether to write the state after optimizer step number `step`."""
        if self.path is None:
            return False
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return time.monotonic() - self._written >= 60 * CHECKPOINT_MINUTES

    def write(self, parts: Parts, progress: Progress) -> None:
        """Write the state; a reader sees the old file or the new one."""
        if self.path is None:
            return
        tensors = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
        save_state(self.path, tensors, asdict(progress) | {"identity": self.identity})
        self._written = time.monotonic()

    def read(self) -> tuple[dict[str, dict[str, Tensor]], Progress] | None:
        """Return the saved tensors and the progress; None if there is no state of this training.

        Raises:
            ValueError: the file is not a complete training state.
        """
        if self.path is None or not self.path.is_file():
            return None
        tensors, meta = load_state(self.path)
        if meta["identity"] != self.identity:
            return None
        parts: dict[str, dict[str, Any]] = {}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = value
        known = {f.name: meta[f.name] for f in fields(Progress) if f.name in meta}
        return parts, Progress(**known)


def starting_model(config: Settings, dim: int, initial: nn.Module | None) -> nn.Module:
    """Return the model of `config` with the weights of `initial`, or with seeded random weights.

    A head that `initial` lacks is seeded and adds nothing at first. The trunk is frozen if `config`
    says so.

    Raises:
        ValueError: `initial` is another kind of model, or has other sizes.
    """
    assert (initial is None) == (config.init is None), "the weights that init names, or none"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "weights"))
        sizes = _sizes(config, dim)
        given: dict[str, Any] = {} if initial is None else initial.config  # type: ignore[assignment]
        if "memory" in given and "memory" in size_names(config.model):
            sizes["memory"] = given["memory"]
        model = build_model(sizes)
    if initial is not None:
        _take_over(model, initial, config)
    if config.trunk == "frozen" and isinstance(model, TMDExperts):
        model.freeze_trunk()
    return model


def _sizes(config: Settings, dim: int) -> dict[str, Any]:
    """Return the sizes of the model; the dense control joins the ranks of the active experts."""
    own = size_names(config.model) & set(as_dict(config))
    sizes = {name: getattr(config, name) for name in sorted(own)}
    if config.experts_control == "dense":
        sizes |= {"experts": 1, "expert_rank": ACTIVE * config.expert_rank}
    return sizes | {"model": config.model, "dim": dim}


def _take_over(model: nn.Module, initial: nn.Module, config: Settings) -> None:
    """Copy every weight of `initial` into `model`; only the head may be missing in `initial`."""
    own: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]
    given: dict[str, Any] = dict(initial.config)  # type: ignore[arg-type]
    grows = (own["model"], given["model"]) == ("tmd_experts", "memory_gru")
    if own["model"] != given["model"] and not grows:
        raise ValueError(
            f"init: {config.init} is a {given['model']}, from which no {own['model']} can start"
        )
    sizes = [name for name in given if name not in KIND_OR_NOISE]
    wrong = [name for name in sizes if given[name] != own.get(name)]
    if wrong:
        said = ", ".join(f"{name} {given[name]}, here {own.get(name)}" for name in wrong)
        raise ValueError(f"init: {config.init} has {said}; give the same sizes")
    weights = model.state_dict()
    weights.update({k: v.detach().cpu().clone() for k, v in initial.state_dict().items()})
    model.load_state_dict(weights)


def training_sha256(config: Settings, windows: Windows, initial: nn.Module | None = None) -> str:
    """Return a hash of the settings, bank, windows and library versions of a training.

    The weights of `initial` are hashed, not its name (`init`). `decay` is omitted because it
    follows from the windows or from `initial`. Threads and processes are omitted because they
    change only the last bits of a model.
    """
    derived = ("decay", "init")
    settings = {name: value for name, value in as_dict(config).items() if name not in derived}
    settings["initial"] = None if initial is None else model_digest(initial)
    parts = [TRAINING_VERSION, FIT_VERSION, torch.__version__, windows.bank_sha256, windows.sha256]
    return hashlib.sha256(json.dumps([*parts, settings], sort_keys=True).encode()).hexdigest()


def state_sha256(
    config: Settings, windows: Windows, num_processes: int, initial: nn.Module | None = None
) -> str:
    """Return a hash of an unfinished training; threads and processes count as well."""
    parts = [
        TRAINING_VERSION,
        windows.bank_sha256,
        windows.sha256,
        as_dict(config),
        torch.__version__,
    ]
    parts += [torch.get_num_threads(), num_processes]
    parts += [None if initial is None else model_digest(initial)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
