"""The bank: a checked store of ordered vectors with their row table; groups of duplicate rows.

Shapes: N bank rows, D vector dim, b rows of one block.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lvm.bank import files
from lvm.bank.files import map_array
from lvm.bank.row_table import (
    KINDS,
    TMD_LANES,
    UNASSIGNED,
    Integers,
    row_table,
    run_starts,
    with_sequence,
)
from lvm.system.atomic import atomic_replace, with_checksum, write_errors_name
from lvm.system.errors import one_line_errors
from lvm.system.progress import part
from lvm.system.seeding import generator
from lvm.system.settings import file_inside

__all__ = [
    "TMD_LANES",
    "UNASSIGNED",
    "UNKNOWN_ENCODER",
    "Bank",
    "FloatArray",
    "Integers",
    "open_bank",
    "open_loose",
    "unit_rows",
    "write_bank",
]

FloatArray = npt.NDArray[np.float32]
UNKNOWN_ENCODER = "unknown"  # encoder of vectors that came without its name

PROJECTION_DIMS = 8  # fastest of 4 to 32 on 120,000 text vectors: fewer pairs, yet a short search
SAMPLE_ROWS = 4096
BLOCK_PAIRS = 65536
SAME_SCORE = 0.999  # rows with at least this cosine are duplicates
SCORE_SLACK = 1e-6  # rounding of a float32 cosine
DISTANCE_SLACK = 1e-5  # rounding of a float32 projection


def unit_rows(vectors: np.ndarray, rows: Integers | slice) -> FloatArray:
    """Return `vectors[rows]` (..., D) as float32, of length 1 each; none may be zero."""
    picked = np.asarray(vectors[rows], dtype=np.float32)
    return picked / np.linalg.norm(picked, axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Bank:
    """N vectors in reading order, checked when opened.

    `vectors` (N, D) is float16 or float32 as stored, memory-mapped for a folder. `document_N`
    numbers contiguous (sequence, document) runs in row order; `documents` holds their own names.
    `lane_N` is None without lanes, -1 in rows without one. `pinned_N` marks rows that are train
    rows in every split. `sha256` identifies the contents. `bases` are the sha256 of the banks that
    this one extends: their rows come first, unchanged and in order; all later rows are pinned.
    """

    path: Path
    vectors: np.ndarray
    sequence_N: npt.NDArray[np.int32]
    document_N: npt.NDArray[np.int32]
    lane_N: npt.NDArray[np.int16] | None
    sequences: tuple[str, ...]
    documents: tuple[str, ...]
    lanes: tuple[str, ...]
    pinned_N: npt.NDArray[np.bool_]
    encoder: str
    created_by: str
    sha256: str
    bases: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return int(self.vectors.shape[0])

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    def unit(self, rows: Integers | slice) -> FloatArray:
        """Return the vectors of `rows` (of any shape) as float32, length 1 along the last axis."""
        return unit_rows(self.vectors, rows)

    def unit_ascending(self, row_B: Integers) -> FloatArray:
        """Return `unit` of ascending rows, (B, D); contiguous rows are read as one slice."""
        first, last = int(row_B[0]), int(row_B[-1])
        is_run = last - first + 1 == len(row_B)
        return self.unit(slice(first, last + 1) if is_run else row_B)

    def unit_blocks(self, block: int = 16384) -> Iterator[tuple[int, FloatArray]]:
        """Yield (first row, unit vectors (b, D)) over the whole bank in row order."""
        for start in range(0, self.num_rows, block):
            yield start, self.unit(slice(start, start + block))

    def verify(self) -> None:
        """Raise ValueError if a file no longer has its recorded hash.

        An .npz needs no check: opening it reads and hashes the whole file.
        """
        if self.path.is_dir():
            files.check_hashes(self.path, files.read_contents(self.path))

    def texts(self) -> npt.NDArray[np.object_] | None:
        """Return the N texts ("" for a row without one); None if the bank has no texts."""
        if self.path.suffix == ".npz":
            rows = files.read_npz(self.path)[1]
        else:
            where = self.path / files.ROWS
            there = pq.read_schema(where).names
            rows = files.read_columns(where, [name for name in there if name == files.TEXT])
        if "text" not in rows:
            return None
        return rows["text"].astype(object).fillna("").to_numpy(dtype=object)

    def sequence_start_N(self) -> npt.NDArray[np.int64]:
        """Return the first row of each row's sequence."""
        start_R = run_starts(self.sequence_N)
        return np.repeat(start_R, np.diff(start_R, append=self.num_rows))

    def document_table(self) -> pd.DataFrame:
        """Return one line per document, in row order: first_row, num_rows and the two codes."""
        first_row = run_starts(self.document_N)
        return pd.DataFrame(
            {
                "first_row": first_row,
                "num_rows": np.diff(first_row, append=self.num_rows),
                "sequence": self.sequence_N[first_row],
                "document": self.document_N[first_row],
            }
        )


