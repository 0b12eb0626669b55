"""Files that name themselves where they cannot be written, documents that tell their damage."""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError

SEAL = "contents_sha256"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make what fails in the block an OSError with a number that names `path`.

    safetensors raises errors of its own, numpy and pyarrow some that name no file.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise _named(int(found[1]) if found else errno.EIO, path) from error
    except OSError as error:
        raise _named(error.errno or errno.EIO, path) from error


def write_array(path: Path, array: np.ndarray) -> None:
    """Write what `np.save` would, byte for byte, with an error that says why it failed."""
    with writing(path), path.open("wb") as file:
        write_header(file, array.shape, array.dtype)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_header(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Write the first bytes of a .npy file in C order."""
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, described | {"shape": shape})


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of JSON values with a hash of them under SEAL."""
    bare = {name: value for name, value in document.items() if name != SEAL}
    text = json.dumps(bare, sort_keys=True)
    return bare | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_damaged(document: Mapping[str, Any]) -> bool:
    """Tell whether a document differs from the hash in it; those written before have none."""
    return SEAL in document and document[SEAL] != sealed(document)[SEAL]


def _named(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))


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
