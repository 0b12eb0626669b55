"""Save and load predictors, training states and cached fits as safetensors, without pickle."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lvm.models.table import build_model
from lvm.system.atomic import (
    CHECKSUM,
    Entry,
    atomic_replace,
    cache_key,
    compute_once,
    is_damaged,
    with_checksum,
    write_errors_name,
)
from lvm.system.errors import one_line_errors
from lvm.system.settings import file_inside, parse_json, read_small_text
from lvm.windows.planning import Windows

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
BESIDE = "beside_sha256"
META, SHA256 = "meta", "sha256"
MAX_SIZE = 10**7
FILLED = ("dim", "hidden", "slots", "experts")  # sizes that appear in the shape of some tensor
Write = Callable[[Path], object]
FIT_VERSION = 2  # increase when a fit gives other numbers from the same rows
FITS_FOLDER = "fits"


def save_model(
    model: nn.Module, folder: str | Path, beside: Mapping[str, Write] | None = None
) -> Path:
    """Write `model.safetensors` and `config.json` into `folder`, replacing it as a whole.

    `beside` writes further files by name. `config.json` holds the predictor's config,
    `weights_sha256`, the hashes of the further files, and its own checksum. Raises ValueError for
    sizes that `load_model` would refuse; nothing is written then.
    """
    folder = Path(folder)
    with atomic_replace(folder) as made:
        made.mkdir()
        tensors = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        with write_errors_name(folder / WEIGHTS):
            save_file(tensors, made / WEIGHTS)
        shapes = [list(value.shape) for value in tensors.values()]
        num_bytes = (made / WEIGHTS).stat().st_size
        _check_sizes(dict(model.config), shapes, num_bytes, folder)  # type: ignore[arg-type]
        for name, write in (beside or {}).items():
            write(made / name)
        config = dict(model.config) | {"weights_sha256": _sha256(made / WEIGHTS)}  # type: ignore[arg-type]
        if beside:
            config[BESIDE] = {name: _sha256(made / name) for name in beside}
        with write_errors_name(folder / CONFIG):
            (made / CONFIG).write_text(json.dumps(with_checksum(config), indent=1) + "\n")
    return folder


@one_line_errors
def load_model(folder: str | Path, device: str = "cpu") -> nn.Module:
    """Load a predictor saved by `save_model`, in evaluation mode.

    Raises:
        ValueError: a file is missing, one does not match its hash, or a tensor is absent, unknown
            or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    expected = {WEIGHTS: config.pop("weights_sha256", None)} | config.pop(BESIDE, {})
    config.pop(CHECKSUM, None)
    weights = folder / WEIGHTS
    for name, recorded in expected.items():
        path = file_inside(folder, name)
        if not path.is_file():
            raise ValueError(
                f"{path}: missing; a model folder holds {', '.join(expected)}, {CONFIG}"
            )
        if recorded != _sha256(path):
            raise ValueError(f"{path}: does not match the sha256 in {CONFIG}; copy the model again")
    shapes = _shapes(weights)
    _check_sizes(config, list(shapes.values()), weights.stat().st_size, folder)
    if (
        "memory.write_key.weight" in shapes
    ):  # logged by versions whose config did not name the memory
        config["memory"] = "addressed"
    model = build_model(config)
    try:
        model.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights}: does not fit model '{config['model']}': {error}") from error
    return model.to(device).eval()


