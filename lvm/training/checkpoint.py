"""The state of an unfinished training on disk."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lvm.models.weights import load_state, save_state

CHECKPOINT_MINUTES = 2.0
Parts = Mapping[str, Mapping[str, Tensor]]


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
