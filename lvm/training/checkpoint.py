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

TRAINING_VERSION = 3  # raised whenever equal settings train another model from the same rows
CHECKPOINT_MINUTES = 2.0
Parts = Mapping[str, Mapping[str, Tensor]]
KIND_OR_NOISE = ("model", "dropout")


@dataclass
class Progress:
    """How far a training has come; `losses` are those of the epoch begun, one a step.

    `recent` are the last losses in their range, `above` those since then that are far above them;
    `rollbacks` counts the returns of the epoch begun to the weights of before `snapshot_step`;
    `norms` are those of the parts at the last step of an epoch.
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
    """The file that an interrupted training goes on from; without a path, nothing is written.

    It is due each `every_steps` optimiser steps; where that is None, every `CHECKPOINT_MINUTES`.
    """

    def __init__(self, path: Path | None, identity: str, every_steps: int | None = None) -> None:
        self.path, self.identity, self.every_steps = path, identity, every_steps
        self._written = time.monotonic()

    def due(self, step: int) -> bool:
        """Tell whether the state should be written after optimiser step number `step`."""
        if self.path is None:
            return False
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return time.monotonic() - self._written >= 60 * CHECKPOINT_MINUTES

    def write(self, parts: Parts, progress: Progress) -> None:
        """Replace the file as a whole."""
        if self.path is None:
            return
        tensors = {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}
        save_state(self.path, tensors, asdict(progress) | {"identity": self.identity})
        self._written = time.monotonic()

    def read(self) -> tuple[dict[str, dict[str, Tensor]], Progress] | None:
        """Return the parts with the progress; None where no state of this identity is there.

        Raises:
            ValueError: the file is no complete training state.
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
    """Return the model of `config` with the weights of `initial`, without it with seeded ones.

    A head that `initial` lacks is seeded, and adds nothing at first. The trunk is frozen where
    `config` says so.

    Raises:
        ValueError: `initial` is another kind of model, or of another size.
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
    """Return the sizes of the model; the dense control has the active experts' rank in one."""
    own = size_names(config.model) & set(as_dict(config))
    sizes = {name: getattr(config, name) for name in sorted(own)}
    if config.experts_control == "dense":
        sizes |= {"experts": 1, "expert_rank": ACTIVE * config.expert_rank}
    return sizes | {"model": config.model, "dim": dim}


def _take_over(model: nn.Module, initial: nn.Module, config: Settings) -> None:
    """Copy every weight of `initial`; only a head may be missing there."""
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
    """Return the identity of a training: settings, bank, windows, versions of what computes it.

    The weights of `initial` count, not their name (`init`). `decay` is left out, for it follows
    from the windows or from `initial`; threads and processes, too: they change the last bits of a
    model, not what it is.
    """
    derived = ("decay", "init")
    settings = {name: value for name, value in as_dict(config).items() if name not in derived}
    settings["initial"] = None if initial is None else model_digest(initial)
    parts = [TRAINING_VERSION, FIT_VERSION, torch.__version__, windows.bank_sha256, windows.sha256]
    return hashlib.sha256(json.dumps([*parts, settings], sort_keys=True).encode()).hexdigest()


def state_sha256(
    config: Settings, windows: Windows, num_processes: int, initial: nn.Module | None = None
) -> str:
    """Return the identity of an unfinished training, to the last bit: threads, processes count."""
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
