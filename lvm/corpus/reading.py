"""Text corpora in reading order: files, tables of texts, or installed libraries' docstrings."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lvm.bank.row_table import BLOCK_ROWS, Integers, run_starts
from lvm.bank.shards import SHARD_ROWS
from lvm.bank.tables import (
    TABLES,
    column_names,
    kind_of,
    name_text,
    nfc,
    read_json_lines,
    read_table,
    read_text,
)
from lvm.bank.vector_tables import VECTOR_COLUMNS, langchain_row, unread_note
from lvm.corpus.markup import READERS, Section, read_sections
from lvm.corpus.python_docs import module_sentences, python_modules
from lvm.corpus.sentences import AUTO, Tally, check_language, split_sentences
from lvm.system.errors import CONTROL, one_line_errors, printable
from lvm.system.progress import steps
from lvm.system.seeding import generator
from lvm.system.settings import file_inside

PYTHON_DOCS = "python-docs"
FOLDER_LANES = "folder"
WAYS = {  # other ways to bring a file, by what is found in the source
    ".parquet": "hf:{source} for its tables",
    ".npy": "a folder with it as vectors.npy and with rows.parquet, or an .npz with vectors",
    ".json": "JSONL, an object a line",
}
PROSE = (".md", ".rst", ".txt", ".html")
SUFFIXES = (*PROSE, ".jsonl")  # read from a folder; a single file may be any table, too
NAMES = ("sequence", "document", "lane")
TEXT_COLUMNS = ("text", "page_content", "metadata", *NAMES)
SPARE = 0.05  # share of max_rows: with less left, no more files are read
_CHARSET = re.compile(rb"charset=[\"']?([\w-]+)", re.IGNORECASE)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read: which rows, in what language, with which lanes.

    `max_rows` None takes all rows; otherwise whole files or modules are drawn by `seed` and kept in
    reading order. `lanes` "folder" makes the top folder of a file its lane. `order` names the
    column that sorts a table of vectors. A bank of more than `table_rows` rows is written in shards
    of as many.
    """

    max_rows: int | None = None
    seed: int = 0
    language: str = AUTO
    lanes: str | None = None
    order: str | None = None
    table_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows {self.max_rows}: must be 1 or more, or auto for all rows")
        if self.lanes not in (None, FOLDER_LANES):
            raise ValueError(f"lanes {self.lanes!r}: of text, lanes are none or {FOLDER_LANES}")
        check_language(self.language)


ALL_ROWS = SourceOptions()
EVERY = "all"
# Estimated so that the headline command of README needs 20 to 25 TFLOP of products; not measured.
EMBEDDED_ROWS = 150_000


def row_limit(max_rows: str | None, source: str) -> int | None:
    """Convert `max_rows` as typed to a number, or to None for every row of the source.

    None stands for auto. Raises ValueError unless it is `all` or a number from 1 on.
    """
    if max_rows is None:
        return EMBEDDED_ROWS if source == PYTHON_DOCS else None
    if max_rows == EVERY:
        return None
    if not max_rows.isascii() or not max_rows.isdigit() or int(max_rows) < 1:
        raise ValueError(f"max_rows: {max_rows!r} is no number from 1 on; or give {EVERY}, or auto")
    return int(max_rows)


@dataclass(frozen=True)
class Document:
    """Consecutive rows of one sequence; `lane` is "" if the source names none."""

    sequence: str
    name: str
    texts: list[str]
    lane: str = ""


@dataclass(frozen=True)
class Part:
    """One file or module, read when it is needed; its drops are counted under `name`."""

    name: str
    read: Callable[[Tally], Iterable[Document]]


@dataclass(frozen=True)
class Corpus:
    """The rows of a source: sequence, document, text, and lane if it has lanes.

    `tallies` says what was kept and dropped of each file or package, `notes` what was omitted.
    """

    rows: pd.DataFrame
    tallies: dict[str, Tally]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CorpusStream:
    """A corpus that is read while `tables` yields its rows, `table_rows` of the options each.

    The last table may have fewer. `tallies` grows as they are read.
    """

    tables: Iterator[pd.DataFrame]
    tallies: dict[str, Tally]
    notes: tuple[str, ...]


@one_line_errors
def read_corpus(source: str, options: SourceOptions = ALL_ROWS) -> Corpus:
    """Read `source`: "python-docs", a folder of text files, or one file of text or of texts.

    Raises ValueError if it is missing, if a file cannot be read, or if more than half of its text
    is dropped.
    """
    stream = open_corpus(source, options)
    rows = pd.concat(list(stream.tables), ignore_index=True)
    return Corpus(rows, stream.tallies, stream.notes)


