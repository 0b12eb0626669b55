"""The columns of query logs as their files hold them: parquet, JSONL, CSV, bounded in size."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.files import UNREADABLE
from lvm.system.untrusted import parse_json

MAX_LOGGED = 1_000_000  # queries of one log
MAX_LINE = 2**24  # characters, enough for a context of more than a million rows
MAX_CONTEXT_ROWS = 50_000_000  # rows of all contexts of one log: 400 MB
TARGET, SEQUENCE, CONTEXT = "target_row", "sequence", "context_rows"
WANTED = f"{TARGET} with {SEQUENCE}, or {TARGET} with {CONTEXT}"

_DIGITS = re.compile(r" *-?[0-9]{1,30} *")


def read_columns(path: Path) -> dict[str, Any]:
    """Return the known columns of a .parquet, .csv or .jsonl file, values as they are written.

    Raises ValueError, in one line, for a file of another kind, a damaged or too large one.
    """
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(
            f"queries: {path} is neither 'test' nor a {', '.join(READERS)} file with {WANTED}"
        )
    return READERS[path.suffix](path)


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for number, line in enumerate(_lines(path), start=1):
        where = f"queries: {path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); each line is one object") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: is no JSON object with {WANTED}")
        known = {name: entry[name] for name in (TARGET, SEQUENCE, CONTEXT) if name in entry}
        if number == 1:
            columns = {name: [] for name in known}
        if set(known) != set(columns):
            there, first = ", ".join(known) or "neither", ", ".join(columns) or "neither"
            raise ValueError(f"{where}: has {there}, line 1 has {first}; all lines need the same")
        for name, value in known.items():
            columns[name].append(value)
        num_rows += len(known[CONTEXT]) if isinstance(known.get(CONTEXT), list) else 0
        _check_size(path, number, num_rows)
    return columns or {TARGET: [], SEQUENCE: []}


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as opened:
            while line := opened.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise ValueError(
                        f"queries: {path} has a line of more than {MAX_LINE:,} characters"
                    )
                yield line
    except UnicodeDecodeError:
        raise ValueError(f"queries: {path} is no UTF-8 text") from None


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        there = pq.read_schema(path).names
        names = [name for name in there if name in (TARGET, SEQUENCE, CONTEXT)]
        if len(set(names)) < len(names):
            raise ValueError("a column stands there twice")
        file = pq.ParquetFile(path, read_dictionary=[n for n in names if n == SEQUENCE])
        for name in names:
            _check_kind(name, file.schema_arrow.field(name).type)
        num_rows = _num_values(file, CONTEXT) if CONTEXT in names else 0
        _check_size(path, file.metadata.num_rows, num_rows)
        table = file.read(names)
        columns = {name: table[name].to_pandas().tolist() for name in names}
    except UNREADABLE as error:
        raise ValueError(f"queries: {path} cannot be read as parquet ({error})") from None
    _check_size(
        path, table.num_rows, sum(len(x) for x in columns.get(CONTEXT, []) if x is not None)
    )
    return columns


def _num_values(file: pq.ParquetFile, name: str) -> int:
    """Return how many numbers a column of lists says to hold."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.split(".")[0] == name)


def _check_kind(name: str, kind: pa.DataType) -> None:
    """Raise ValueError unless each value takes a few bytes, however often the file repeats it."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_list = any(test(kind) for test in tests)
    value = kind.value_type if is_list else kind
    is_small = pa.types.is_primitive(value) or pa.types.is_null(value)
    if name == SEQUENCE and not is_small and not pa.types.is_dictionary(kind):
        raise ValueError(f"{name} holds {kind}; it must hold names")
    if name == TARGET and (is_list or not is_small):
        raise ValueError(f"{name} holds {kind}; it must hold whole numbers, rows of the bank")
    if name == CONTEXT and not (is_list and is_small):
        raise ValueError(f"{name} holds no lists of row numbers, but {kind}")


def _read_csv(path: Path) -> dict[str, Any]:
    """Read the columns as they are written: a number of a row is digits alone."""
    rows: list[list[str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            for row in csv.reader(opened, strict=True):
                if row:
                    rows.append(row)
                    _check_size(path, len(rows) - 1, 0)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"queries: {path} cannot be read as CSV ({error})") from None
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise ValueError(f"queries: {path} names a column twice in its first line")
    if CONTEXT in header:
        raise ValueError(
            f"queries: {path} has a column {CONTEXT}, but CSV holds no lists; give JSONL or parquet"
        )
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise ValueError(
                f"queries: {place_of(path, number)}: has {len(row)} fields, not {len(header)} as "
                "the first line"
            )
    columns = dict(zip(header, zip(*rows[1:], strict=True), strict=True)) if rows[1:] else {}
    known: dict[str, Any] = {name: list(columns.get(name, ())) for name in header}
    if TARGET in known:
        known[TARGET] = [int(text) if _DIGITS.fullmatch(text) else text for text in known[TARGET]]
    return {name: values for name, values in known.items() if name in (TARGET, SEQUENCE)}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}


def _check_size(path: Path, num_queries: int, num_rows: int) -> None:
    for count, most, what in (
        (num_queries, MAX_LOGGED, "queries"),
        (num_rows, MAX_CONTEXT_ROWS, "context rows in all"),
    ):
        if count > most:
            raise ValueError(f"queries: {path} holds more than {most:,} {what}; give a part of it")


def place_of(path: Path, query: int) -> str:
    """Name the line (JSONL) or row (a table) of a query, as a reader counts them."""
    return f"{path}, {'line' if path.suffix == '.jsonl' else 'row'} {query + 1}"
