"""Ingestion: a source of text or vectors becomes a bank.

Shapes: N bank rows, D vector dim, B rows of one batch.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import FileLock

from lvm.bank.bank import UNKNOWN_ENCODER, Bank, ShardWriter, open_bank, open_loose, write_bank
from lvm.bank.files import (
    CONTENTS,
    ROWS,
    VECTORS,
    file_sha256,
    read_blocks,
    read_columns,
    row_files,
)
from lvm.bank.row_table import Integers
from lvm.bank.shards import Cut
from lvm.bank.tables import kind_of
from lvm.bank.vector_tables import VectorTable, check_table, vector_table
from lvm.corpus.encoders import WORDLLAMA, Encoder, load_encoder
from lvm.corpus.hugging_face import PREFIX, HuggingFaceSource
from lvm.corpus.python_docs import installed_versions, missing_packages
from lvm.corpus.reading import (
    ALL_ROWS,
    PYTHON_DOCS,
    CorpusStream,
    SourceOptions,
    corpus_files,
    drawn_rows,
    open_corpus,
    open_rows,
)
from lvm.corpus.sentences import AUTO, Tally
from lvm.system.distributed import share
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
    if not isinstance(opened, str):
        return lambda: _copy_vectors(opened, source, encoder, path, options, created_by)
    stream = _open_text(source, options)
    with part("read text"):
        first = list(islice(stream.tables, 2))
    model = load_encoder(encoder)
    if len(first) == 1:
        return lambda: _encode_bank(first[0], stream, model, path, created_by)
    writer = ShardWriter(path, encoder, created_by, "float16", options.table_rows)
    return lambda: write_shards(writer, TextShards(source, encoder, options))


def _open_text(source: str, options: SourceOptions) -> CorpusStream:
    if source.startswith(PREFIX):
        dataset = HuggingFaceSource(source)
        return open_rows(source, dataset.rows(), dataset.stem, options)
    return open_corpus(source, options)


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


def _encode_bank(
    rows: pd.DataFrame, stream: CorpusStream, model: Encoder, path: Path, created_by: str
) -> _Made:
    """Encode the rows in batches, drop those with a zero vector, write the bank."""
    blocks, keep_N = encode_texts(rows["text"].tolist(), model)
    if not keep_N.any():
        raise ValueError(f"encoder {model.name}: gives a zero vector for every row of the source")
    bank = write_bank(path, iter(blocks), rows[keep_N], model.name, created_by, overwrite=True)
    dropped = sum((tally.dropped for tally in stream.tallies.values()), Counter[str]())
    if not keep_N.all():
        dropped[ZERO_VECTOR] = int((~keep_N).sum())
    return _Made(bank, dropped, stream.tallies, stream.notes)


@dataclass
class Shard:
    """The rows of a shard; `content` returns their vectors in blocks, and which rows have one."""

    rows: pd.DataFrame
    content: Callable[[], tuple[Iterable[np.ndarray], npt.NDArray[np.bool_] | slice]]


class ShardSource(Protocol):
    """A source of more rows than a shard has; every process of a command opens it by itself."""

    def shards(self) -> Iterator[Shard]:
        """Yield all shards in row order; the content of one may be asked for before the next."""

    def omitted(self) -> tuple[dict[str, Tally], tuple[str, ...]]:
        """Return the tallies and the notes of a source that has been read."""


@dataclass
class TextShards:
    """A source of text, read anew by each process, which encodes its own shards."""

    source: str
    encoder: str
    options: SourceOptions
    _read: CorpusStream | None = None

    def shards(self) -> Iterator[Shard]:
        """Yield a shard for each table of texts."""
        model = load_encoder(self.encoder)
        self._read = _open_text(self.source, self.options)
        for rows in self._read.tables:
            yield Shard(rows, partial(encode_texts, rows["text"].tolist(), model))

    def omitted(self) -> tuple[dict[str, Tally], tuple[str, ...]]:
        """Return the tallies and the notes of the text."""
        assert self._read is not None, "omitted() comes after shards()"
        return self._read.tallies, self._read.notes


@dataclass
class VectorShards:
    """A source of vectors, which each process checks and reads by itself in one pass."""

    source: str
    path: Path
    options: SourceOptions
    found: "_Vectors | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"found": None}  # not sent to other processes

    def shards(self) -> Iterator[Shard]:
        """Yield runs of `table_rows` of the rows within max_rows."""
        if self.found is None:
            opened = _open_source(self.source, self.options)
            assert not isinstance(opened, str), "a source of vectors"
            self.found = _Vectors.of(opened, self.path, self.options)
        rows, cut = self.found.rows, Cut(self.found.blocks())
        for start in range(0, len(rows), self.options.table_rows):
            some = rows[start : start + self.options.table_rows]
            blocks = cut.take(len(some))
            yield Shard(some, partial(_all_of, blocks))
            for _ in blocks:  # those of a shard that is not written here
                pass

    def omitted(self) -> tuple[dict[str, Tally], tuple[str, ...]]:
        """Return the notes; no vector is omitted."""
        return {}, () if self.found is None else self.found.notes


@dataclass(frozen=True)
class OwnShards:
    """The task of one process: to write every `size`-th shard that is not finished."""

    writer: ShardWriter
    source: ShardSource

    def run(self, rank: int, size: int) -> tuple[int, dict[str, Tally], tuple[str, ...]]:
        """Write this process's shards; return how many shards there are, and what was omitted."""
        num_shards = 0
        for number, shard in enumerate(self.source.shards()):
            num_shards += 1
            if number % size == rank and self.writer.finished(number) is None:
                blocks, keep = shard.content()
                rows = shard.rows[keep]
                zero = len(shard.rows) - len(rows)
                self.writer.write(number, blocks, rows, zero=zero)
        return (num_shards, *self.source.omitted())