def open_corpus(source: str, options: SourceOptions = ALL_ROWS) -> CorpusStream:
    """Return the corpus of `read_corpus`, to be read table by table; these raise as it does."""
    return _open_parts(source, *corpus_parts(source, options), options)


def open_rows(
    source: str, entries: Iterable[tuple[str, dict[str, Any]]], stem: str, options: SourceOptions
) -> CorpusStream:
    """Read a table of texts given as (place, row); `stem` names the sequence if a row does not."""
    part = Part(source, lambda tally: text_rows(entries, stem, "", tally))
    return _open_parts(source, [part], (), options)


def _open_parts(
    source: str, parts: list[Part], notes: tuple[str, ...], options: SourceOptions
) -> CorpusStream:
    tallies: dict[str, Tally] = {}

    def tables() -> Iterator[pd.DataFrame]:
        with steps(None, f"read {source}", "rows") as bar:

            def read(part: Part) -> Iterator[Document]:
                for one in part.read(tallies.setdefault(part.name, Tally())):
                    if one.texts:
                        bar.update(len(one.texts))
                        yield one

            yield from _tables(_documents(parts, read, options), options.table_rows)
        _check_drops(source, tallies)

    return CorpusStream(tables(), tallies, notes)


def _tables(documents: Iterable[Document], table_rows: int) -> Iterator[pd.DataFrame]:
    """Cut documents into tables of `table_rows` rows; the last may have fewer."""
    table: dict[str, list[str]] = {name: [] for name in (*NAMES, "text")}
    for one in documents:
        start = 0
        while start < len(one.texts):
            some = one.texts[start : start + table_rows - len(table["text"])]
            start += len(some)
            for name, value in zip(NAMES, (one.sequence, one.name, one.lane), strict=True):
                table[name] += [value] * len(some)
            table["text"] += some
            if len(table["text"]) == table_rows:
                yield _frame(table)
                table = {name: [] for name in table}
    if table["text"]:
        yield _frame(table)


def _frame(table: dict[str, list[str]]) -> pd.DataFrame:
    rows = pd.DataFrame(table)
    return rows if any(table["lane"]) else rows.drop(columns="lane")


def read_text_file(path: Path, language: str = AUTO) -> list[str]:
    """Return the sentences of one .md, .rst, .html or other text file in reading order."""
    if kind_of(path) not in READERS:
        return split_sentences(read_text(path), language)
    return [
        sentence
        for section in _file_sections(path)
        for paragraph in section.paragraphs
        for sentence in split_sentences(paragraph, language)
    ]


def corpus_files(source: Path) -> list[Path]:
    """Return the files of a corpus in a fixed order; raises ValueError if there are none."""
    if source.is_file():
        found = [source] if kind_of(source) in (*SUFFIXES, *TABLES) else []
    else:
        found = [path for path in _regular_files(source) if kind_of(path) in SUFFIXES]
    if not found:
        others = _others(source)
        held = f" (it has {others})" if others else ""
        way = next((way for kind, way in WAYS.items() if kind in others), "a folder with one")
        way = way.format(source=source)
        raise ValueError(f"source {source}: holds no {', '.join(SUFFIXES)} file{held}; give {way}")
    for path in found:
        if CONTROL.search(str(path)):
            raise ValueError(f"source {source}: {str(path)!r} holds control characters; rename it")
        if path != source:
            file_inside(source, str(path.relative_to(source)))
    count = Counter(nfc(str(path)) for path in found)
    name, most = count.most_common(1)[0]
    if most > 1:
        raise ValueError(f"source {source}: two files are called {name!r}; rename one")
    return found


def corpus_parts(source: str, options: SourceOptions) -> tuple[list[Part], tuple[str, ...]]:
    """Return the parts of a source in reading order, with notes on omitted files."""
    if source == PYTHON_DOCS:
        return [_module_part(*found) for found in python_modules()], ()
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"source {source}: no such folder or file; use {PYTHON_DOCS}, a folder of "
            f"{', '.join(SUFFIXES)} files, a table, an .npz, a bank folder, or hf:<dataset>"
        )
    parts = [_file_part(path, found, options) for found in corpus_files(path)]
    if path.is_file():
        names = column_names(path) if kind_of(path) in TABLES else []
        unread = [one for one in names if one not in TEXT_COLUMNS]
        return parts, ((unread_note(unread),) if unread else ())
    others = _others(path)
    return parts, ((f"left out, as ingest does not read them: {others}",) if others else ())


