"""Files of a bank, each checked as it is read or written.

Shapes: N bank rows, D vector dim, b rows of one block.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.archive import Pickled, map_array, npz_columns, read_arrays
from lvm.bank.row_table import with_sequence
from lvm.bank.tables import UNREADABLE, frame_of, is_text
from lvm.system.atomic import is_damaged, write_errors_name, write_header
from lvm.system.untrusted import file_inside, parse_json, read_small_text

FORMAT = 1
DTYPES = ("float16", "float32")
VECTORS, ROWS, CONTENTS = "vectors.npy", "rows.parquet", "bank.json"
KEYS = ("format", "rows", "dim", "dtype", "encoder", "created_by", "files")
TEXT = "text"
CODED = ("sequence", "document", "lane", "split")
CHECK_ROWS = 16384
# Within them float32 holds the squares of all that counts in a vector of any usual dim.
LENGTHS = (1e-15, 1e15)
MAX_TURN = 0.01
_SHA256 = re.compile("[0-9a-f]{64}")


def read_contents(folder: Path) -> dict:
    """Read bank.json and check that it says what every bank says."""
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
    if not isinstance(hashes, dict) or set(hashes) != {VECTORS, ROWS}:
        raise ValueError(f"{where}: files must give the sha256 of {VECTORS} and {ROWS}")
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def map_vectors(folder: Path, contents: dict) -> np.ndarray:
    """Map vectors.npy read-only, shaped as bank.json says, every row of a usual length."""
    where = file_inside(folder, VECTORS)
    try:
        vectors = map_array(where)
    except ValueError as error:
        raise ValueError(f"{where}: missing, cut short or pickled; ingest again") from error
    recorded = ((contents["rows"], contents["dim"]), contents["dtype"])
    if (vectors.shape, vectors.dtype.name) != recorded:
        raise ValueError(
            f"{where}: holds {vectors.shape} {vectors.dtype}, but {CONTENTS} says {recorded[0]} "
            f"{recorded[1]}; restore the file or ingest again"
        )
    check_vectors(vectors, str(where))
    return vectors


def read_rows(folder: Path, num_rows: int) -> pd.DataFrame:
    """Read the columns sequence, document, lane, split, as far as they are there."""
    where = file_inside(folder, ROWS)
    try:
        schema, total = pq.read_schema(where), pq.read_metadata(where).num_rows
    except UNREADABLE as error:
        raise ValueError(f"{where}: missing or not parquet; ingest again") from error
    if total != num_rows:
        raise ValueError(f"{where}: {total} rows for {num_rows} vectors; there must be one each")
    if any(schema.names.count(name) > 1 for name in (*CODED, TEXT)):
        raise ValueError(f"{where}: names a column twice; ingest again")
    if TEXT in schema.names and not _holds_text(schema.field(TEXT).type):
        raise ValueError(f"{where}: text is {schema.field(TEXT).type}; it must be text")
    return read_columns(where, [name for name in CODED if name in schema.names])


def read_columns(where: Path, names: list[str]) -> pd.DataFrame:
    """Read columns of a parquet file; text that is repeated in the file is in memory once."""
    try:
        return frame_of(pq.read_table(where, columns=names, read_dictionary=names))
    except UNREADABLE as error:
        raise ValueError(f"{where}: missing or not parquet; ingest again") from error


def _holds_text(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_null(kind)


def check_hashes(folder: Path, contents: dict) -> None:
    """Raise ValueError where a file is not the one that bank.json records."""
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
    """Read `vectors` and the row table of an .npz; raises ValueError with all that is wrong."""
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
    """Raise ValueError unless `vectors` is (N, D) floats, every row of a usual length."""
    if vectors.ndim != 2 or not all(vectors.shape):
        raise ValueError(f"{where}: vectors have shape {vectors.shape}; they must be (N, D)")
    if vectors.dtype.name not in DTYPES:
        raise ValueError(f"{where}: vectors are {vectors.dtype}; store {' or '.join(DTYPES)}")
    if not vectors.flags.c_contiguous:
        raise ValueError(f"{where}: vectors are not in C order; store np.ascontiguousarray(...)")
    length_N = np.concatenate([_lengths(block_bD) for block_bD in _read_blocks(vectors)])
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
    """Return the length of each row, in float64 where its squares leave float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        length_b = np.linalg.norm(block_bD.astype(np.float32), axis=1).astype(np.float64)
        unsure_b = ~((length_b > LENGTHS[0]) & (length_b < LENGTHS[1]))
        length_b[unsure_b] = np.linalg.norm(block_bD[unsure_b].astype(np.float64), axis=1)
    return length_b


def _check_kept(stored_bD: np.ndarray, given_bD: np.ndarray, first_row: int) -> None:
    """Raise ValueError where rounding to the stored dtype turns finite rows by 1 % or more."""
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


def _read_blocks(vector_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of rows; those of a mapped file are read, as mapped pages count as memory."""
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
        ):  # never through a map: a full disk would end the process with SIGBUS
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
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(files: dict[str, str]) -> str:
    """Digest of the sorted (file name, file sha256) pairs: the identity of a bank's contents."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def write_rows(folder: Path, rows: pd.DataFrame) -> None:
    """Write rows.parquet."""
    if TEXT in rows and rows[TEXT].isna().all():
        rows = rows.assign(**{TEXT: pd.Series([None] * len(rows), rows.index, object)})
    try:
        with write_errors_name(folder / ROWS):
            pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), folder / ROWS)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"rows: {error}; a column holds values of one kind") from error
