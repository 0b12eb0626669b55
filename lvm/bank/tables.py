"""Open the files that people bring: Unicode text, and CSV, TSV, JSONL or parquet tables.

Every reader of user files starts here, so that they all accept the same files:

    kind_of(path)           the suffix in lower case: ".md" for NOTES.MARKDOWN, ".tsv" for A.TAB
    read_text(path)         the whole text
    read_lines(path)        its lines, one at a time
    read_json_lines(path)   (line number, object) of each line of JSONL
    read_table(path)        a DataFrame of a .csv, .tsv, .jsonl or .parquet file
    column_names(path)      the names of its columns
    name_text(value)        a name as text: 1001, 1001.0 and "1001" are all "1001"

Text is UTF-8, UTF-16 or UTF-32, with or without a byte order mark, with any line ends, and comes
back in Unicode's form NFC. Whatever cannot be read raises a ValueError that begins with the path.
"""

import codecs
import csv
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.system.settings import parse_json

SYNONYMS = {
    ".markdown": ".md",
    ".mdown": ".md",
    ".text": ".txt",
    ".htm": ".html",
    ".xhtml": ".html",
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".tab": ".tsv",
    ".pq": ".parquet",
}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_ROWS = 20_000_000  # of a table
MAX_LINE = 2**26  # characters
DELIMITERS = ",;\t|"  # of a .csv file; its first line tells which
# What pyarrow raises for a damaged parquet file, or for its conversion to pandas.
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    OverflowError,
    pa.ArrowException,
)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 4096
_CHUNK_ROWS = 65_536
_HINT = re.compile(r"sep=(.)")  # the first line of a CSV file that Excel writes on request


def kind_of(path: str | Path) -> str:
    """Return the suffix of `path` in lower case, with synonyms resolved."""
    suffix = Path(path).suffix.lower()
    return SYNONYMS.get(suffix, suffix)


def nfc(text: str) -> str:
    """Return `text` in Unicode normal form NFC, in which equal texts have equal characters."""
    return unicodedata.normalize("NFC", text)


def name_text(value: object) -> str:
    """Return a name as text: numbers without a fraction lose their ".0", text is NFC."""
    if isinstance(value, float | np.floating) and value.is_integer():
        value = int(value)
    return nfc(str(value))


def read_text(path: Path) -> str:
    """Return the text of a file with "\\n" as its only line end."""
    with _open_text(path) as opened:
        try:
            return nfc(opened.read())
        except UnicodeError:
            raise _not_text(path) from None


def read_lines(path: Path, max_line: int = MAX_LINE) -> Iterator[str]:
    """Yield the lines of a text file without their ends; each has at most `max_line` characters."""
    with _open_text(path) as opened:
        try:
            while line := opened.readline(max_line + 1):
                if len(line) > max_line:
                    raise ValueError(f"{path}: has a line of more than {max_line:,} characters")
                yield nfc(line.removesuffix("\n"))
        except UnicodeError:
            raise _not_text(path) from None