def _regular_files(source: Path) -> list[Path]:
    return [path for path in sorted(source.rglob("*")) if path.is_file()]


def _others(source: Path) -> str:
    """Return how many files with which suffixes are not read."""
    files = [source] if source.is_file() else _regular_files(source)
    kinds = (path.suffix.lower() for path in files if kind_of(path) not in SUFFIXES)
    count = Counter(kind or "without a suffix" for kind in kinds)
    return ", ".join(f"{number:,} {printable(kind)}" for kind, number in count.most_common(12))


def _module_part(package: Any, module: str, path: Path) -> Part:
    def read(tally: Tally) -> list[Document]:
        sentences = module_sentences(path.read_bytes(), tally)
        return [Document(package.name, module, sentences, package.lane)]

    return Part(package.name, read)


def _file_part(source: Path, path: Path, options: SourceOptions) -> Part:
    relative = Path(path.name) if path == source else path.relative_to(source)
    name = nfc(relative.as_posix())
    in_folder = options.lanes == FOLDER_LANES and len(relative.parts) > 1
    lane = nfc(relative.parts[0]) if in_folder else ""

    def read(tally: Tally) -> Iterable[Document]:
        if kind_of(path) not in PROSE:
            return text_rows(row_entries(path), name, lane, tally)
        if kind_of(path) == ".txt":
            texts = tally.split(read_text(path), options.language)
            return list(block_documents(name, texts, lane))
        return list(_section_documents(path, name, lane, options.language, tally))

    return Part(name, read)


def block_documents(sequence: str, texts: Iterable[str], lane: str = "") -> Iterator[Document]:
    """Cut a sequence without documents into documents of 100 rows."""
    rest, block = iter(texts), 0
    while some := list(islice(rest, BLOCK_ROWS)):
        yield Document(sequence, f"block-{block:06d}", some, lane)
        block += 1


def _section_documents(
    path: Path, sequence: str, lane: str, language: str, tally: Tally
) -> Iterator[Document]:
    """Return one document per heading; repeated titles are numbered."""
    sections = _file_sections(path)
    seen: Counter[str] = Counter()
    for title, paragraphs in sections:
        texts = [s for paragraph in paragraphs for s in tally.split(paragraph, language)]
        if len(sections) == 1 and not title:
            yield from block_documents(sequence, texts, lane)
        elif texts:
            name = printable(title) or "(top)"
            seen[name] += 1
            numbered = name if seen[name] == 1 else f"{name} ({seen[name]})"
            yield Document(sequence, numbered, texts, lane)


