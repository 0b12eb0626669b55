"""Files that appear complete or not at all; checksummed JSON; a cache of computed results.

A cache file is named by a hash of everything that its result depends on, and may be deleted at any
time. Use the cache in this order:

* `cache_key` hashes the inputs (JSON values, numpy arrays) and the versions of the code.
* `compute_once` reads the entry of a key, or computes it and writes it. An `Entry` holds numpy
  arrays and JSON values; its file is complete, carries its key and a checksum, and is never trusted
  without them. `read_entry` and `write_entry` are its two halves.
* `locked` lets one process at a time compute what takes long, or what is not an `Entry` (a folder
  of windows, a search index).
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lvm.system.processes import defer_signals, has_ended, process_identifier

SEPARATOR, SUFFIX, REPLACED = "~", ".scratch", "replaced"
CHECKSUM = "contents_sha256"
# Training states (lvm/models/weights.py) have the same layout.
META, SHA256 = "meta", "sha256"
UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there replaces the file or folder `path`.

    Readers see either the old contents or the new. A folder is missing for the instant between two
    renames. If the block raises, or the replacement fails, `path` is unchanged. Raises OSError when
    a file would replace a folder, or a folder a file.
    """
    with scratch_folder(path) as scratch:
        made = scratch / path.name
        yield made
        if path.is_dir() and not made.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if path.is_dir():
            _exchange(path, made, scratch / REPLACED)
        else:
            os.replace(made, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`, deleted when the block ends.

    Its name holds the identifier of its process. Scratch folders that killed processes left for the
    same `path` are deleted first; a folder that such a process was replacing is restored.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_stale(path)
    owner = process_identifier().replace(" ", SEPARATOR)
    prefix = f".{path.name}{SEPARATOR}{owner}{SEPARATOR}"
    scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=SUFFIX, dir=path.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exchange(path: Path, made: Path, replaced: Path) -> None:
    with defer_signals():
        os.rename(path, replaced)
        try:
            os.replace(made, path)
        except OSError:
            os.rename(replaced, path)
            raise


def _delete_stale(path: Path) -> None:
    prefix = f".{path.name}{SEPARATOR}"
    for folder in path.parent.iterdir():
        if folder.name.startswith(prefix) and folder.suffix == SUFFIX:
            owner = folder.name.removeprefix(prefix).rpartition(SEPARATOR)[0]
            if has_ended(owner.replace(SEPARATOR, " ")):
                _restore(folder, path)
                shutil.rmtree(folder, ignore_errors=True)


def _restore(folder: Path, path: Path) -> None:
    """Undo a replacement interrupted between its renames: the new folder is still in scratch."""
    if (folder / path.name).exists() and not os.path.lexists(path):
        with suppress(FileNotFoundError):  # nothing was replaced, or another process restored it
            os.rename(folder / REPLACED, path)


def check_writable(name: str, path: str | None) -> None:
    """Raise ValueError if no file can be written to `path`, the option `name`."""
    if path is None:
        return
    try:
        is_folder = Path(path).is_dir()
        folder = next(one for one in Path(path).absolute().parents if one.exists())
    except OSError as error:  # a name that is too long
        why = f"{error.strerror}; give another file"
        raise ValueError(f"{name}: {path} cannot be written: {why}") from error
    if is_folder:
        raise ValueError(f"{name}: {path} is a folder; give a file such as {path}/{name}.json")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"{name}: {path} cannot be written, for {folder} {why}; give another file")


@contextmanager
def write_errors_name(path: Path) -> Iterator[None]:
    """Turn write errors of the block into an OSError with an errno that names `path`.

    safetensors raises its own errors; some errors of numpy and pyarrow name no file.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise _named(int(found[1]) if found else errno.EIO, path) from error
    except OSError as error:
        raise _named(error.errno or errno.EIO, path) from error


def _named(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write the same bytes as `np.save`, with an error that says why it failed."""
    with write_errors_name(path), path.open("wb") as file:
        write_header(file, array.shape, array.dtype)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write the header of a .npy file in C order."""
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, described | {"shape": shape})


def with_checksum(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of JSON values with the sha256 of these values under CHECKSUM."""
    bare = {name: value for name, value in document.items() if name != CHECKSUM}
    text = json.dumps(bare, sort_keys=True)
    return bare | {CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def is_damaged(document: Mapping[str, Any]) -> bool:
    """Return whether a document contradicts its checksum; documents without one pass."""
    return CHECKSUM in document and document[CHECKSUM] != with_checksum(document)[CHECKSUM]


def jsonable(value: Any) -> Any:
    """Return JSON values: numpy's become Python's own, NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


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