def read_json_lines(path: Path, max_line: int = MAX_LINE) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not blank; its text values are NFC."""
    for number, line in enumerate(read_lines(path, max_line), start=1):
        if not line.strip():
            continue
        try:
            found = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: not valid JSON ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} line {number}: is no JSON object; each line must be one")
        yield number, {key: nfc(v) if isinstance(v, str) else v for key, v in found.items()}


def read_table(
    path: Path,
    columns: Collection[str] | None = None,
    max_rows: int = MAX_ROWS,
    max_values: int | None = None,
) -> pd.DataFrame:
    """Read a .csv, .tsv, .jsonl or .parquet table, or those of its columns that are in `columns`.

    CSV and TSV give text as written. A TSV cell ends at a tab and has no quoting. CSV is separated
    by comma, semicolon, tab or bar, whichever splits its first line into most names. JSONL and
    parquet keep their types; a null is None or NaN, lists are lists or arrays. `max_values` bounds
    the numbers in all lists together. Raises ValueError for a file of another kind, a repeated
    column name, and a damaged or too large table.
    """
    kind = kind_of(path)
    if kind not in TABLES or not path.is_file():
        raise ValueError(f"{path}: is no {', '.join(TABLES)} file")
    if kind == ".parquet":
        return _read_parquet(path, columns, max_rows, max_values)
    if kind == ".jsonl":
        return _read_jsonl(path, columns, max_rows, max_values)
    return _read_delimited(path, columns, max_rows, kind == ".tsv")


def column_names(path: Path) -> list[str]:
    """Return the names of the columns of a table; for JSONL, those of its first line."""
    if kind_of(path) == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except UNREADABLE as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    if kind_of(path) == ".jsonl":
        return list(next((entry for _, entry in read_json_lines(path)), {}))
    records = _tab_records(path) if kind_of(path) == ".tsv" else _csv_records(path)
    return [name.strip() for name in next(records, (0, []))[1]]


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    with path.open("rb") as opened:
        encoding = _encoding(opened.read(_SAMPLE_BYTES))
    return path.open(encoding=encoding, newline=newline)


def _encoding(start: bytes) -> str:
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    # UTF-16 without a byte order mark: every second byte of ASCII is zero, and no UTF-8
    # text has a zero byte.
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) > len(start) // 8 and min(even, odd) == 0:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"


def _not_text(path: Path) -> ValueError:
    return ValueError(f"{path}: not UTF-8 or UTF-16 text; convert it, or remove it")


def _check_header(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: has two columns {twice!r}; give one")


def _check_rows(path: Path, num_rows: int, max_rows: int) -> None:
    if num_rows > max_rows:
        raise ValueError(f"{path}: has more than {max_rows:,} rows; give a part of it")


def _read_delimited(
    path: Path, columns: Collection[str] | None, max_rows: int, has_tabs: bool
) -> pd.DataFrame:
    records = _tab_records(path) if has_tabs else _csv_records(path)
    _, header = next(records, (0, []))
    header = [name.strip() for name in header]
    if not any(header):
        raise ValueError(f"{path}: is empty; its first line must name the columns")
    _check_header(path, [name for name in header if name])
    wanted = [n for n, name in enumerate(header) if name and (columns is None or name in columns)]
    chunks: list[list[pa.Array]] = [[] for _ in wanted]
    num_rows = 0
    for block in _blocks(records):
        num_rows += len(block)
        _check_rows(path, num_rows, max_rows)
        for number, fields in block:
            if len(fields) != len(header):
                raise ValueError(
                    f"{path} line {number}: has {len(fields)} fields, not {len(header)} as the "
                    f"first line ({', '.join(header)})"
                )
        for chunk, position in zip(chunks, wanted, strict=True):
            cells = [nfc(fields[position]) for _, fields in block]
            chunk.append(pa.array(cells, pa.large_string()))
    table = pa.table(
        [pa.chunked_array(chunk, pa.large_string()) for chunk in chunks],
        names=[header[position] for position in wanted],
    )
    return table.to_pandas()


def _blocks(
    records: Iterable[tuple[int, list[str]]],
) -> Iterator[list[tuple[int, list[str]]]]:
    block = []
    for record in records:
        block.append(record)
        if len(block) == _CHUNK_ROWS:
            yield block
            block = []
    if block:
        yield block


def _tab_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of a file without quoting."""
    for number, line in enumerate(read_lines(path), start=1):
        if line:
            yield number, line.split("\t")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, fields) of each record of a CSV file."""
    first = next((line for line in read_lines(path) if line.strip()), "")
    hint = _HINT.fullmatch(first)
    delimiter = hint[1] if hint else max(DELIMITERS, key=lambda one: _num_fields(first, one))
    limit = csv.field_size_limit(MAX_LINE)
    number = 1
    try:
        with _open_text(path, newline="") as opened:
            reader = csv.reader(opened, delimiter=delimiter, strict=True)
            for fields in reader:
                if any(fields) and not (hint and number == 1):
                    yield number, fields
                number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path} line {number}: not readable as CSV ({error}); quote a field that begins with "
            'a quotation mark, and double the marks in it: """Like this"" it is read."'
        ) from None
    except UnicodeError:
        raise _not_text(path) from None
    finally:
        csv.field_size_limit(limit)


