"""Predictors on disk beside training states, as safetensors without pickle."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lvm.models.table import build_model
from lvm.one_line import in_one_line
from lvm.untrusted import own_file, parse_json, read_settings

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_SIZE = 10**7
FILLED = ("dim", "hidden", "slots", "experts")  # sizes that some tensor has


def save_model(model: nn.Module, folder: str | Path) -> Path:
    """Write `model.safetensors` and `config.json` into `folder`, replacing it as a whole.

    `config.json` holds the predictor's configuration plus `weights_sha256`.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        save_file(tensors, staging / WEIGHTS)
        config = dict(model.config) | {"weights_sha256": _sha256(staging / WEIGHTS)}  # type: ignore[arg-type]
        (staging / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        staging.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


@in_one_line
def load_model(folder: str | Path, device: str = "cpu") -> nn.Module:
    """Read the predictor that `save_model` wrote, in evaluation mode.

    Raises:
        ValueError: a file is missing, the weights do not match their hash, or a tensor is absent,
            unknown or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    expected = config.pop("weights_sha256", None)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{weights}: missing; a model folder holds {WEIGHTS} and {CONFIG}")
    own_file(folder, WEIGHTS)
    if expected != _sha256(weights):
        raise ValueError(f"{weights}: does not match the sha256 in {CONFIG}; copy the model again")
    _check_size(config, weights)
    model = build_model(config)
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights}: does not fit model '{config['model']}': {error}") from error
    return model.to(device).eval()


@in_one_line
def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the configuration of a saved predictor.

    Raises:
        ValueError: `config.json` is missing or no JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        config = parse_json(read_settings(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a model's configuration: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no JSON object of sizes")
    return config


def _check_size(config: Mapping[str, Any], weights: Path) -> None:
    """Raise ValueError for sizes that the weights cannot fill, before memory is taken for them."""
    sizes = {key: value for key, value in config.items() if isinstance(value, int | float)}
    if not all(abs(size) <= MAX_SIZE for size in sizes.values()):
        raise ValueError(f"{weights.parent / CONFIG}: holds a size that no model has")
    try:
        with safe_open(weights, framework="pt") as opened:
            shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: is no safetensors file: {error}") from error
    longest = max((size for shape in shapes for size in shape), default=MAX_SIZE)
    too_large = [key for key in FILLED if sizes.get(key, 0) > longest]
    too_large += ["layers"] * (sizes.get("layers", 0) > len(shapes))
    too_large += ["hidden"] * (sizes.get("hidden", 0) ** 2 > weights.stat().st_size)
    if too_large:
        raise ValueError(
            f"{weights}: does not fit model '{config.get('model')}', whose {too_large[0]} is "
            f"{sizes[too_large[0]]}"
        )


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state as one safetensors file; a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    flat = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    save_file(flat, staging, metadata={"meta": json.dumps(meta)})
    with staging.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(staging, path)


@in_one_line
def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote: the tensors by name, the meta data.

    Raises:
        ValueError: the file is no complete training state.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            meta = json.loads((opened.metadata() or {})["meta"])
            return {key: opened.get_tensor(key) for key in opened.keys()}, meta  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not a complete training state ({error}); delete it") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's per-parameter tensors, named `<parameter number>.<name>`."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back the tensors that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