def write_shards(writer: ShardWriter, source: ShardSource) -> _Made:
    """Write the shards of a large source, shared among the processes of this command."""
    writer.start()
    with part("shards"):
        (num_shards, tallies, notes), *_ = share(OwnShards(writer, source))
    records = writer.finish(num_shards)
    dropped = sum((tally.dropped for tally in tallies.values()), Counter[str]())
    dropped[ZERO_VECTOR] += sum(record["zero"] for record in records)
    return _Made(open_bank(writer.path), +dropped, tallies, notes)


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


@dataclass(frozen=True)
class _Vectors:
    """Checked vectors, or as many whole documents of them as max_rows allows, with row table."""

    rows: pd.DataFrame
    blocks: Callable[[], Iterable[np.ndarray]]
    dtype: str
    is_whole: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, opened: Bank | VectorTable, path: Path, options: SourceOptions) -> "_Vectors":
        """Check a source whose vectors will be written at `path`, and read its row table."""
        notes: tuple[str, ...] = ()
        every: Callable[[], Iterable[np.ndarray]]
        if isinstance(opened, Bank):
            rows, dtype = row_names(opened), opened.vectors.dtype.name
            kept = drawn_rows(opened.sequence_N, opened.document_N, options)
            every = partial(read_blocks, opened.vectors)
        else:
            stem = Path(opened.place.removeprefix(PREFIX)).stem
            checked = check_table(opened, stem, options.order)
            rows, dtype, notes = checked.rows, checked.dtype, checked.notes
            sequence_N = pd.factorize(rows["sequence"])[0]
            document_N = pd.factorize(rows["document"])[0] if "document" in rows else None
            kept = drawn_rows(sequence_N, document_N, options)
            every = partial(checked.blocks, path)
        if len(kept) == len(rows):
            return cls(rows, every, dtype, True, notes)
        return cls(rows.iloc[kept], lambda: _only(every(), kept), dtype, False, notes)


def _copy_vectors(
    opened: Bank | VectorTable,
    source: str,
    encoder: str,
    path: Path,
    options: SourceOptions,
    created_by: str,
) -> _Made:
    """Write a bank of a source of vectors.

    A whole copy of a bank extends the banks that this extends; a part may lack some of their rows.
    """
    found = _Vectors.of(opened, path, options)
    bases: tuple[str, ...] = ()
    if isinstance(opened, Bank):
        encoder = encoder if opened.encoder == UNKNOWN_ENCODER else opened.encoder
        bases = opened.bases if found.is_whole else ()
    if len(found.rows) > options.table_rows:
        rows = options.table_rows
        writer = ShardWriter(path, encoder, created_by, found.dtype, rows, bases)
        return write_shards(writer, VectorShards(source, path, options, found))
    made = write_bank(
        path, found.blocks(), found.rows, encoder, created_by, found.dtype, True, bases
    )
    return _Made(made, notes=found.notes)


def _all_of(blocks: Iterable[np.ndarray]) -> tuple[Iterable[np.ndarray], slice]:
    return blocks, slice(None)


def _only(blocks: Iterable[np.ndarray], kept: Integers) -> Iterable[np.ndarray]:
    """Yield from blocks the rows `kept`, which are ascending."""
    start = 0
    for block in blocks:
        first, last = np.searchsorted(kept, (start, start + len(block)))
        if first < last:
            yield block[kept[first:last] - start]
        start += len(block)


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
    if bank.path.is_dir():
        splits = read_columns(row_files(bank.path), ("split",))
        rows = rows.join(splits)
    return rows


def _row_counts(code_N: Integers, names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows of each name; "" counts the rows without a name."""
    count = np.bincount(code_N.astype(np.int64) + 1, minlength=len(names) + 1).tolist()
    return dict(zip(names, count[1:], strict=True)) | ({"": count[0]} if count[0] else {})