@one_line_errors
def open_bank(path: str | Path, verify: bool = False) -> Bank:
    """Open the bank folder or .npz file at `path`; `verify` also recomputes the hashes.

    Raises ValueError for a missing or damaged file, a shape other than the recorded one, rows that
    are zero or not finite, a sequence in two pieces, and pickled arrays.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, verify)
    if path.suffix == ".npz" and path.is_file():
        return _open_npz(path)
    raise ValueError(
        f"bank {path}: no such folder or .npz file; make it with `mlflow run . -e ingest`"
    )


@one_line_errors
def open_loose(path: str | Path) -> Bank:
    """Open a folder with vectors.npy and rows.parquet but no bank.json, checked as a bank is.

    Its encoder is unknown, and there are no recorded hashes to verify.
    """
    path = Path(path)
    where = file_inside(path, files.VECTORS)
    vectors = map_array(where)
    files.check_vectors(vectors, str(where))
    rows, _ = with_sequence(files.read_rows(path, len(vectors)), len(vectors), path.name)
    table = row_table(rows, str(path / files.ROWS))
    names = (files.VECTORS, files.ROWS)
    sha256 = files.files_sha256({name: files.file_sha256(path / name) for name in names})
    return Bank(
        path, vectors, **vars(table), encoder=UNKNOWN_ENCODER, created_by="rows", sha256=sha256
    )


@one_line_errors
def write_bank(
    path: str | Path,
    vectors: np.ndarray | pd.Series | Iterable[np.ndarray],
    rows: pd.DataFrame | Mapping[str, Sequence[Any]] | None = None,
    encoder: str = UNKNOWN_ENCODER,
    created_by: str = "write_bank",
    dtype: str = "float16",
    overwrite: bool = False,
    bases: Sequence[str] = (),
) -> Bank:
    """Write a bank folder, which appears whole or not at all, then open it.

    `vectors` is (N, D), a column of N vectors, or an iterable of blocks (b, D) in row order; it is
    stored in `dtype`. `rows` has N lines in reading order with any of `sequence`, `document`,
    `lane`, `text`, `split` ("train" pins a whole sequence). Without `sequence` each document is
    one, without both all rows are. `encoder` names what made the vectors: wordllama, or a
    sentence-transformers model. `bases` are the sha256 of the banks that it extends. Raises
    ValueError where `path` exists without `overwrite`, or where the contents are no bank.
    """
    path = Path(path)
    vectors = _plain_array(vectors)
    if rows is None and not isinstance(vectors, np.ndarray):
        raise ValueError(f"rows of bank {path}: give a table beside vectors in blocks")
    if rows is None:
        rows = {"sequence": [path.name] * len(vectors)}  # type: ignore[arg-type]
    rows = rows.reset_index(drop=True) if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows)
    if any(name in KINDS for name in rows.columns):
        rows = with_sequence(rows, len(rows), path.name)[0]
        rows = rows[[name for name in rows.columns if name in KINDS]]
    _check_target(path, overwrite)
    if dtype not in files.DTYPES:
        raise ValueError(f"dtype {dtype!r}: must be one of {', '.join(files.DTYPES)}")
    row_table(rows, f"rows of bank {path}")
    with atomic_replace(path) as folder:
        folder.mkdir()
        shape = files.write_vectors(folder / files.VECTORS, vectors, len(rows), dtype)
        files.write_rows(folder, rows)
        names = (files.VECTORS, files.ROWS)
        contents = {
            "format": files.FORMAT,
            "rows": shape[0],
            "dim": shape[1],
            "dtype": dtype,
            "encoder": encoder,
            "created_by": created_by,
            "bases": list(bases),
            "files": {name: files.file_sha256(folder / name) for name in names},
        }
        text = json.dumps(with_checksum(contents), indent=1) + "\n"
        with write_errors_name(path / files.CONTENTS):
            (folder / files.CONTENTS).write_text(text, "utf-8")
        bank = _open_written(folder, path)
    return replace(bank, path=path)


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ValueError(f"bank {path}: exists already; choose another path or delete it")
    if path.exists() and not (path / files.CONTENTS).is_file():
        raise ValueError(
            f"bank {path}: is not a bank folder, so it is not replaced; choose another"
        )


def _open_written(folder: Path, path: Path) -> Bank:
    """Open the new bank in its scratch folder; errors name its final path."""
    try:
        return _open_folder(folder, verify=False)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{folder}/", f"bank {path}: ")) from None


def _plain_array(vectors: Any) -> Any:
    """Convert a column of vectors, or an array of another library, to a numpy array."""
    if not isinstance(vectors, pd.Series | list):
        return np.asarray(vectors) if hasattr(vectors, "__array__") else vectors
    try:
        return np.stack([np.asarray(vector, dtype=np.float32) for vector in vectors])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"vectors: not one list of numbers of one length a row ({error})"
        ) from None


def _open_folder(path: Path, verify: bool) -> Bank:
    contents = files.read_contents(path)
    if verify:
        files.check_hashes(path, contents)
    vectors = files.map_vectors(path, contents)
    rows = files.read_rows(path, len(vectors))
    table = row_table(rows, str(path / files.ROWS))
    return Bank(
        path,
        vectors,
        **vars(table),
        encoder=str(contents["encoder"]),
        created_by=str(contents["created_by"]),
        sha256=files.files_sha256(contents["files"]),
        bases=tuple(contents.get("bases", ())),
    )


def _open_npz(path: Path) -> Bank:
    vectors, rows = files.read_npz(path)
    table = row_table(rows, str(path))
    sha256 = files.files_sha256({"npz": files.file_sha256(path)})
    return Bank(
        path, vectors, **vars(table), encoder=UNKNOWN_ENCODER, created_by="npz", sha256=sha256
    )


@part("duplicates")
def duplicate_groups(bank: Bank, threshold: float = SAME_SCORE) -> npt.NDArray[np.int64]:
    """Return for each row the smallest row of its duplicate group (itself if it has no duplicates).

    Rows with a cosine of at least `threshold` are in one group, as are rows joined by a chain of
    such rows. The search is exact: an orthonormal projection never lengthens a distance, so pairs
    near in the full space are near in the projected one, where a k-d tree finds them. Raises
    ValueError unless 0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold}: must be above 0 and at most 1")
    copy_N, first_U = _byte_copies(bank)
    pairs_P2 = _near_pairs(bank, first_U, threshold)
    score_P = _pair_scores(bank, first_U[pairs_P2])
    joined = pairs_P2[score_P >= threshold - SCORE_SLACK]
    graph = coo_matrix(
        (np.ones(len(joined), dtype=bool), (joined[:, 0], joined[:, 1])), shape=(len(first_U),) * 2
    )
    _, group_U = connected_components(graph, directed=False)
    group_N = group_U[copy_N]
    _, smallest = np.unique(group_N, return_index=True)
    return smallest[group_N].astype(np.int64)


