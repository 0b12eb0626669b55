"""Ingestion: a source of text or vectors becomes a bank.

Shapes: N bank rows, D vector dim, B rows of one batch.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from filelock import FileLock

from lvm.bank.bank import UNKNOWN_ENCODER, Bank, open_bank, open_loose, write_bank
from lvm.bank.files import CONTENTS, ROWS, VECTORS, file_sha256
from lvm.bank.row_table import Integers
from lvm.bank.tables import kind_of
from lvm.bank.vector_tables import VectorTable, check_table, vector_table
from lvm.corpus.encoders import WORDLLAMA, Encoder, load_encoder
from lvm.corpus.hugging_face import PREFIX, HuggingFaceSource
from lvm.corpus.python_docs import installed_versions, missing_packages
from lvm.corpus.reading import (
    ALL_ROWS,
    PYTHON_DOCS,
    Corpus,
    SourceOptions,
    corpus_files,
    drawn_rows,
    read_corpus,
    read_rows,
)
from lvm.corpus.sentences import AUTO, Tally
from lvm.system.errors import one_line_errors
from lvm.system.progress import part, steps

BATCH_ROWS = 4096
ZERO_VECTOR = "zero vector: the encoder knows no token of the text"
READER = "3"  # raise this number if equal text would give other rows


@dataclass(frozen=True)
class IngestReport:
    """Report of an ingestion; `dropped` counts sentences by reason, `notes` are lines for the user.

    `files` gives, for each file or package that lost sentences or gave none, how many were kept and
    how many were dropped by reason.
    """

    path: str
    source: str
    encoder: str
    created_by: str
    sha256: str
    rows_read: int
    rows: int
    dim: int
    dropped: dict[str, int]
    files: dict[str, dict[str, int]]
    sequences: dict[str, int]
    lanes: dict[str, int]
    notes: tuple[str, ...]
    reused: bool
    seconds: float


@dataclass
class _Made:
    """A bank that was just written, and what was omitted from it."""

    bank: Bank
    dropped: Counter[str] = field(default_factory=Counter)
    tallies: dict[str, Tally] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@one_line_errors
def ingest(
    source: str,
    encoder: str | None,
    path: str | Path,
    options: SourceOptions = ALL_ROWS,
    overwrite: bool = False,
) -> IngestReport:
    """Make the bank at `path` from `source`; reuse a bank there that was made in the same way.

    Sources of text are "python-docs", a folder of text files, and a table with a column `text`;
    `encoder` (None: wordllama) embeds them. Sources of vectors are an .npz, a folder with
    vectors.npy and rows.parquet, a bank, and a parquet or JSONL file with a column `vector`; they
    are checked and copied, and `encoder` names what made them. "hf:<name or folder>" is either. One
    process at a time makes the bank. Raises ValueError if `path` holds a bank made in another way,
    unless `overwrite`.
    """
    started = time.monotonic()
    path = Path(path)
    opened = _open_source(source, options)
    is_text = isinstance(opened, str)
    if encoder is None:
        encoder = WORDLLAMA if is_text else UNKNOWN_ENCODER
    created_by = _created_by(source, opened, encoder, options)
    made = None
    if overwrite or not path.exists():
        make = _maker(source, opened, encoder, path, options, created_by)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{path.name}.lock"):
            if overwrite or not path.exists():  # otherwise another process made it meanwhile
                made = make()
    result = made or _Made(existing_bank(path, created_by))
    bank, missing = result.bank, missing_packages() if source == PYTHON_DOCS else []
    return IngestReport(
        path=str(path),
        source=source,
        encoder=bank.encoder,
        created_by=created_by,
        sha256=bank.sha256,
        rows_read=bank.num_rows + result.dropped.total(),
        rows=bank.num_rows,
        dim=bank.dim,
        dropped=dict(result.dropped),
        files={
            name: {"kept": tally.kept, **tally.dropped}
            for name, tally in result.tallies.items()
            if tally.dropped or not tally.kept
        },
        sequences=_row_counts(bank.sequence_N, bank.sequences),
        lanes={} if bank.lane_N is None else _row_counts(bank.lane_N, bank.lanes),
        notes=(*(f"{name}: not installed, skipped" for name in missing), *result.notes),
        reused=made is None,
        seconds=time.monotonic() - started,
    )


def holds_vectors(source: str) -> bool:
    """Return whether `source` is an .npz or a bank folder."""
    return kind_of(source) == ".npz" or (Path(source) / CONTENTS).is_file()


def is_loose(source: str) -> bool:
    """Return whether `source` is a folder with vectors.npy and rows.parquet but no bank.json."""
    folder = Path(source)
    there = all((folder / name).exists() for name in (VECTORS, ROWS))
    return there and not (folder / CONTENTS).exists()


def _open_source(source: str, options: SourceOptions) -> Bank | VectorTable | str:
    """Open a source of vectors; return the name of a source of text unchanged."""
    if source.startswith(PREFIX):
        found: Bank | VectorTable | None = HuggingFaceSource(source).vectors()
    elif is_loose(source):
        found = open_loose(source)
    elif holds_vectors(source):
        found = open_bank(source, verify=True)
    else:
        found = vector_table(Path(source))
    if found is None:
        return source
    for name in ("language", "lanes"):
        if getattr(options, name) != getattr(ALL_ROWS, name):
            raise ValueError(f"{name}: is for text, but {source} holds vectors; omit it")
    return found


def _maker(
    source: str,
    opened: Bank | VectorTable | str,
    encoder: str,
    path: Path,
    options: SourceOptions,
    created_by: str,
) -> Callable[[], _Made]:
    """Check the source; return the function that makes its bank."""
    if isinstance(opened, Bank):
        return lambda: _Made(_copy_bank(opened, encoder, path, options, created_by))
    if isinstance(opened, VectorTable):
        return lambda: _copy_table(opened, encoder, path, options, created_by)
    if source.startswith(PREFIX):
        dataset = HuggingFaceSource(source)
        corpus = read_rows(source, dataset.rows(), dataset.stem, options)
    else:
        corpus = read_corpus(source, options)
    model = load_encoder(encoder)
    return lambda: _encode_bank(corpus, model, path, created_by)


def _created_by(
    source: str, opened: Bank | VectorTable | str, encoder: str, options: SourceOptions
) -> str:
    """Return what decides the contents: the settings, and versions or a digest of the source."""
    # Not `encoder`: older banks of vectors recorded the default encoder of texts there.
    made_by = "encoder" if isinstance(opened, str) else "vectors_of"
    parts = [f"source={source}", f"{made_by}={encoder}"]
    if options.max_rows is None:
        parts.append("max_rows=auto")
    else:
        parts.append(f"max_rows={options.max_rows} drawn by seed {options.seed}")
    if options.language != AUTO:
        parts.append(f"language={options.language}")
    parts += [f"{name}={value}" for name in ("lanes", "order") if (value := getattr(options, name))]
    if source == PYTHON_DOCS:
        return "; ".join(
            parts + [f"{name}={version}" for name, version in installed_versions().items()]
        )
    if isinstance(opened, str):
        parts.append(f"reader={READER}")
    if isinstance(opened, Bank):
        return "; ".join([*parts, f"sha256={opened.sha256}"])
    if source.startswith(PREFIX) and (revision := HuggingFaceSource(source).revision()):
        parts.append(f"revision={revision}")
    files = _source_files(source)
    if files:
        hashes = " ".join(map(file_sha256, files))
        parts.append(f"sha256={hashlib.sha256(hashes.encode()).hexdigest()}")
    return "; ".join(parts)


def _source_files(source: str) -> list[Path]:
    """Return the files that a source reads; empty if it is not on this machine."""
    if source.startswith(PREFIX):
        folder = HuggingFaceSource(source).folder
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    return corpus_files(Path(source)) if Path(source).exists() else []


def existing_bank(path: Path, created_by: str) -> Bank:
    """Open the bank at `path`; raises ValueError if it was made in another way."""
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


def _encode_bank(corpus: Corpus, model: Encoder, path: Path, created_by: str) -> _Made:
    """Encode the rows in batches, drop those with a zero vector, write the bank."""
    rows = corpus.rows
    blocks, keep_N = encode_texts(rows["text"].tolist(), model)
    if not keep_N.any():
        raise ValueError(f"encoder {model.name}: gives a zero vector for every row of the source")
    bank = write_bank(path, iter(blocks), rows[keep_N], model.name, created_by, overwrite=True)
    dropped = sum((tally.dropped for tally in corpus.tallies.values()), Counter[str]())
    if not keep_N.all():
        dropped[ZERO_VECTOR] = int((~keep_N).sum())
    return _Made(bank, dropped, corpus.tallies, corpus.notes)


def encode_texts(
    texts: list[str], model: Encoder
) -> tuple[list[npt.NDArray[np.float16]], npt.NDArray[np.bool_]]:
    """Return unit vectors in blocks, and which texts have one (N,); zero vectors are omitted."""
    blocks: list[npt.NDArray[np.float16]] = []
    keep_N = np.zeros(len(texts), dtype=bool)
    name = model.name
    with part("encode"), steps(None, f"encode by {name}", "rows", len(texts)) as bar:
        for start in range(0, len(texts), BATCH_ROWS):
            batch = texts[start : start + BATCH_ROWS]
            unit_BD = model.encode(batch)
            keep_B = unit_BD.any(axis=1)
            keep_N[start : start + len(batch)] = keep_B
            blocks.append(unit_BD[keep_B].astype(np.float16))
            bar.update(len(batch))
    return blocks, keep_N


def _copy_bank(
    source: Bank, encoder: str, path: Path, options: SourceOptions, created_by: str
) -> Bank:
    """Write a checked copy of `source`, or of as many whole documents as max_rows allows.

    A whole copy extends the banks that `source` extends; a part may lack some of their rows.
    """
    rows = row_names(source)
    kept = drawn_rows(source.sequence_N, source.document_N, options)
    is_whole = len(kept) == source.num_rows
    name = encoder if source.encoder == UNKNOWN_ENCODER else source.encoder
    return write_bank(
        path,
        (source.vectors[kept[start : start + BATCH_ROWS]] for start in _starts(len(kept))),
        rows.iloc[kept],
        name,
        created_by,
        dtype=source.vectors.dtype.name,
        overwrite=True,
        bases=source.bases if is_whole else (),
    )


def _copy_table(
    table: VectorTable, encoder: str, path: Path, options: SourceOptions, created_by: str
) -> _Made:
    """Write a bank from a table of vectors, or from as many whole documents as max_rows allows."""
    checked = check_table(table, Path(table.place.removeprefix(PREFIX)).stem, options.order)
    rows = checked.rows
    sequence_N = pd.factorize(rows["sequence"])[0]
    document_N = pd.factorize(rows["document"])[0] if "document" in rows else None
    kept = drawn_rows(sequence_N, document_N, options)
    blocks: Iterable[np.ndarray] = checked.blocks(path)
    if len(kept) < len(rows):
        blocks = _only(blocks, kept)
    bank = write_bank(
        path, blocks, rows.iloc[kept], encoder, created_by, dtype=checked.dtype, overwrite=True
    )
    return _Made(bank, notes=checked.notes)


def _only(blocks: Iterable[np.ndarray], kept: Integers) -> Iterable[np.ndarray]:
    """Yield from blocks the rows `kept`, which are ascending."""
    start = 0
    for block in blocks:
        first, last = np.searchsorted(kept, (start, start + len(block)))
        if first < last:
            yield block[kept[first:last] - start]
        start += len(block)


def _starts(num_rows: int) -> range:
    return range(0, num_rows, BATCH_ROWS)


def row_names(bank: Bank) -> pd.DataFrame:
    """Return the row table of a bank with names instead of codes, and `split` if it has one."""
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


def _row_counts(code_N: Integers, names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows of each name; "" counts the rows without a name."""
    count = np.bincount(code_N.astype(np.int64) + 1, minlength=len(names) + 1).tolist()
    return dict(zip(names, count[1:], strict=True)) | ({"": count[0]} if count[0] else {})
