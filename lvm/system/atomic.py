"""Files that appear complete or not at all, write errors that name the file, checksummed JSON."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError

from lvm.system.processes import defer_signals, has_ended, process_identifier

SEPARATOR, SUFFIX, REPLACED = "~", ".scratch", "replaced"
CHECKSUM = "contents_sha256"


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