def _num_fields(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter)))
    except csv.Error:
        return 0


def _read_jsonl(
    path: Path, columns: Collection[str] | None, max_rows: int, max_values: int | None
) -> pd.DataFrame:
    found: dict[str, list[Any]] = {}
    num_rows = num_values = 0
    for _, entry in read_json_lines(path):
        for name in entry:
            if name not in found and (columns is None or name in columns):
                found[name] = [None] * num_rows
        for name, cells in found.items():
            value = entry.get(name)
            num_values += len(value) if isinstance(value, list) else 0
            cells.append(value)
        num_rows += 1
        _check_rows(path, num_rows, max_rows)
        _check_values(path, num_values, max_values)
    return pd.DataFrame({name: pd.Series(cells, dtype=object) for name, cells in found.items()})


def _check_values(path: Path, num_values: int, max_values: int | None) -> None:
    if max_values is not None and num_values > max_values:
        raise ValueError(f"{path}: its lists hold more than {max_values:,} values; give a part")


def _read_parquet(
    path: Path, columns: Collection[str] | None, max_rows: int, max_values: int | None
) -> pd.DataFrame:
    """Read columns of parquet; repeated texts are held in memory once."""
    try:
        file = pq.ParquetFile(path)
        fields = [one for one in file.schema_arrow if columns is None or one.name in columns]
        _check_header(path, [one.name for one in fields])
        _check_rows(path, file.metadata.num_rows, max_rows)
        if max_values is not None:
            lists = [one.name for one in fields if is_list(one.type)]
            _check_values(path, _num_values(file, lists), max_values)
        texts = [one.name for one in fields if is_text(one.type)]
        # Names, not positions: pyarrow takes the names of texts alone for dictionaries.
        file = pq.ParquetFile(path, read_dictionary=texts)
        frame = frame_of(file.read([one.name for one in fields]))
    except UNREADABLE as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error
    return frame.assign(**{name: _composed(frame[name]) for name in texts})


def frame_of(table: pa.Table) -> pd.DataFrame:
    """Convert an Arrow table: text of every Arrow type becomes str, integers stay integers."""
    for position, one in enumerate(table.schema):
        plain = _plain_type(one.type)
        if plain != one.type:
            table = table.set_column(position, one.name, table.column(position).cast(plain))
    frame = table.to_pandas(ignore_metadata=True, integer_object_nulls=True)
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].astype(object)
    return frame


def _composed(cells: pd.Series) -> pd.Series:
    """Return text cells in NFC; most files are in NFC already."""
    code_N, unique = pd.factorize(cells)
    texts = [nfc(text) if isinstance(text, str) else text for text in unique]
    if all(new == old for new, old in zip(texts, unique, strict=True)):
        return cells
    return pd.Series(np.array([*texts, None], dtype=object)[code_N], cells.index)


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column of this Arrow type holds text, be it in a dictionary."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(inner) for test in tests)


def is_list(kind: pa.DataType) -> bool:
    """Tell whether a column of this Arrow type holds lists of any kind."""
    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """Return a type that pandas knows in place of one that it does not."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_dictionary(kind) and not is_text(kind):
        return kind.value_type
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(kind.value_type)
    return kind


def _num_values(file: pq.ParquetFile, names: list[str]) -> int:
    """Return how many values the lists of these columns hold, according to the file."""
    if not names:
        return 0
    file.scan_contents(names)  # raises for damaged counts, at which column() ends the process
    paths = [file.schema.column(leaf).path for leaf in range(len(file.schema))]
    leaves = [leaf for leaf, path in enumerate(paths) if path.split(".")[0] in names]
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    return sum(group.column(leaf).num_values for group in groups for leaf in leaves)
