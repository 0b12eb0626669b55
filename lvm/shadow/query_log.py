"""Query logs: which rows were asked for, from which contexts.

Shapes: N bank rows, Q queries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.shadow.log_files import CONTEXT, SEQUENCE, TARGET, WANTED, place_of, read_columns
from lvm.system.errors import one_line_errors
from lvm.windows.queries import Queries, context_queries, make_queries

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class QueryLog:
    """The columns of a log, types checked; `sequence_Q` or `contexts` is None where not there."""

    path: Path
    target_row_Q: IntArray
    sequence_Q: list[str] | None
    contexts: list[IntArray] | None

    def place(self, query: int) -> str:
        """Name the line (JSONL) or row (a table) of a query, as a reader counts them."""
        return place_of(self.path, query)


@one_line_errors
def read_query_log(path: Path) -> QueryLog:
    """Read a .parquet, .csv or .jsonl file with target_row and sequence, or with context_rows.

    A line of JSONL is one query. With `context_rows` (lists of bank row numbers, in reading order)
    the column `sequence` may be there, too. CSV holds no lists, so no `context_rows`. Raises
    ValueError, in one line, for any other file.
    """
    columns = read_columns(path)
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


@one_line_errors
def log_queries(log: QueryLog, bank: Bank, ctx: int) -> Queries:
    """Return the queries of a log in its order, its rows checked against `bank`.

    With recorded contexts the context of a query is exactly those rows, else the up to `ctx` rows
    before its target. Raises ValueError for a row outside of the bank, for a sequence that is
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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _whole_numbers(values: list[Any], path: Path) -> IntArray:
    wrong = next((query for query, value in enumerate(values) if not _is_whole(value)), None)
    if wrong is not None:
        raise ValueError(
            f"queries: {place_of(path, wrong)}: "
            f"target_row is {values[wrong]!r}; it must be a whole number, a row of the bank"
        )
    return _as_rows(values)


def _names(values: list[Any], path: Path) -> list[str]:
    wrong = next((query for query, name in enumerate(values) if not isinstance(name, str)), None)
    if wrong is not None:
        raise ValueError(
            f"queries: {place_of(path, wrong)}: sequence is {values[wrong]!r}; it must be a name"
        )
    return list(values)


def _contexts(values: list[Any], path: Path) -> list[IntArray]:
    contexts = []
    for query, value in enumerate(values):
        is_list = isinstance(value, list | np.ndarray) and len(value)
        if not is_list or not all(map(_is_whole, value)):
            raise ValueError(
                f"queries: {place_of(path, query)}: context_rows must be a list of one or more "
                "whole numbers, rows of the bank"
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
