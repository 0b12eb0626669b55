"""Fits on train rows, kept in the folder of the windows that they were made from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lvm.models.weights import contents_sha256, load_state, save_state
from lvm.windows.planning import Windows

VERSION = 1  # raised whenever a fit gives other numbers from the same rows
FOLDER = "fits"


@dataclass(frozen=True)
class Fit:
    """What a fit found: tensors by name, JSON values by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def kept(windows: Windows, name: str, inputs: Mapping[str, Any], fit: Callable[[], Fit]) -> Fit:
    """Return what `fit` gives, read from <windows>/fits/<name>-<key>.safetensors if it is there.

    The key is a hash of all that the fit depends on: VERSION, torch's version, the bank, the plan,
    `inputs` (JSON values: seeds, the digest of a model). A file that cannot be read, is another
    one's or does not match the hash inside it is made anew. Windows that were never written keep
    nothing.
    """
    if windows.folder is None:
        return fit()
    parts = [VERSION, torch.__version__, windows.bank_sha256, windows.sha256, name, dict(inputs)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = windows.folder / FOLDER / f"{name}-{key[:16]}.safetensors"
    found = _read(path, key)
    if found is None:
        found = fit()
        _write(path, key, found)
    return found


def model_digest(model: nn.Module) -> str:
    """Return a hash of the predictor's class, configuration, every parameter, every buffer."""
    values = {"class": type(model).__qualname__, "config": getattr(model, "config", None)}
    return contents_sha256(model.state_dict(), json.dumps(values, sort_keys=True))


def _read(path: Path, key: str) -> Fit | None:
    """Return the fit kept at `path`; None where there is none that can be trusted."""
    if not path.is_file():
        return None
    try:
        tensors, meta = load_state(path)
    except ValueError:
        return None
    return Fit(tensors, meta["values"]) if meta.get("key") == key else None


def _write(path: Path, key: str, found: Fit) -> None:
    try:
        save_state(path, found.tensors, {"key": key, "values": found.values})
    except OSError:
        pass  # a folder that cannot be written to costs the next command a fit, no more