def _file_sections(path: Path) -> list[Section]:
    """Return the sections of a file of markup."""
    kind = kind_of(path)
    text = _markup(path, kind)
    try:
        return read_sections(kind, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _markup(path: Path, kind: str) -> str:
    """Return the text of a file of markup; HTML may declare an encoding of its own."""
    try:
        return read_text(path)
    except ValueError:
        raw = path.read_bytes()
        declared = _CHARSET.search(raw[:4096]) if kind == ".html" else None
        if declared is None:
            raise
        try:
            return nfc(raw.decode(declared[1].decode("ascii")))
        except (LookupError, UnicodeError):
            raise ValueError(f"{path}: is not in the encoding that it declares") from None


def row_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of a table of texts."""
    if kind_of(path) == ".jsonl":
        for number, entry in read_json_lines(path):
            yield f"{path} line {number}", entry
        return
    table = read_table(path, (*TEXT_COLUMNS, *VECTOR_COLUMNS))
    if not {"text", "page_content"} & set(table.columns):
        raise ValueError(
            f"{path}: no column text, vector or embedding among {', '.join(column_names(path))}; a "
            "table of texts needs text, one of vectors needs vector"
        )
    columns = [table[name].astype(object).where(table[name].notna(), None) for name in table]
    for number, values in enumerate(zip(*columns, strict=True)):
        yield f"{path} row {number}", dict(zip(table.columns, values, strict=True))


def text_rows(
    entries: Iterable[tuple[str, dict[str, Any]]], sequence: str, lane: str, tally: Tally
) -> Iterator[Document]:
    """Yield documents of rows {"text": ..., "sequence"?, "document"?, "lane"?}, texts unchanged.

    Rows of LangChain are read by `langchain_row`.
    """
    rows = (_text_row(place, entry, sequence, lane) for place, entry in entries)
    for (name, document, row_lane), group in groupby(rows, key=lambda row: row[:3]):
        texts = (row[3] for row in group)
        blocks = block_documents(name, texts, row_lane)
        for one in blocks if document is None else [Document(name, document, [*texts], row_lane)]:
            tally.kept += len(one.texts)
            yield one


def _text_row(
    place: str, row: dict[str, Any], sequence: str, lane: str
) -> tuple[str, str | None, str, str]:
    vector = next((name for name in VECTOR_COLUMNS if row.get(name) is not None), None)
    if vector is not None and isinstance(row[vector], str):
        raise ValueError(
            f"{place}: {vector} is text, not a list of numbers; store lists, as parquet or JSONL"
        )
    if vector is not None:
        raise ValueError(
            f'{place}: has a vector ("{vector}"); give a file of vectors as the source by itself, '
            "or omit the vectors"
        )
    row = langchain_row(row, place)
    if not isinstance(row.get("text"), str):
        raise ValueError(f'{place}: must be an object with a string "text"')
    names: dict[str, str | None] = {}
    for key in NAMES:
        value = row.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and key != "lane"
        if not (value is None or isinstance(value, str) or is_number):
            raise ValueError(f'{place}: "{key}" must be a string without control characters')
        names[key] = None if value is None else name_text(value)
        if names[key] is not None and CONTROL.search(str(names[key])):
            raise ValueError(f'{place}: "{key}" must be a string without control characters')
    own = sequence if names["sequence"] is None else names["sequence"]
    return own, names["document"], names["lane"] or lane, nfc(row["text"])


def _documents(
    parts: list[Part], read: Callable[[Part], Iterator[Document]], options: SourceOptions
) -> Iterable[Document]:
    """Return the documents of all parts, or of parts drawn by seed up to max_rows."""
    if options.max_rows is None:
        return (document for part in parts for document in read(part))
    drawn: dict[tuple[int, int], Document] = {}
    first, room = None, options.max_rows
    random = generator(options.seed, "max_rows")
    for position in random.permutation(len(parts)).tolist():
        documents = list(read(parts[position]))
        first = first or (documents[0] if documents else None)
        runs = [list(run) for _, run in groupby(enumerate(documents), lambda one: one[1].sequence)]
        for run in random.permutation(len(runs)).tolist():
            for number, document in runs[run]:
                if len(document.texts) > room:
                    break
                drawn[position, number] = document
                room -= len(document.texts)
        if room <= SPARE * options.max_rows:
            break
    if not drawn and first is not None:
        texts = first.texts[: options.max_rows]
        return [Document(first.sequence, first.name, texts, first.lane)]
    return [drawn[place] for place in sorted(drawn)]


def drawn_rows(
    sequence_N: Integers, document_N: Integers | None, options: SourceOptions
) -> npt.NDArray[np.int64]:
    """Return the rows of a table within max_rows, in reading order.

    Sequences are drawn by seed; of each, the first whole documents are taken (of 100 rows each if
    there are none).
    """
    num_rows = len(sequence_N)
    if options.max_rows is None or options.max_rows >= num_rows:
        return np.arange(num_rows)
    starts = run_starts(sequence_N)
    ends = np.append(starts[1:], num_rows)
    kept, room, whole = [], options.max_rows, None
    for run in generator(options.seed, "max_rows").permutation(len(starts)):
        start, end = int(starts[run]), int(ends[run])
        if document_N is None:
            borders = np.append(np.arange(start, end, BLOCK_ROWS), end)
        else:
            borders = np.append(start + run_starts(document_N[start:end]), end)
        fitting = borders[borders - start <= room]
        whole = start if whole is None else whole
        if len(fitting) > 1:
            kept.append(np.arange(start, fitting[-1]))
            room -= int(fitting[-1]) - start
        if room <= SPARE * options.max_rows:
            break
    if not kept and whole is not None:
        return np.arange(whole, whole + options.max_rows)
    return np.sort(np.concatenate(kept))


def _check_drops(source: str, tallies: dict[str, Tally]) -> None:
    """Raise ValueError if more than half of the text, by characters, is dropped."""
    reasons: Counter[str] = Counter()
    for tally in tallies.values():
        reasons.update(tally.dropped)
    why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    if not any(tally.kept for tally in tallies.values()):
        raise ValueError(
            f"source {source}: no sentence of three words or more in it"
            + (f"; dropped: {why}" if why else "")
        )
    characters = sum(tally.characters for tally in tallies.values())
    kept = sum(tally.kept_characters for tally in tallies.values())
    if 2 * kept < characters:
        raise ValueError(
            f"source {source}: {1 - kept / characters:.0%} of its text would be dropped ({why}); "
            'to keep lines as they are, give them as JSONL, {"text": ...} a line'
        )
