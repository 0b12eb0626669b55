"""Results of trained cells on disk, each under the hash of all that decides it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvm.models import fits
from lvm.models.weights import load_state, save_state
from lvm.training import fingerprint as identity


@dataclass(frozen=True, eq=False)
class Kept:
    """Ranks (Q,) of the measured queries with facts of the run as JSON values."""

    rank_Q: NDArray[np.float64]
    facts: dict[str, Any]


class CellStore:
    """A folder of results and of the states of unfinished trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, parts: Mapping[str, Any]) -> str:
        """Return the hash of `parts` (JSON values) with the versions of what computes a cell."""
        every = [identity.VERSION, fits.VERSION, torch.__version__, dict(parts)]
        return hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()

    def state_path(self, key: str) -> Path:
        """Return where the state of this cell's unfinished training lies."""
        return self.folder / f"{key[:16]}-state.safetensors"

    def read(self, key: str) -> Kept | None:
        """Return what was kept under `key`; None where nothing whole is there."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors, meta = load_state(path)
        except ValueError:
            return None
        if meta.get("key") != key or set(tensors) != {"rank_Q"}:
            return None
        return Kept(tensors["rank_Q"].numpy(), meta["facts"])

    def write(self, key: str, found: Kept) -> None:
        """Keep a result; the training state of the same cell is removed."""
        meta = {"key": key, "facts": found.facts}
        save_state(self._path(key), {"rank_Q": torch.from_numpy(found.rank_Q)}, meta)
        self.state_path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:16]}.safetensors"
