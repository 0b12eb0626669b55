"""Cache of computed results: files named by a hash of everything that the result depends on.

A cache may be deleted at any time. Use it in this order:

* `cache_key` hashes the inputs (JSON values, numpy arrays) and the versions of the code.
* `compute_once` reads the entry of a key, or computes it and writes it. An `Entry` holds numpy
  arrays and JSON values; its file is complete, carries its key and a checksum, and is never trusted
  without them. `read_entry` and `write_entry` are its two halves.
* `locked` lets one process at a time compute what takes long, or what is not an `Entry` (a folder
  of windows, a search index).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lvm.system.atomic import atomic_replace, write_errors_name

# Training states (lvm/models/weights.py) have the same layout.
META, SHA256 = "meta", "sha256"
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True, eq=False)
class Entry:
    """A cached result: numpy arrays by name, JSON values by name."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def cache_key(*parts: Any) -> str:
    """Return the sha256 of `parts`, nested JSON values and numpy arrays, as hexadecimal digits.

    Arrays count with shape, dtype and values. Raises TypeError for any other object.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_digest).encode()).hexdigest()


def _digest(array: Any) -> str:
    if not isinstance(array, np.ndarray) or array.dtype == object:
        raise TypeError(f"cannot hash {type(array).__name__}")
    digest = hashlib.sha256(f"{array.shape} {array.dtype.str}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def compute_once(path: Path, key: str, compute: Callable[[], Entry]) -> Entry:
    """Return the entry `key` at `path`; where there is none, return `compute()` and write it.

    A damaged or foreign file is computed again and replaced. A disk that cannot be written costs
    the next caller the same computation and is no error.
    """
    found = read_entry(path, key)
    if found is None:
        found = compute()
        with suppress(OSError):
            write_entry(path, key, found)
    return found


def read_entry(path: Path, key: str) -> Entry | None:
    """Return the entry `key` at `path`; None where it is missing, damaged or of another key."""
    try:
        with safe_open(path, framework="numpy") as opened:
            meta = json.loads((opened.metadata() or {})[META])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        recorded = meta.pop(SHA256)
        is_whole = meta["key"] == key and recorded == _contents_sha256(arrays, meta)
        return Entry(arrays, dict(meta["values"])) if is_whole else None
    except UNREADABLE:
        return None


def write_entry(path: Path, key: str, entry: Entry) -> None:
    """Write an entry; readers see the old file or the new one. Raises OSError naming `path`."""
    arrays = {name: np.asarray(array, order="C") for name, array in entry.arrays.items()}
    meta: dict[str, Any] = {"key": key, "values": entry.values}
    meta[SHA256] = _contents_sha256(arrays, meta)
    with write_errors_name(path), atomic_replace(path) as made:
        save_file(arrays, made, metadata={META: json.dumps(meta)})
        with made.open("rb") as written:
            os.fsync(written.fileno())


def _contents_sha256(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    """Return the checksum of an entry, the one that training states have: dtypes are torch's."""
    digest = hashlib.sha256(json.dumps(meta).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(f"{name} torch.{array.dtype.name} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time compute `path`; on a disk that takes no lock, all of them."""
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path.parent / f".{path.name}.lock"))
        yield
