"""Arrays from .npy or .npz files, whose sizes are checked before anything is read or inflated."""

import io
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

# Constant values shrink a thousandfold; text padded to its longest, hardly more than a hundredfold.
FREE_BYTES = 256 * 2**20
MAX_RATIO = 200
NAME_CHARACTERS = 100
HEADER_BYTES = 2**14  # numpy itself reads no header above 10,000
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError, MemoryError, TypeError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


class Pickled(ValueError):
    """The error of an array that could only be read by running what it holds."""


def map_array(path: Path) -> np.ndarray:
    """Map a .npy file read-only; raises ValueError where it is none, or shorter than it says."""
    if not path.is_file():
        raise ValueError(f"{path}: missing, or no regular file")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a whole .npy array of numbers ({error})") from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{path}: is an archive; a .npy array is needed")
    return found


def read_arrays(path: Path, known: Collection[str]) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz that are `known` by name.

    Raises Pickled, a ValueError, for objects; ValueError for any other file, a name that is a path
    or stands there twice, an array of another size than its header says, one that shrinks more
    than MAX_RATIO beyond FREE_BYTES.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            return {n: _array(archive, members[n], path) for n in known if n in members}
    except Pickled:
        raise
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not a readable .npz file") from error


def other_shapes(path: Path, known: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of an .npz that are not `known`, of which no more is read.

    What is no array, or an array whose header numpy would not read, is left out.
    """
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name, info in _members(archive, path).items():
            if name in known:
                continue
            try:
                with archive.open(info) as stream:
                    start = io.BytesIO(stream.read(HEADER_BYTES))
                shapes[name] = HEADERS[np.lib.format.read_magic(start)](start)[0]
            except (KeyError, NotImplementedError, *UNREADABLE):
                continue
    return shapes


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        shown = info.filename[:NAME_CHARACTERS]
        if "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"{path}: holds {shown!r}, a path; an .npz holds arrays by name")
        if name in members:
            raise ValueError(f"{path}: holds {shown!r} twice; store it once")
        members[name] = info
    return members


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    name, size = info.filename, info.file_size
    if size > FREE_BYTES and size > MAX_RATIO * info.compress_size:
        raise ValueError(
            f"{path}: {name} inflates to {size:,} bytes, {size // max(1, info.compress_size):,} "
            f"times its size, as zip bombs do; store it by np.savez, without compression"
        )
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in HEADERS:
            raise ValueError(f"{path}: {name} has the version {version}; np.savez writes 1 or 2")
        shape, _, dtype = HEADERS[version](stream)
        if dtype.hasobject:
            raise Pickled(f"{path}: {name} holds pickled objects")
        declared = stream.tell() + math.prod(shape) * dtype.itemsize
    if declared != size or min(shape, default=0) < 0:
        raise ValueError(f"{path}: {name} says it has {declared:,} bytes, but has {size:,}")
    with archive.open(info) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
