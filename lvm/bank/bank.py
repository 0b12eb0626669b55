"""The bank: a checked store of ordered vectors with their row table.

Shapes: N bank rows, D vector dim, b rows of one block.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

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
from lvm.bank.shards import SHARD_ROWS, Vectors, are_stored, shard_files
from lvm.system.atomic import atomic_replace, is_damaged, with_checksum, write_errors_name
from lvm.system.distributed import Task, launched_rank, share
from lvm.system.errors import one_line_errors
from lvm.system.settings import file_inside, parse_json

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


def unit_rows(vectors: Vectors, rows: Integers | slice) -> FloatArray:
    """Return `vectors[rows]` (..., D) as float32, of length 1 each; none may be zero."""
    picked = np.asarray(vectors[rows], dtype=np.float32)
    return picked / np.linalg.norm(picked, axis=-1, keepdims=True)


@dataclass(frozen=True, eq=False)
class Bank:
    """N vectors in reading order, checked when opened.

    `vectors` (N, D) is float16 or float32 as stored, memory-mapped for a folder, and `Shards` for a
    bank of several files. `document_N` numbers contiguous (sequence, document) runs in row order;
    `documents` holds their own names. `lane_N` is None without lanes, -1 in rows without one.
    `pinned_N` marks rows that are train rows in every split. `sha256` identifies the contents.
    `bases` are the sha256 of the banks that this one extends: their rows come first, unchanged and
    in order; all later rows are pinned.
    """

    path: Path
    vectors: Vectors
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
            rows = files.read_columns(files.row_files(self.path), (files.TEXT,))
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
        files.write_rows(folder / files.ROWS, rows)
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
        _write_contents(folder, contents, path)
        bank = _open_written(folder, path)
    return replace(bank, path=path)


def _write_contents(folder: Path, contents: dict[str, Any], path: Path) -> None:
    """Write bank.json to `folder`; errors name `path`, where the folder will be."""
    text = json.dumps(with_checksum(contents), indent=1) + "\n"
    with write_errors_name(path / files.CONTENTS):
        (folder / files.CONTENTS).write_text(text, "utf-8")


@dataclass(frozen=True)
class ShardWriter:
    """Writes the bank at `path` shard by shard; each shard is whole or absent.

    Shards belong to one `created_by`, encoder, dtype and number of `shard_rows`: a writer with the
    same values finds the finished ones of a process that was killed. Several processes may write,
    each its own shards; one of them finishes the bank.
    """

    path: Path
    encoder: str
    created_by: str
    dtype: str
    shard_rows: int = SHARD_ROWS
    bases: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The hidden folder of the shards until the bank is finished."""
        made_by = [self.encoder, self.created_by, self.dtype, self.shard_rows]
        digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
        return self.path.parent / f"{self._prefix()}{digest[:16]}"

    def _prefix(self) -> str:
        return f".{self.path.name}.shards-"

    def start(self) -> None:
        """Make the folder; delete the shards of other unfinished banks of this path."""
        for other in self.path.parent.glob(f"{self._prefix()}*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return the record of a finished shard; None if it is not finished."""
        record = self.folder / f"shard-{number:05d}.json"
        try:
            found = parse_json(record.read_text())
        except (OSError, ValueError):
            return None
        is_whole = isinstance(found, dict) and not is_damaged(found)
        return found if is_whole else None

    def write(
        self, number: int, blocks: Iterable[np.ndarray], rows: pd.DataFrame, **facts: Any
    ) -> None:
        """Write a shard: blocks (b, D) of vectors and their row table; `facts` go to its record."""
        names = shard_files(number)
        vectors, table = (self.folder / name for name in names)
        with atomic_replace(vectors) as made:
            shape = files.write_vectors(made, iter(blocks), len(rows), self.dtype)
        with atomic_replace(table) as made:
            files.write_rows(made, rows)
        hashes = {name: files.file_sha256(self.folder / name) for name in names}
        record = self.folder / f"shard-{number:05d}.json"
        with write_errors_name(record), atomic_replace(record) as made:
            facts |= {"rows": shape[0], "dim": shape[1], "files": hashes}
            made.write_text(json.dumps(with_checksum(facts)))

    def finish(self, num_shards: int) -> list[dict[str, Any]]:
        """Move the finished shards to `path`, replacing a bank there; return their records."""
        records = []
        for number in range(num_shards):
            found = self.finished(number)
            if found is None:
                raise ValueError(f"bank {self.path}: shard {number} is not there; ingest again")
            records.append(found)
        hashes = {name: one for record in records for name, one in record["files"].items()}
        contents = {
            "format": files.FORMAT,
            "rows": sum(record["rows"] for record in records),
            "dim": records[0]["dim"],
            "dtype": self.dtype,
            "encoder": self.encoder,
            "created_by": self.created_by,
            "bases": list(self.bases),
            "files": hashes,
        }
        _write_contents(self.folder, contents, self.path)
        with atomic_replace(self.path) as made:
            os.rename(self.folder, made)
        for number in range(num_shards):
            (self.path / f"shard-{number:05d}.json").unlink()
        return records


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


@dataclass(frozen=True)
class SharedBank:
    """A bank in a task of several processes, each of which opens the files once.

    Pickling stores the path and the hash; unpickling raises ValueError if the contents changed.
    """

    bank: Bank

    def __getstate__(self) -> dict[str, Any]:
        return {"place": (self.bank.path.resolve(), self.bank.sha256)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "bank", _opened_once(*state["place"]))


@lru_cache(maxsize=2)
def _opened_once(path: Path, sha256: str) -> Bank:
    bank = open_bank(path)
    if bank.sha256 != sha256:
        raise ValueError(f"bank {path}: rank {launched_rank()} reads another one than rank 0")
    return bank


def share_rows(bank: Bank, task: Task) -> list[Any]:
    """Run a task on the rows of a bank on all processes; alone if the rows are not its files."""
    is_stored = bank.path.is_dir() and are_stored(bank.vectors)
    return share(task) if is_stored else [task.run(0, 1)]
