"""Query logs: which bank rows were asked for, and from which contexts.

Shapes: N bank rows, Q queries.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lvm.bank.bank import Bank
from lvm.bank.duplicates import SAME_SCORE
from lvm.bank.tables import (
    TABLES,
    UNREADABLE,
    is_list,
    is_text,
    kind_of,
    name_text,
    nfc,
    read_table,
)
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.models.predict import unit_contexts
from lvm.retrieval.exact import top_rows
from lvm.shadow.request_log import Conversation, read_conversations
from lvm.system.errors import one_line_errors
from lvm.windows.planning import (
    SPLITS,
    ContextQueries,
    IntArray,
    Queries,
    Windows,
    context_queries,
    make_queries,
)

MAX_LOGGED = 1_000_000  # queries of one log
MAX_CONTEXT_ROWS = 50_000_000  # rows of all contexts of one log: 400 MB
TARGET, SEQUENCE, CONTEXT = "target_row", "sequence", "context_rows"
WANTED = f"{TARGET} with {SEQUENCE}, or {TARGET} with {CONTEXT}"

_DIGITS = re.compile(r" *-?[0-9]{1,30} *")


@dataclass(frozen=True)
class QueryLog:
    """The columns of a log; `sequence_Q` or `contexts` is None if the log has no such column.

    `note` tells how the log was made, where lvm made it.
    """

    path: Path
    target_row_Q: IntArray
    sequence_Q: list[str] | None
    contexts: list[IntArray] | None
    note: str = ""

    def place(self, query: int) -> str:
        """Return where a query stands, counted from 1."""
        return _place(self.path, query)

    def table(self) -> pd.DataFrame:
        """Return the log as a table that `read_query_log` reads."""
        columns = {TARGET: self.target_row_Q, SEQUENCE: self.sequence_Q, CONTEXT: self.contexts}
        return pd.DataFrame({name: one for name, one in columns.items() if one is not None})


@dataclass(frozen=True)
class Requests:
    """The sessions of a server's request log; which queries they are depends on the bank."""

    path: Path
    conversations: list[Conversation]
    _found: dict[str, QueryLog] = field(default_factory=dict)

    def in_bank(self, bank: Bank) -> QueryLog:
        """Return the query log of the sessions: what each request was answered by.

        The answer of a request is the next vector that its session sent, and its context are the
        vectors before, each as the nearest row of the bank with a cosine of SAME_SCORE or more.
        Requests are left out whose answer is not in the bank, or is in their context, or whose
        context is not in the bank, or that repeat another. Raises ValueError if none is left.
        """
        if bank.sha256 not in self._found:
            self._found[bank.sha256] = self._search(bank)
        return self._found[bank.sha256]

    def _search(self, bank: Bank) -> QueryLog:
        targets, contexts, seen = [], [], set()
        skipped: Counter[str] = Counter()
        for one in self.conversations:
            row_T = _same_rows(np.concatenate(one.parts), bank, self.path)
            for end in np.cumsum([len(part_TD) for part_TD in one.parts])[:-1]:
                target, context = int(row_T[end]), row_T[:end][row_T[:end] >= 0]
                key = (target, context.tobytes())
                if target < 0:
                    skipped["whose answer is not in the bank"] += 1
                elif not len(context):
                    skipped["whose context is not in the bank"] += 1
                elif target in context:
                    skipped["whose answer is in the context"] += 1
                elif key in seen:
                    skipped["that repeat another"] += 1
                else:
                    seen.add(key)
                    targets.append(target)
                    contexts.append(context)
        told = "".join(f"; without {number:,} {why}" for why, number in skipped.items())
        note = f"{len(targets):,} queries of {len(self.conversations):,} sessions{told}"
        if not targets:
            raise ValueError(f"queries: {self.path} has no query for bank {bank.path}: {note}")
        return QueryLog(self.path, np.array(targets, np.int64), None, contexts, note)


Log = QueryLog | Requests


@one_line_errors
def read_query_log(path: Path) -> Log:
    """Read a table of queries: target_row with sequence, or target_row with context_rows.

    A folder holds the requests of a server. Any other `path` is a .parquet, .jsonl, .csv or .tsv
    file. `context_rows` are lists of bank row numbers in reading order, which CSV and TSV cannot
    hold; the column `sequence` may stand beside them. Sequences are compared as text: 1001 and
    "1001" are one name. Raises ValueError, in one line, for any other file.
    """
    if path.is_dir():
        return Requests(path, read_conversations(path))
    columns = _read_columns(path)
    return QueryLog(
        path,
        _whole_numbers(columns[TARGET], path),
        _names(columns[SEQUENCE], path) if SEQUENCE in columns else None,
        _contexts(columns[CONTEXT], path) if CONTEXT in columns else None,
    )


