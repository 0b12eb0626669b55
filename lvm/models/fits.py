"""Fits on train rows, cached in the folder of their windows."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lvm.models.weights import contents_sha256
from lvm.system.atomic import Entry, cache_key, compute_once
from lvm.windows.planning import Windows

VERSION = 2  # raised whenever a fit gives other numbers from the same rows
FOLDER = "fits"


@dataclass(frozen=True)
class Fit:
    """The result of a fit: tensors by name, JSON values by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def cached_fit(
    windows: Windows, name: str, inputs: Mapping[str, Any], fit: Callable[[], Fit]
) -> Fit:
    """Return `fit()`, cached as <windows>/fits/<name>-<key>.safetensors.

    The key hashes VERSION, torch's version, the bank, the plan and `inputs`: JSON values that hold
    whatever else the fit depends on (seeds, the digest of a model). Windows that were never written
    cache nothing.
    """
    if windows.folder is None:
        return fit()
    parts = (VERSION, torch.__version__, windows.bank_sha256, windows.sha256, name, dict(inputs))
    key = cache_key(*parts)
    path = windows.folder / FOLDER / f"{name}-{key[:16]}.safetensors"

    def compute() -> Entry:
        found = fit()
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in found.tensors.items()}
        return Entry(arrays, found.values)

    entry = compute_once(path, key, compute)
    tensors = {name: torch.from_numpy(array) for name, array in entry.arrays.items()}
    return Fit(tensors, entry.values)


def model_digest(model: nn.Module) -> str:
    """Return a hash of the predictor's class, configuration, every parameter, every buffer."""
    values = {"class": type(model).__qualname__, "config": getattr(model, "config", None)}
    return contents_sha256(model.state_dict(), json.dumps(values, sort_keys=True))