def _byte_copies(bank: Bank) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Number the rows by their stored bytes; return the numbers and the first row of each.

    Hundreds of copies of one sentence are common, and their pairs would grow quadratically.
    """
    digests = [hashlib.blake2b(vector, digest_size=16).digest() for vector in bank.vectors]
    copy_N, _ = pd.factorize(np.array(digests, dtype="V16").astype(object))
    _, first_U = np.unique(copy_N, return_index=True)
    return copy_N.astype(np.int64), first_U.astype(np.int64)


def _near_pairs(bank: Bank, row_U: Integers, threshold: float) -> npt.NDArray[np.int64]:
    """Return all pairs (P, 2) of positions in `row_U` that can have a cosine of `threshold`."""
    # Imported here: it takes 0.2 s, and most processes read the groups from disk.
    from scipy.spatial import cKDTree

    basis_DE = _principal_basis(bank, row_U)
    blocks = np.array_split(row_U, len(row_U) // SAMPLE_ROWS + 1)
    point_UE = np.concatenate([bank.unit(block) @ basis_DE for block in blocks])
    radius = np.sqrt(2 - 2 * threshold) + DISTANCE_SLACK
    return cKDTree(point_UE).query_pairs(radius, output_type="ndarray")


def _principal_basis(bank: Bank, row_U: Integers) -> npt.NDArray[np.float32]:
    """Return orthonormal columns (D, E) along which a sample of the rows varies most."""
    random = generator(0, "duplicates")
    sample = random.choice(row_U, min(SAMPLE_ROWS, len(row_U)), replace=False)
    unit_SD = bank.unit(np.sort(sample)).astype(np.float64)
    centred_SD = unit_SD - unit_SD.mean(axis=0)
    _, vector_DD = np.linalg.eigh(centred_SD.T @ centred_SD)
    return vector_DD[:, ::-1][:, :PROJECTION_DIMS].astype(np.float32)


def _pair_scores(bank: Bank, pair_P2: Integers) -> npt.NDArray[np.float32]:
    """Return the cosine of each pair of rows."""
    score_P = np.empty(len(pair_P2), dtype=np.float32)
    for start in range(0, len(pair_P2), BLOCK_PAIRS):
        block = slice(start, start + BLOCK_PAIRS)
        left_PD, right_PD = bank.unit(pair_P2[block, 0]), bank.unit(pair_P2[block, 1])
        score_P[block] = np.einsum("pd,pd->p", left_PD, right_PD)
    return score_P