@one_line_errors
def log_queries(log: Log, bank: Bank, ctx: int) -> Queries:
    """Return the queries of a log in its order, with its rows checked against `bank`.

    The context of a query is exactly its recorded rows, or else the up to `ctx` rows before its
    target. Raises ValueError for a row outside the bank, for a sequence that is not the row's, for
    a query without context, with its answer in its context, or logged twice.
    """
    if isinstance(log, Requests):
        log = log.in_bank(bank)
    _check_range(log, log.target_row_Q, bank)
    if log.sequence_Q is not None:
        _check_sequences(log, log.sequence_Q, bank)
    origin_Q = bank.sequence_start_N()[log.target_row_Q]
    if log.contexts is not None:
        _check_contexts(log, log.contexts, bank)
        return context_queries(log.target_row_Q, origin_Q, log.contexts)
    first_of_sequence = np.flatnonzero(log.target_row_Q == origin_Q)
    if len(first_of_sequence):
        query = first_of_sequence[0]
        raise ValueError(
            f"queries: {log.place(query)}: target_row {log.target_row_Q[query]} begins its "
            "sequence, so no row stands before it; leave it out, or give context_rows"
        )
    _check_repeated(log, log.target_row_Q.tolist())
    return make_queries(np.arange(len(origin_Q)), log.target_row_Q, origin_Q, ctx)


def choose_queries(
    log: Log | None, bank: Bank, windows: Windows, max_queries: int | None
) -> tuple[Queries, str]:
    """Return the first queries of the log, or of the frozen test split, with a description."""
    most = max_queries or MAX_QUERIES
    if log is None:
        frozen = windows.queries["test"]
        part = f"the first {most:,} of " if most < len(frozen) else ""
        return frozen.head(most), f"{part}the frozen test split"
    queries = log_queries(log, bank, windows.ctx)
    asked = queries.head(most)
    counts = np.bincount(windows.split_N[asked.target_row_Q], minlength=len(SPLITS))
    shares = ", ".join(f"{num:,} {name}" for name, num in zip(SPLITS, counts, strict=True))
    is_recorded = isinstance(asked, ContextQueries)
    contexts = "its recorded context" if is_recorded else "the rows before it"
    part = f"the first {len(asked):,} of " if len(asked) < len(queries) else ""
    made = f" ({log.in_bank(bank).note})" if isinstance(log, Requests) else ""
    return asked, (
        f"{part}the log {log.path.name}{made}, each asked from {contexts}; rows by split: {shares}"
    )


def _same_rows(vector_TD: NDArray[np.float32], bank: Bank, path: Path) -> IntArray:
    """Return the bank row that equals each vector (T,), -1 where there is none."""
    try:
        unit_TD = unit_contexts(vector_TD[None], bank.dim)[0]
    except ValueError as error:
        raise ValueError(f"queries: {path} is not of bank {bank.path}: {error}") from None
    row_T1, score_T1 = top_rows(unit_TD, bank, 1)
    return np.where(score_T1[:, 0] >= SAME_SCORE, row_T1[:, 0], -1)


def _place(path: Path, query: int) -> str:
    return f"{path}, query {query + 1}"


def _read_columns(path: Path) -> dict[str, list[Any]]:
    """Return the known columns of a table, each value as the file has it."""
    kind = kind_of(path)
    if kind not in TABLES or not path.is_file():
        raise ValueError(
            f"queries: {path} is neither 'test' nor a {', '.join(TABLES)} file with {WANTED}"
        )
    try:
        if kind == ".parquet":
            _check_types(path)
        table = read_table(path, (TARGET, SEQUENCE, CONTEXT), MAX_LOGGED, MAX_CONTEXT_ROWS)
        if len(table) and (TARGET not in table or not {SEQUENCE, CONTEXT} & set(table)):
            header = ", ".join(map(str, read_table(path, None, MAX_LOGGED, MAX_CONTEXT_ROWS)))
            raise ValueError(f"{path}: has the columns {header}; it needs {WANTED}")
    except (OSError, ValueError) as error:
        raise ValueError(f"queries: {error}") from None
    if not len(table):
        raise ValueError(f"queries: {path} is empty; a log needs at least one query")
    columns = {str(name): table[name].tolist() for name in table}
    if kind in (".csv", ".tsv"):
        if CONTEXT in columns:
            raise ValueError(
                f"queries: {path} has a column {CONTEXT}, but a {kind} file holds no lists; give "
                "JSONL or parquet"
            )
        columns[TARGET] = [int(x) if _DIGITS.fullmatch(x) else x for x in columns[TARGET]]
    return columns


