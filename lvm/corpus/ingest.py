"""Ingestion: a source of text or vectors becomes a bank.

Shapes: N bank rows, D vector dim, B rows of one batch.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from lvm.bank.files import CONTENTS, ROWS, VECTORS, file_sha256
from lvm.bank.row_table import IntArray
from lvm.bank.store import UNKNOWN_ENCODER, Bank, open_bank, open_loose, write_bank
from lvm.corpus.encoders import WORDLLAMA, Encoder, load_encoder
from lvm.corpus.files import corpus_files
from lvm.corpus.python_docs import installed_versions, missing_packages
from lvm.corpus.reading import PYTHON_DOCS, read_corpus

BATCH_ROWS = 4096
ZERO_VECTOR = "zero vector: the encoder knows no token of the text"


@dataclass(frozen=True)
class IngestReport:
    """What an ingestion did; `dropped` counts rows by reason, `notes` are lines for the user."""

    path: str
    source: str
    encoder: str
    created_by: str
    sha256: str
    rows_read: int
    rows: int
    dim: int
    dropped: dict[str, int]
    sequences: dict[str, int]
    lanes: dict[str, int]
    notes: tuple[str, ...]
    reused: bool
    seconds: float


def ingest(
    source: str,
    encoder: str | None,
    path: str | Path,
    max_rows: int | None = None,
    overwrite: bool = False,
) -> IngestReport:
    """Make the bank at `path` from `source`; reuse a bank there that was made in the same way.

    `source` is "python-docs", a folder or file of text, an .npz, a folder with vectors.npy and
    rows.parquet, or another bank; the vectors of the last three are copied through all checks, and
    `encoder` then only names what made them. None is wordllama for text, not known for vectors.
    One process at a time makes it. Raises ValueError where `path` holds something made otherwise,
    unless `overwrite`.
    """
    started = time.monotonic()
    path = Path(path)
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows {max_rows}: must be 1 or more, or auto for all rows")
    if encoder is None:
        encoder = UNKNOWN_ENCODER if is_vectors(source) else WORDLLAMA
    created_by = _created_by(source, encoder, max_rows)
    num_dropped = 0
    reused = path.exists() and not overwrite
    if not reused:
        make = _maker(source, encoder, path, max_rows, created_by)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            reused = path.exists() and not overwrite  # by another process meanwhile
            if not reused:
                bank, num_dropped = make()
    if reused:
        bank = existing_bank(path, created_by)
    return IngestReport(
        path=str(path),
        source=source,
        encoder=bank.encoder,
        created_by=created_by,
        sha256=bank.sha256,
        rows_read=bank.num_rows + num_dropped,
        rows=bank.num_rows,
        dim=bank.dim,
        dropped={ZERO_VECTOR: num_dropped} if num_dropped else {},
        sequences=_row_counts(bank.sequence_N, bank.sequences),
        lanes={} if bank.lane_N is None else _row_counts(bank.lane_N, bank.lanes),
        notes=tuple(f"{name}: not installed, skipped" for name in _missing(source)),
        reused=reused,
        seconds=time.monotonic() - started,
    )


def _maker(
    source: str, encoder: str, path: Path, max_rows: int | None, created_by: str
) -> Callable[[], tuple[Bank, int]]:
    """Check the source; return what makes the bank of it, with the number of rows it drops."""
    if is_vectors(source):
        whole = _open_source(source, verify=True)
        return lambda: (_copy_bank(whole, encoder, path, max_rows, created_by), 0)
    rows, model = read_corpus(source, max_rows), load_encoder(encoder)

    def encode() -> tuple[Bank, int]:
        bank = _encode_bank(rows, model, path, created_by)
        return bank, len(rows) - bank.num_rows

    return encode


def holds_vectors(source: str) -> bool:
    """Whether `source` is an .npz or a bank folder."""
    return source.endswith(".npz") or (Path(source) / CONTENTS).is_file()


def is_loose(source: str) -> bool:
    """Whether `source` is a folder with the two files of a bank, but not the third."""
    folder = Path(source)
    there = all((folder / name).exists() for name in (VECTORS, ROWS))
    return there and not (folder / CONTENTS).exists()


def is_vectors(source: str) -> bool:
    """Whether the source is vectors, which no encoder makes here."""
    return holds_vectors(source) or is_loose(source)


def _open_source(source: str, verify: bool = False) -> Bank:
    return open_loose(source) if is_loose(source) else open_bank(source, verify)


def _missing(source: str) -> list[str]:
    return missing_packages() if source == PYTHON_DOCS else []


def _created_by(source: str, encoder: str, max_rows: int | None) -> str:
    """What decides the contents: the settings, then versions or a digest of the source."""
    # Not `encoder`: older banks of vectors record that of texts there, whose name they do not have.
    made_by = "vectors_of" if is_vectors(source) else "encoder"
    parts = [f"source={source}", f"{made_by}={encoder}", f"max_rows={max_rows or 'auto'}"]
    if source == PYTHON_DOCS:
        parts += [f"{name}={version}" for name, version in installed_versions().items()]
    elif is_vectors(source):
        parts.append(f"sha256={_open_source(source).sha256}")
    elif Path(source).exists():
        hashes = [file_sha256(path) for path in corpus_files(Path(source))]
        parts.append(f"sha256={hashlib.sha256(' '.join(hashes).encode()).hexdigest()}")
    return "; ".join(parts)


def existing_bank(path: Path, created_by: str) -> Bank:
    """Open the bank at `path`; raises ValueError where it was made in another way."""
    bank = open_bank(path, verify=True)
    if bank.created_by == created_by:
        return bank
    recorded = bank.created_by.split("; ")
    asked = [part for part in created_by.split("; ") if part not in recorded]
    others = f" with {len(asked) - 3} more" if len(asked) > 3 else ""
    raise ValueError(
        f"bank {path}: holds something else (not {', '.join(asked[:3])}{others}); give another "
        "bank path, or delete this one"
    )


def _encode_bank(rows: pd.DataFrame, model: Encoder, path: Path, created_by: str) -> Bank:
    """Encode `rows` in batches, drop those with a zero vector, write the bank."""
    blocks, keep_N = encode_texts(rows["text"].tolist(), model)
    if not keep_N.any():
        raise ValueError(f"encoder {model.name}: gives a zero vector for every row of the source")
    return write_bank(path, iter(blocks), rows[keep_N], model.name, created_by, overwrite=True)


def encode_texts(
    texts: list[str], model: Encoder
) -> tuple[list[npt.NDArray[np.float16]], npt.NDArray[np.bool_]]:
    """Return the unit vectors in blocks, zero ones left out, with which texts have one (N,)."""
    blocks: list[npt.NDArray[np.float16]] = []
    keep_N = np.zeros(len(texts), dtype=bool)
    name = model.name
    with tqdm(total=len(texts), desc=f"encode {name}", unit=" rows", disable=None) as progress:
        for start in range(0, len(texts), BATCH_ROWS):
            batch = texts[start : start + BATCH_ROWS]
            unit_BD = model.encode(batch)
            keep_B = unit_BD.any(axis=1)
            keep_N[start : start + len(batch)] = keep_B
            blocks.append(unit_BD[keep_B].astype(np.float16))
            progress.update(len(batch))
    return blocks, keep_N


def _copy_bank(
    source: Bank, encoder: str, path: Path, max_rows: int | None, created_by: str
) -> Bank:
    """Write a checked copy of `source`, cut at the last document border within `max_rows`.

    A whole copy extends the banks that `source` extends; a cut one may lack rows of theirs.
    """
    end_N = source.document_table()[["first_row", "num_rows"]].sum(axis=1).to_numpy()
    num_rows = source.num_rows
    if max_rows is not None and max_rows < num_rows:
        whole = end_N[end_N <= max_rows]
        num_rows = int(whole[-1]) if len(whole) else max_rows
    blocks = (
        source.vectors[start : min(start + BATCH_ROWS, num_rows)]
        for start in range(0, num_rows, BATCH_ROWS)
    )
    name = encoder if source.encoder == UNKNOWN_ENCODER else source.encoder
    rows, dtype = row_names(source)[:num_rows], source.vectors.dtype.name
    bases = source.bases if num_rows == source.num_rows else ()
    return write_bank(
        path, blocks, rows, name, created_by, dtype=dtype, overwrite=True, bases=bases
    )


def row_names(bank: Bank) -> pd.DataFrame:
    """Return the row table of a bank by names, with its `split` where it has one."""
    rows = pd.DataFrame(
        {
            "sequence": np.array(bank.sequences, dtype=object)[bank.sequence_N],
            "document": np.array(bank.documents, dtype=object)[bank.document_N],
        }
    )
    if bank.lane_N is not None:
        rows["lane"] = np.array([*bank.lanes, None], dtype=object)[bank.lane_N]
    texts = bank.texts()
    if texts is not None:
        rows["text"] = texts
    where = bank.path / ROWS
    if where.is_file() and "split" in pq.read_schema(where).names:
        rows["split"] = pq.read_table(where, columns=["split"]).to_pandas()["split"].to_numpy()
    return rows


def _row_counts(code_N: IntArray, names: tuple[str, ...]) -> dict[str, int]:
    """Rows of each name; "" counts the rows without one."""
    count = np.bincount(code_N.astype(np.int64) + 1, minlength=len(names) + 1).tolist()
    return dict(zip(names, count[1:], strict=True)) | ({"": count[0]} if count[0] else {})
