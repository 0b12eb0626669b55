"""Arrays from .npy or .npz files, whose sizes are checked before anything is read or inflated.

An .npz with `vectors` is a bank in one file; `npz_columns` checks what stands beside them.
"""

import io
import lzma
import math
import sys
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
NPZ_COLUMNS = {name: name for name in ("sequence", "document", "lane", "text")} | {
    "chain_ids": "sequence",
    "tmd_lanes": "lane",
    "concept_texts": "text",
}
NPZ_UNREAD = ("cpe_ids",)  # of older files
NPZ_KINDS = "iufU"
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


def npz_columns(path: Path, num_rows: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the columns of an .npz by the names of a row table, with all that is wrong with them.

    Long texts fill an array of plain strings with padding; the refusals name parquet for them.
    """
    columns: dict[str, np.ndarray] = {}
    problems = []
    for name, column in NPZ_COLUMNS.items():
        try:
            found = read_arrays(path, (name,)).get(name)
        except Pickled:
            problems.append(
                f"{name} holds pickled objects, which are refused: store array.astype(str), or "
                "vectors and columns in a parquet file"
            )
            continue
        if found is None:
            continue
        kinds = NPZ_KINDS if column != "text" else "U"
        if found.shape != (num_rows,):
            problems.append(f"{name} is {found.shape}; it must be ({num_rows},)")
        elif found.dtype.kind == "U" and not _is_text(found):
            problems.append(f"{name} holds what is no text; store array.astype(str)")
        elif found.dtype.kind not in kinds:
            problems.append(f"{name} holds {found.dtype}; store numbers or plain strings")
        elif column in columns:
            names = [one for one, other in NPZ_COLUMNS.items() if other == column]
            problems.append(f"holds {' and '.join(names)}, the same column; give one")
        else:
            columns[column] = found
    others = _other_shapes(path, ("vectors", *NPZ_COLUMNS, *NPZ_UNREAD))
    unknown = [name for name, shape in others.items() if shape == (num_rows,)]
    if unknown:
        problems.append(
            f"{unknown[0][:NAME_CHARACTERS]!r} has a value a row, but is no column; name it one of "
            f"{', '.join(NPZ_COLUMNS)}, or leave it out"
        )
    return columns, problems


def _is_text(column: np.ndarray) -> bool:
    """Whether every code of an array of strings is that of a character."""
    code = np.frombuffer(column.tobytes(), f"{column.dtype.str[0]}u4")
    return not ((code > sys.maxunicode) | ((code >= 0xD800) & (code < 0xE000))).any()


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


def _other_shapes(path: Path, known: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays that are not `known`, by their headers alone."""
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