def _check_types(path: Path) -> None:
    """Raise ValueError unless each value takes a few bytes, however often the file repeats it."""
    try:
        schema = pq.read_schema(path)
    except UNREADABLE:
        return  # `read_table` tells why
    for column in schema:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        value = kind.value_type if is_list(kind) else kind
        is_number = pa.types.is_primitive(value) or pa.types.is_null(value)
        wrong = {
            TARGET: (is_list(kind) or not is_number, "whole numbers, rows of the bank"),
            SEQUENCE: (is_list(kind) or not (is_number or is_text(kind)), "names"),
            CONTEXT: (not is_list(kind) or not is_number, "lists of row numbers"),
        }
        is_wrong, right = wrong.get(column.name, (False, ""))
        if is_wrong:
            raise ValueError(f"{path}: {column.name} holds {column.type}; it must hold {right}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole_numbers(values: list[Any], path: Path) -> IntArray:
    wrong = next((query for query, value in enumerate(values) if not _is_whole(value)), None)
    if wrong is not None:
        raise ValueError(
            f"queries: {_place(path, wrong)}: "
            f"target_row is {values[wrong]!r}; it must be a whole number, a row of the bank"
        )
    return _row_numbers(values)


def _names(values: list[Any], path: Path) -> list[str]:
    for query, name in enumerate(values):
        is_name = isinstance(name, str | int | float) and not isinstance(name, bool)
        if not is_name or pd.isna(name):
            raise ValueError(
                f"queries: {_place(path, query)}: sequence is {name!r}; it must be a name"
            )
    return [name_text(name) for name in values]


def _contexts(values: list[Any], path: Path) -> list[IntArray]:
    contexts = []
    for query, value in enumerate(values):
        is_rows = isinstance(value, list | np.ndarray) and len(value)
        if not is_rows or not all(map(_is_whole, value)):
            raise ValueError(
                f"queries: {_place(path, query)}: context_rows must be a list of one or more "
                "whole numbers, rows of the bank"
            )
        contexts.append(_row_numbers(value))
    return contexts


def _row_numbers(values: Any) -> IntArray:
    """Return int64 row numbers; -1, a row of no bank, replaces those too large for int64."""
    return np.array([value if abs(int(value)) < 2**62 else -1 for value in values], np.int64)


def _check_range(log: QueryLog, target_row_Q: IntArray, bank: Bank) -> None:
    outside = np.flatnonzero((target_row_Q < 0) | (target_row_Q >= bank.num_rows))
    if len(outside):
        raise ValueError(
            f"queries: {log.place(outside[0])}: target_row {target_row_Q[outside[0]]} is not a row "
            f"of {bank.path}, whose rows are 0 ... {bank.num_rows - 1}"
        )


def _check_sequences(log: QueryLog, sequence_Q: list[str], bank: Bank) -> None:
    for query, (name, row) in enumerate(zip(sequence_Q, log.target_row_Q, strict=True)):
        own = bank.sequences[bank.sequence_N[row]]
        if name != nfc(own):
            raise ValueError(
                f"queries: {log.place(query)}: target_row {row} belongs to the sequence {own!r}, "
                f"not to {name!r}; is the log of another bank?"
            )


def _check_contexts(log: QueryLog, contexts: list[IntArray], bank: Bank) -> None:
    for query, (rows, target) in enumerate(zip(contexts, log.target_row_Q, strict=True)):
        if rows.min() < 0 or rows.max() >= bank.num_rows:
            wrong = rows[(rows < 0) | (rows >= bank.num_rows)][0]
            raise ValueError(
                f"queries: {log.place(query)}: context row {wrong} is not a row of {bank.path}, "
                f"whose rows are 0 ... {bank.num_rows - 1}"
            )
        if (rows == target).any():
            raise ValueError(
                f"queries: {log.place(query)}: the context holds the answer, row {target}; give "
                "the rows that were known before it"
            )
    keys = [(int(t), rows.tobytes()) for t, rows in zip(log.target_row_Q, contexts, strict=True)]
    _check_repeated(log, keys)


def _check_repeated(log: QueryLog, keys: list[Any]) -> None:
    """Raise ValueError for a query that is logged twice: it would count twice."""
    first: dict[Any, int] = {}
    for query, key in enumerate(keys):
        earlier = first.setdefault(key, query)
        if earlier != query:
            raise ValueError(
                f"queries: {log.place(query)}: repeats query {earlier + 1} (target_row "
                f"{log.target_row_Q[query]}); each query counts once"
            )
