"""Query logs: which rows were asked for, from which contexts.

Shapes: N bank rows, Q queries.
"""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lvm.bank.files import UNREADABLE
from lvm.bank.store import Bank
from lvm.one_line import in_one_line
from lvm.untrusted import parse_json
from lvm.windows.context_rows import context_queries
from lvm.windows.planning import Queries, make_queries

MAX_LOGGED = 1_000_000  # queries of one log
MAX_LINE = 2**24  # characters, enough for a context of more than a million rows
MAX_CONTEXT_ROWS = 50_000_000  # rows of all contexts of one log: 400 MB
TARGET, SEQUENCE, CONTEXT = "target_row", "sequence", "context_rows"
WANTED = f"{TARGET} with {SEQUENCE}, or {TARGET} with {CONTEXT}"

IntArray = NDArray[np.int64]
_DIGITS = re.compile(r" *-?[0-9]{1,30} *")


@dataclass(frozen=True)
class QueryLog:
    """The columns of a log, types checked; `sequence_Q` or `contexts` is None where not there."""

    path: Path
    target_row_Q: IntArray
    sequence_Q: list[str] | None
    contexts: list[IntArray] | None

    def place(self, query: int) -> str:
        """Name the line (JSONL) or row (a table) of a query, as a reader counts them."""
        return _place(self.path, query)


@in_one_line
def read_query_log(path: Path) -> QueryLog:
    """Read a .parquet, .csv or .jsonl file with target_row and sequence, or with context_rows.

    A line of JSONL is one query. With `context_rows` (lists of bank row numbers, in reading order)
    the column `sequence` may be there, too. CSV holds no lists, so no `context_rows`. Raises
    ValueError, in one line, for any other file.
    """
    if path.suffix not in READERS or not path.is_file():
        raise ValueError(
            f"queries: {path} is neither 'test' nor a {', '.join(READERS)} file with {WANTED}"
        )
    columns = READERS[path.suffix](path)
    if TARGET not in columns or not {SEQUENCE, CONTEXT} & set(columns):
        there = ", ".join(columns) or "none"
        raise ValueError(f"queries: {path} has the columns {there}; it needs {WANTED}")
    if not len(columns[TARGET]):
        raise ValueError(f"queries: {path} is empty; a log needs at least one query")
    return QueryLog(
        path,
        _whole_numbers(columns[TARGET], path),
        _names(columns[SEQUENCE], path) if SEQUENCE in columns else None,
        _contexts(columns[CONTEXT], path) if CONTEXT in columns else None,
    )


@in_one_line
def log_queries(log: QueryLog, bank: Bank, ctx: int) -> Queries:
    """Return the queries of a log in its order, its rows checked against `bank`.

    With recorded contexts each query is asked from exactly those rows, else from the up to `ctx`
    rows before its target. Raises ValueError for a row outside of the bank, for a sequence that is
    not the row's, for a query without context, with its answer in its context, or logged twice.
    """
    _check_range(log, log.target_row_Q, bank)
    if log.sequence_Q is not None:
        _check_sequences(log, bank)
    origin_Q = bank.sequence_start_N()[log.target_row_Q]
    if log.contexts is not None:
        _check_contexts(log, log.contexts, bank)
        return context_queries(log.target_row_Q, origin_Q, log.contexts)
    first_of_sequence = np.flatnonzero(log.target_row_Q == origin_Q)
    if len(first_of_sequence):
        raise ValueError(
            f"queries: {log.place(first_of_sequence[0])}: target_row "
            f"{log.target_row_Q[first_of_sequence[0]]} begins its sequence, so that nothing stands "
            "before it; leave it out, or give context_rows"
        )
    _check_repeated(log, log.target_row_Q.tolist())
    return make_queries(np.arange(len(origin_Q)), log.target_row_Q, origin_Q, ctx)


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
    for number, row in enumerate(rows[1:]):
        if len(row) != len(header):
            raise ValueError(
                f"queries: {_place(path, number)}: has {len(row)} fields, not {len(header)} as the "
                "first line"
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


def _place(path: Path, query: int) -> str:
    return f"{path}, {'line' if path.suffix == '.jsonl' else 'row'} {query + 1}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole_numbers(values: list[Any], path: Path) -> IntArray:
    wrong = next((place for place, value in enumerate(values) if not _is_whole(value)), None)
    if wrong is not None:
        raise ValueError(
            f"queries: {_place(path, wrong)}: "
            f"target_row is {values[wrong]!r}; it must be a whole number, a row of the bank"
        )
    return _as_rows(values)


def _names(values: list[Any], path: Path) -> list[str]:
    wrong = next((place for place, name in enumerate(values) if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(
            f"queries: {_place(path, wrong)}: sequence is {values[wrong]!r}; it must be a name"
        )
    return list(values)


def _contexts(values: list[Any], path: Path) -> list[IntArray]:
    contexts = []
    for place, value in enumerate(values):
        is_list = isinstance(value, list | np.ndarray) and len(value)
        if not is_list or not all(map(_is_whole, value)):
            raise ValueError(
                f"queries: {_place(path, place)}: context_rows must be a list of one or more whole "
                "numbers, rows of the bank"
            )
        contexts.append(_as_rows(value))
    return contexts


def _as_rows(values: Any) -> IntArray:
    """Return int64 row numbers; one that is too large for them is in no bank, as is -1."""
    return np.array([value if abs(int(value)) < 2**62 else -1 for value in values], np.int64)


def _check_range(log: QueryLog, target_row_Q: IntArray, bank: Bank) -> None:
    outside = np.flatnonzero((target_row_Q < 0) | (target_row_Q >= bank.num_rows))
    if len(outside):
        raise ValueError(
            f"queries: {log.place(outside[0])}: target_row {target_row_Q[outside[0]]} is no row of "
            f"{bank.path}, whose rows are 0 ... {bank.num_rows - 1}"
        )


def _check_sequences(log: QueryLog, bank: Bank) -> None:
    assert log.sequence_Q is not None
    for query, (name, row) in enumerate(zip(log.sequence_Q, log.target_row_Q, strict=True)):
        own = bank.sequences[bank.sequence_N[row]]
        if name != own:
            raise ValueError(
                f"queries: {log.place(query)}: target_row {row} belongs to the sequence {own!r}, "
                f"not to {name!r}; is the log of another bank?"
            )


def _check_contexts(log: QueryLog, contexts: list[IntArray], bank: Bank) -> None:
    for query, (rows, target) in enumerate(zip(contexts, log.target_row_Q, strict=True)):
        if rows.min() < 0 or rows.max() >= bank.num_rows:
            wrong = rows[(rows < 0) | (rows >= bank.num_rows)][0]
            raise ValueError(
                f"queries: {log.place(query)}: context row {wrong} is no row of {bank.path}, whose "
                f"rows are 0 ... {bank.num_rows - 1}"
            )
        if (rows == target).any():
            raise ValueError(
                f"queries: {log.place(query)}: the context holds the answer, row {target}; give "
                "the rows that were known before it"
            )
    keys = [(int(t), rows.tobytes()) for t, rows in zip(log.target_row_Q, contexts, strict=True)]
    _check_repeated(log, keys)


def _check_repeated(log: QueryLog, keys: list[Any]) -> None:
    """A query that is logged twice would count twice."""
    first: dict[Any, int] = {}
    for query, key in enumerate(keys):
        earlier = first.setdefault(key, query)
        if earlier != query:
            raise ValueError(
                f"queries: {log.place(query)}: repeats query {earlier + 1} (target_row "
                f"{log.target_row_Q[query]}); each query counts once"
            )