@one_line_errors
def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the config of a saved predictor.

    Raises:
        ValueError: `config.json` is missing, is not a JSON object, or differs from the hash in it.
    """
    path = Path(folder) / CONFIG
    try:
        config = parse_json(read_small_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a model's configuration: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: is not a JSON object of sizes")
    if is_damaged(config):
        raise ValueError(f"{path}: differs from the sha256 in it; copy the model again")
    return config


def model_text(folder: str | Path) -> str:
    """Return a text that identifies a saved predictor: its config with the hash of its weights."""
    config = read_config(folder)
    own = {name: value for name, value in config.items() if name not in (BESIDE, CHECKSUM)}
    return json.dumps(own, indent=1) + "\n"


def _shapes(weights: Path) -> dict[str, list[int]]:
    try:
        with safe_open(weights, framework="pt") as opened:
            keys = opened.keys()
            return {key: opened.get_slice(key).get_shape() for key in keys}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: is not a safetensors file: {error}") from error


def _check_sizes(
    config: Mapping[str, Any], shapes: list[list[int]], num_bytes: int, folder: Path
) -> None:
    """Raise ValueError for sizes that the weights cannot fill, before memory is allocated."""
    sizes = {key: value for key, value in config.items() if isinstance(value, int | float)}
    if not all(abs(size) <= MAX_SIZE for size in sizes.values()):
        raise ValueError(f"{folder / CONFIG}: holds a size that no model has")
    longest = max((size for shape in shapes for size in shape), default=MAX_SIZE)
    too_large = [key for key in FILLED if sizes.get(key, 0) > longest]
    too_large += ["layers"] * (sizes.get("layers", 0) > len(shapes))
    too_large += ["hidden"] * (sizes.get("hidden", 0) ** 2 > num_bytes)
    if too_large:
        raise ValueError(
            f"{folder / WEIGHTS}: does not fit model '{config.get('model')}', whose "
            f"{too_large[0]} is {sizes[too_large[0]]}"
        )


def save_state(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a training state as one safetensors file; a reader sees the old file or the new one.

    The file holds a hash of its contents. Raises OSError naming the file if it cannot be written;
    nothing is left beside it then.
    """
    flat = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    text = json.dumps(meta)
    # One entry, because safetensors writes several in an order that varies.
    sealed_meta = {**meta, SHA256: contents_sha256(flat, text)}
    metadata = {META: json.dumps(sealed_meta)}
    with write_errors_name(path), atomic_replace(path) as made:
        save_file(flat, made, metadata=metadata)
        with made.open("rb") as written:
            os.fsync(written.fileno())


@one_line_errors
def load_state(path: Path, is_hash_needed: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a training state: the tensors by name, the metadata.

    States of older versions have no hash; they are read if `is_hash_needed` is False.

    Raises:
        ValueError: the file is not a complete training state, or differs from the hash in it.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        meta = json.loads(metadata[META])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not a complete training state ({error}); delete it") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: not a complete training state; delete it")
    recorded = meta.pop(SHA256, None)
    is_old = recorded is None and not is_hash_needed
    if not is_old and recorded != contents_sha256(tensors, json.dumps(meta)):
        raise ValueError(f"{path}: its contents are not those of the sha256 in it; delete it")
    return tensors, meta


def contents_sha256(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a hash of a text and of the names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter tensors, named `<parameter number>.<name>`."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True)
class Fit:
    """The result of a fit: tensors by name, JSON values by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def cached_fit(
    windows: Windows, name: str, inputs: Mapping[str, Any], fit: Callable[[], Fit]
) -> Fit:
    """Return `fit()`, cached as <windows>/fits/<name>-<key>.safetensors.

    The key hashes FIT_VERSION, torch's version, the bank, the windows and `inputs`, JSON values
    that name everything else the fit depends on (seeds, the digest of a model). Windows without a
    folder cache nothing.
    """
    if windows.folder is None:
        return fit()
    parts = (
        FIT_VERSION,
        torch.__version__,
        windows.bank_sha256,
        windows.sha256,
        name,
        dict(inputs),
    )
    key = cache_key(*parts)
    path = windows.folder / FITS_FOLDER / f"{name}-{key[:16]}.safetensors"

    def compute() -> Entry:
        found = fit()
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in found.tensors.items()}
        return Entry(arrays, found.values)

    entry = compute_once(path, key, compute)
    tensors = {name: torch.from_numpy(array) for name, array in entry.arrays.items()}
    return Fit(tensors, entry.values)


def model_digest(model: nn.Module) -> str:
    """Return a hash of the predictor's class, config, parameters and buffers."""
    values = {"class": type(model).__qualname__, "config": getattr(model, "config", None)}
    return contents_sha256(model.state_dict(), json.dumps(values, sort_keys=True))
