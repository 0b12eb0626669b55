"""Files of a bank (.npy and .npz among them), checked as they are read or written.

The sizes of arrays are checked before anything is read or inflated. Shapes: N bank rows, D vector
dim, b rows of one block.
"""

import hashlib
import io
import itertools
import json
import lzma
import math
import re
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.row_table import with_sequence
from lvm.bank.shards import Shards, Vectors, shard_files
from lvm.bank.tables import UNREADABLE, frame_of, is_text
from lvm.system.atomic import is_damaged, write_errors_name, write_header
from lvm.system.settings import file_inside, parse_json, read_small_text

FORMAT = 1
DTYPES = ("float16", "float32")
VECTORS, ROWS, CONTENTS = "vectors.npy", "rows.parquet", "bank.json"
KEYS = ("format", "rows", "dim", "dtype", "encoder", "created_by", "files")
TEXT = "text"
CODED = ("sequence", "document", "lane", "split")
CHECK_ROWS = 16384
# Between these lengths of a row, float32 can hold the squares of its numbers.
LENGTHS = (1e-15, 1e15)
MAX_TURN = 0.01
# Constant values compress a thousandfold, but padded text hardly more than a hundredfold.
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
NUMPY_ERRORS = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError, MemoryError, TypeError),
    *(SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
_SHA256 = re.compile("[0-9a-f]{64}")


def read_contents(folder: Path) -> dict:
    """Read and check bank.json."""
    where = folder / CONTENTS
    if not where.exists():
        raise ValueError(f"bank {folder}: no {CONTENTS}; this is not a bank folder")
    try:
        contents = parse_json(read_small_text(file_inside(folder, CONTENTS)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); ingest the bank again") from error
    if not isinstance(contents, dict) or not set(KEYS) <= set(contents):
        raise ValueError(f"{where}: must be an object with the keys {', '.join(KEYS)}")
    if contents["format"] != FORMAT or not _is_whole(contents["format"]):
        raise ValueError(f"{where}: format is {contents['format']!r}; this lvm reads {FORMAT}")
    hashes = contents["files"]
    if not isinstance(hashes, dict) or not hashes or set(hashes) != {*_listed(hashes)}:
        raise ValueError(
            f"{where}: files must give the sha256 of {VECTORS} and {ROWS}, or of each shard"
        )
    bases = contents.get("bases", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{where}: bases must be a list of sha256; ingest the bank again")
    if is_damaged(contents):
        raise ValueError(f"{where}: differs from the sha256 in it; restore it or ingest again")
    if not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in hashes.values()):
        raise ValueError(f"{where}: files holds what is no sha256; ingest the bank again")
    if not all(_is_whole(contents[name]) for name in ("rows", "dim")):
        raise ValueError(f"{where}: rows, dim must be whole numbers; ingest the bank again")
    if not all(isinstance(contents[name], str) for name in ("dtype", "encoder", "created_by")):
        raise ValueError(f"{where}: dtype, encoder, created_by must be text; ingest the bank again")
    return contents


def _listed(hashes: Collection[str]) -> list[str]:
    """Return the files that a bank with so many files has, the vectors of each shard first."""
    if VECTORS in hashes:
        return [VECTORS, ROWS]
    return [name for number in range(len(hashes) // 2) for name in shard_files(number)]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def map_vectors(folder: Path, contents: dict) -> Vectors:
    """Memory-map the vectors read-only; check their shape and the lengths of their rows."""
    parts = []
    for name in _listed(contents["files"])[::2]:
        where = file_inside(folder, name)
        try:
            parts.append(map_array(where))
        except ValueError as error:
            raise ValueError(f"{where}: missing, cut short or pickled; ingest again") from error
    where = folder / _listed(contents["files"])[0]
    recorded = ((contents["rows"], contents["dim"]), contents["dtype"])
    is_sharded = len(parts) > 1 and all(part.ndim == 2 for part in parts)
    num_rows = sum(len(part) for part in parts) if is_sharded else 0
    for part in parts:
        shape = (num_rows, part.shape[1]) if is_sharded else part.shape
        if (shape, part.dtype.name) != recorded:
            raise ValueError(
                f"{where}: holds {shape} {part.dtype}, but {CONTENTS} says {recorded[0]} "
                f"{recorded[1]}; restore the file or ingest again"
            )
    for name, part in zip(_listed(contents["files"])[::2], parts, strict=True):
        check_vectors(part, str(folder / name))
    return parts[0] if len(parts) == 1 else Shards(parts)


def row_files(folder: Path) -> list[Path]:
    """Return the row tables of a bank folder in row order."""
    return [folder / ROWS] if (folder / ROWS).exists() else sorted(folder.glob("rows-*.parquet"))


def read_rows(folder: Path, num_rows: int) -> pd.DataFrame:
    """Read those of the columns sequence, document, lane and split that exist."""
    total = 0
    for where in row_files(folder) or [folder / ROWS]:
        file_inside(folder, where.name)
        try:
            schema, rows = pq.read_schema(where), pq.read_metadata(where).num_rows
        except UNREADABLE as error:
            raise ValueError(f"{where}: missing or not parquet; ingest again") from error
        total += rows
        if any(schema.names.count(name) > 1 for name in (*CODED, TEXT)):
            raise ValueError(f"{where}: names a column twice; ingest again")
        if TEXT in schema.names and not _holds_text(schema.field(TEXT).type):
            raise ValueError(f"{where}: text is {schema.field(TEXT).type}; it must be text")
    if total != num_rows:
        raise ValueError(f"{where}: {total} rows for {num_rows} vectors; there must be one each")
    return read_columns(row_files(folder), CODED)


def read_columns(files: Sequence[Path], names: Collection[str]) -> pd.DataFrame:
    """Read those of the columns that exist; repeated texts are held in memory once."""
    where, tables = files[0], []
    try:
        for where in files:
            there = [name for name in pq.read_schema(where).names if name in names]
            tables.append(pq.read_table(where, columns=there, read_dictionary=there))
        return frame_of(pa.concat_tables(tables, promote_options="default"))
    except UNREADABLE as error:
        raise ValueError(f"{where}: missing or not parquet; ingest again") from error


def _holds_text(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_null(kind)


def check_hashes(folder: Path, contents: dict) -> None:
    """Raise ValueError if a file does not have the hash in bank.json."""
    for name, recorded in contents["files"].items():
        where = file_inside(folder, name)
        try:
            found = file_sha256(where)
        except OSError as error:
            raise ValueError(f"{where}: missing or unreadable; ingest again") from error
        if found != recorded:
            raise ValueError(
                f"{where}: its sha256 differs from {CONTENTS}; restore it or ingest again"
            )


def read_npz(path: Path) -> tuple[np.ndarray, pd.DataFrame]:
    """Read `vectors` and the row table of an .npz; ValueError lists every problem."""
    try:
        vectors = read_arrays(path, ("vectors",)).get("vectors")
    except Pickled as error:
        raise ValueError(f"{error}, which are refused; store np.float32 numbers") from error
    if vectors is None:
        raise ValueError(f"{path}: no array 'vectors'; it must hold one of shape (N, D)")
    problems = []
    try:
        check_vectors(vectors, str(path))
    except ValueError as error:
        problems.append(str(error).removeprefix(f"{path}: "))
    num_rows = len(vectors) if vectors.ndim else 0
    columns, wrong = npz_columns(path, num_rows)
    if problems or wrong:
        raise ValueError(f"{path}: {'; '.join([*problems, *wrong])}")
    rows = pd.DataFrame(columns, index=range(num_rows))
    return vectors, with_sequence(rows, num_rows, path.stem)[0]


def check_vectors(vectors: np.ndarray, where: str) -> None:
    """Raise ValueError unless `vectors` is (N, D) floats whose rows have lengths within LENGTHS."""
    if vectors.ndim != 2 or not all(vectors.shape):
        raise ValueError(f"{where}: vectors have shape {vectors.shape}; they must be (N, D)")
    if vectors.dtype.name not in DTYPES:
        raise ValueError(f"{where}: vectors are {vectors.dtype}; store {' or '.join(DTYPES)}")
    if not vectors.flags.c_contiguous:
        raise ValueError(f"{where}: vectors are not in C order; store np.ascontiguousarray(...)")
    length_N = np.concatenate([_lengths(block_bD) for block_bD in read_blocks(vectors)])
    for wrong_N, what in ((~np.isfinite(length_N), "non-finite"), (length_N == 0, "zero")):
        if wrong_N.any():
            raise ValueError(
                f"{where}: {wrong_N.sum()} {what} rows of {len(wrong_N)}, first row "
                f"{wrong_N.argmax()}; remove these rows"
            )
    shortest, longest = LENGTHS
    wrong_N = (length_N < shortest) | (length_N > longest)
    if wrong_N.any():
        raise ValueError(
            f"{where}: {wrong_N.sum()} rows shorter than {shortest:g} or longer than {longest:g} "
            f"of {len(wrong_N)}, first row {wrong_N.argmax()}; divide them by their lengths"
        )


def _lengths(block_bD: np.ndarray) -> np.ndarray:
    """Return the length of each row, in float64 if its squares leave the range of float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        length_b = np.linalg.norm(block_bD.astype(np.float32), axis=1).astype(np.float64)
        unsure_b = ~((length_b > LENGTHS[0]) & (length_b < LENGTHS[1]))
        length_b[unsure_b] = np.linalg.norm(block_bD[unsure_b].astype(np.float64), axis=1)
    return length_b


def _check_kept(stored_bD: np.ndarray, given_bD: np.ndarray, first_row: int) -> None:
    """Raise ValueError if the stored dtype turns the direction of rows by 1 % or more."""
    if stored_bD.dtype.itemsize >= np.asarray(given_bD).dtype.itemsize:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        error_b = np.linalg.norm(stored_bD.astype(np.float32) - given_bD, axis=1)
        lost_b = np.isfinite(error_b) & (error_b > MAX_TURN * np.linalg.norm(given_bD, axis=1))
    if lost_b.any():
        raise ValueError(
            f"vectors: {stored_bD.dtype} does not keep the direction of {lost_b.sum()} rows, first "
            f"row {first_row + lost_b.argmax()}; divide them by their lengths, or store float32"
        )


def _blocks(vector_ND: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(vector_ND), CHECK_ROWS):
        yield vector_ND[start : start + CHECK_ROWS]


def read_blocks(vector_ND: Vectors) -> Iterator[np.ndarray]:
    """Yield blocks of rows, read into memory: pages of a mapped file would count as memory."""
    if isinstance(vector_ND, Shards):
        for part in vector_ND.parts:
            yield from read_blocks(part)
        return
    if not isinstance(vector_ND, np.memmap) or vector_ND.filename is None:
        yield from _blocks(vector_ND)
        return
    with open(vector_ND.filename, "rb") as file:
        file.seek(vector_ND.offset)
        for start in range(0, len(vector_ND), CHECK_ROWS):
            num_rows = min(CHECK_ROWS, len(vector_ND) - start)
            block = np.fromfile(file, vector_ND.dtype, num_rows * vector_ND.shape[1])
            yield block.reshape(num_rows, -1)


def write_vectors(
    path: Path, vectors: np.ndarray | Iterable[np.ndarray], num_rows: int, dtype: str
) -> tuple[int, int]:
    """Stream `vectors` ((N, D) or blocks (b, D)) to a .npy file; return its shape."""
    blocks = iter(_blocks(vectors) if isinstance(vectors, np.ndarray) else vectors)
    first = next(blocks, np.empty((0, 0)))
    if first.ndim != 2:
        raise ValueError(f"vectors: a block has shape {first.shape}; it must be (b, D)")
    shape, start = (num_rows, first.shape[1]), 0
    with path.open("wb") as file:
        with write_errors_name(
            path
        ):  # not through a memory map: a full disk would end the process with SIGBUS
            write_header(file, shape, np.dtype(dtype))
        for block in itertools.chain([first], blocks):
            end = start + len(block)
            if end > num_rows or block.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"vectors: rows {start} to {end} are {block.shape}; there must be {num_rows} "
                    f"rows of {first.shape[1]} numbers"
                )
            with np.errstate(over="ignore"):
                kept = np.ascontiguousarray(block, dtype)
            _check_kept(kept, block, start)
            with write_errors_name(path):
                file.write(kept.data)
            start = end
        with write_errors_name(path):
            file.flush()
    if start != num_rows:
        raise ValueError(f"vectors: {start} rows for a row table of {num_rows}; give one each")
    return shape


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(files: dict[str, str]) -> str:
    """Return the sha256 of the sorted (file name, file sha256) pairs, which identifies a bank."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write a row table."""
    if TEXT in rows and rows[TEXT].isna().all():
        rows = rows.assign(**{TEXT: pd.Series([None] * len(rows), rows.index, object)})
    try:
        with write_errors_name(path):
            pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), path)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"rows: {error}; a column holds values of one kind") from error


class Pickled(ValueError):
    """Raised for an array that would have to be unpickled, which could run code."""


def npz_columns(path: Path, num_rows: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the columns of an .npz under their names in a row table, and a list of problems.

    The problems suggest parquet for long texts: a plain string array pads every text to the
    longest.
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
            problems.append(f"{name} holds values that are no text; store array.astype(str)")
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
    """Return whether every code in an array of strings is that of a character."""
    code = np.frombuffer(column.tobytes(), f"{column.dtype.str[0]}u4")
    return not ((code > sys.maxunicode) | ((code >= 0xD800) & (code < 0xE000))).any()


def map_array(path: Path) -> np.ndarray:
    """Memory-map a .npy file read-only; raises ValueError if it is not one or is truncated."""
    if not path.is_file():
        raise ValueError(f"{path}: missing, or not a regular file")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except NUMPY_ERRORS as error:
        raise ValueError(f"{path}: not a whole .npy array of numbers ({error})") from None
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError(f"{path}: is an archive; a .npy array is needed")
    return found


def read_arrays(path: Path, known: Collection[str]) -> dict[str, np.ndarray]:
    """Return those arrays of an .npz whose names are in `known`.

    Raises Pickled (a ValueError) for objects, and ValueError for a file of another format, names
    that are paths or appear twice, arrays whose size contradicts their header, and arrays beyond
    FREE_BYTES that inflate more than MAX_RATIO times.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            return {n: _array(archive, members[n], path) for n in known if n in members}
    except Pickled:
        raise
    except NUMPY_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not a readable .npz file") from error


def _other_shapes(path: Path, known: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays that are not in `known`, read from their headers."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name, info in _members(archive, path).items():
            if name in known:
                continue
            try:
                with archive.open(info) as stream:
                    start = io.BytesIO(stream.read(HEADER_BYTES))
                shapes[name] = HEADERS[np.lib.format.read_magic(start)](start)[0]
            except (KeyError, NotImplementedError, *NUMPY_ERRORS):
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
