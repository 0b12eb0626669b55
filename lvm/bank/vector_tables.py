"""Tables with a vector in each row: parquet, JSONL, Arrow batches of any source.

The column `vector` or `embedding` holds lists of numbers, each of the same length. The columns
`sequence`, `document`, `lane` and `text` are those of a bank; an order column sorts the rows.

Shapes: N rows, D vector dim, b rows of one batch.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lvm.bank.row_table import KINDS, with_sequence
from lvm.bank.tables import UNREADABLE, frame_of, is_list, is_text, kind_of, read_json_lines
from lvm.system.atomic import scratch_folder
from lvm.system.errors import printable

VECTOR_COLUMNS = ("vector", "embedding", "vectors", "embeddings")
ORDER_COLUMNS = ("order", "position", "index", "chunk_index", "chunk_id", "chunk", "row")
NO_ORDER = "none"
NO_NUMBERS = "does not hold a number or a time in every row"
MAX_NAMED = 8
BATCH_ROWS = 8192
BUFFER_BYTES = 2**20  # bytes of a column chunk read at a time


@dataclass(frozen=True)
class VectorTable:
    """A table of vectors, read batch by batch; error messages begin with `place`.

    `batches` receives some of the column `names` and yields Arrow tables of these, in file order.
    """

    place: str
    names: tuple[str, ...]
    batches: Callable[[list[str]], Iterator[pa.Table]]

    @property
    def vector(self) -> str:
        """Return the name of the column of vectors."""
        return next(name for name in VECTOR_COLUMNS if name in self.names)


@dataclass(frozen=True)
class CheckedTable:
    """A table of vectors that has passed all checks.

    `rows` is its row table in reading order. `order_N` gives the file row of each row, None if the
    file is in reading order. `dtype` is float16 if the file holds that, else float32.
    """

    table: VectorTable
    rows: pd.DataFrame
    order_N: np.ndarray | None
    dim: int
    dtype: str
    notes: tuple[str, ...]

    def blocks(self, beside: Path) -> Iterator[np.ndarray]:
        """Yield the vectors (b, D) in reading order, sorted in a scratch file beside `beside`."""
        if self.order_N is None:
            yield from self._in_file_order()
            return
        row_bytes = self.dim * np.dtype(self.dtype).itemsize
        with scratch_folder(beside) as folder, (folder / "unsorted").open("w+b") as file:
            for block in self._in_file_order():
                file.write(np.ascontiguousarray(block).data)
            file.flush()
            for start in range(0, len(self.order_N), BATCH_ROWS):
                rows = self.order_N[start : start + BATCH_ROWS].tolist()
                raw = b"".join(os.pread(file.fileno(), row_bytes, row * row_bytes) for row in rows)
                yield np.frombuffer(raw, self.dtype).reshape(-1, self.dim)

    def _in_file_order(self) -> Iterator[np.ndarray]:
        for batch in self.table.batches([self.table.vector]):
            column = batch.column(self.table.vector).combine_chunks()
            yield _numbers(column).reshape(len(column), self.dim).astype(self.dtype, copy=False)


def vector_table(path: Path) -> VectorTable | None:
    """Return a .parquet or .jsonl file as a table of vectors; None if it has no vectors."""
    if kind_of(path) == ".parquet" and path.is_file():
        try:
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
        except UNREADABLE as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from error
        return arrow_table(str(path), schema, lambda names: _parquet_batches(path, names))
    if kind_of(path) == ".jsonl" and path.is_file():
        first = next((entry for _, entry in _entries(path)), {})
        if any(isinstance(first.get(name), list) for name in VECTOR_COLUMNS):
            # Any line may have a column that the first lacks.
            names = dict.fromkeys([*first, *KINDS, *ORDER_COLUMNS])
            return VectorTable(str(path), tuple(names), lambda names: _json_batches(path, names))
    return None


def arrow_table(
    place: str, schema: pa.Schema, batches: Callable[[list[str]], Iterator[pa.Table]]
) -> VectorTable | None:
    """Return a table of vectors with this schema; None if it has no column of vectors.

    Raises ValueError if such a column holds anything but lists, or if there are two.
    """
    found = [name for name in VECTOR_COLUMNS if name in schema.names]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"{place}: has the columns {' and '.join(found)}; keep one of them")
    kind = schema.field(found[0]).type
    if not is_list(kind):
        raise ValueError(
            f"{place}: {found[0]} holds {kind}; each row needs a list of numbers, as "
            "np.asarray(vector, np.float32).tolist() gives"
        )
    return VectorTable(place, tuple(schema.names), batches)


def unread_note(names: Sequence[str]) -> str:
    """Return a note that names the columns of a table that are not read."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"columns that are not read: {', '.join(map(printable, names[:MAX_NAMED]))}{more}"


def langchain_row(row: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a row with LangChain's `page_content` and `metadata` under the names of a bank.

    The metadata's `source` becomes the sequence and its `page` the document, unless it has these.
    """
    if "page_content" not in row or "text" in row:
        return row
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f'{place}: "metadata" must be an object')
    page = metadata.get("page")
    found = {} if page is None else {"document": f"page {page}"}
    if metadata.get("source") is not None:
        found["sequence"] = metadata["source"]
    own = {name: value for name, value in row.items() if name not in ("page_content", "metadata")}
    return own | found | metadata | {"text": row["page_content"]}


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, entry in read_json_lines(path):
        yield number, langchain_row(entry, f"{path} line {number}")


def check_table(table: VectorTable, stem: str, order: str | None = None) -> CheckedTable:
    """Read all columns and check all vectors; ValueError lists every problem.

    `order` names the column that sorts the rows of each sequence. None means the first of
    ORDER_COLUMNS that holds numbers; "none" means file order. `stem` names the sequence if the
    table has neither sequences nor documents.
    """
    name, problems, kept = table.vector, _Problems(table.place), []
    if order not in (None, NO_ORDER) and order not in table.names:
        problems.add(f"no column {order!r} to order the rows by")
        order = NO_ORDER
    wanted = [one for one in table.names if one in (*KINDS, *ORDER_COLUMNS, order)]
    dim, is_half, start = None, True, 0
    try:
        for batch in table.batches([name, *wanted]):
            column = batch.column(name).combine_chunks()
            dim = dim or _first_length(column)
            is_half &= pa.types.is_float16(column.type.value_type)
            problems.check_vectors(name, column, dim, start)
            # A copy: a column of a batch from an Arrow file keeps the vectors beside it in memory.
            kept.append(_plain(batch.select(wanted)).take(np.arange(batch.num_rows)))
            start += batch.num_rows
    except UNREADABLE as error:
        if isinstance(error, ValueError) and str(error).startswith(table.place):
            raise
        raise ValueError(f"{table.place}: not readable ({error})") from error
    if not start:
        raise ValueError(f"{table.place}: holds no row")
    columns = frame_of(pa.concat_tables(kept, promote_options="permissive"))
    columns = columns.dropna(axis="columns", how="all")
    rows = columns[[one for one in columns.columns if one in KINDS]]
    rows, notes = with_sequence(rows, start, stem)
    unread = [one for one in table.names if one not in (name, *wanted)]
    if unread:
        notes += (unread_note(unread),)
    order_N = None
    try:
        order_N, chosen = _order(columns, rows, order)
    except ValueError as error:
        problems.add(str(error))
    else:
        if chosen:
            notes += (f"rows are in the order of the column {chosen}",)
        elif order is None and (found := [one for one in ORDER_COLUMNS if one in columns]):
            if order_N is None and not any(_sortable(columns[one]) for one in found):
                notes += (f"rows keep the order of the file: {found[0]} {NO_NUMBERS}",)
    problems.refuse()
    assert dim is not None
    if order_N is not None:
        rows = rows.iloc[order_N].reset_index(drop=True)
    return CheckedTable(table, rows, order_N, dim, "float16" if is_half else "float32", notes)


class _Problems:
    """Collects the problems of a table, to be reported together."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.found: dict[str, tuple[int, int]] = {}  # how many rows, the first of them

    def add(self, what: str, num_rows: int = 0, first: int = 0) -> None:
        """Note a problem of the table, or of some of its rows."""
        before, first_before = self.found.get(what, (0, first))
        self.found[what] = (before + num_rows, first_before)

    def check_vectors(self, name: str, column: pa.Array, dim: int, start: int) -> None:
        """Note missing, short, long, zero and non-finite vectors of a batch."""
        length_b = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        self._rows(f"rows without a {name}", length_b == -1, start)
        other_b = (length_b != dim) & (length_b != -1)
        self._rows(f"rows whose {name} has other than {dim} numbers", other_b, start)
        kind = column.type.value_type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise ValueError(f"{self.place}: {name} holds lists of {kind}, not of numbers")
        if (length_b != dim).any():
            return
        block_bD = _numbers(column).reshape(len(length_b), dim)
        finite_b = np.isfinite(block_bD).all(axis=1)
        self._rows(f"rows whose {name} holds NaN, null or infinity", ~finite_b, start)
        self._rows(f"rows whose {name} is zero", finite_b & ~block_bD.any(axis=1), start)

    def _rows(self, what: str, wrong_b: np.ndarray, start: int) -> None:
        if wrong_b.any():
            self.add(what, int(wrong_b.sum()), start + int(wrong_b.argmax()))

    def refuse(self) -> None:
        """Raise ValueError with all problems, if there are any."""
        problems = [
            f"{num_rows:,} {what}, first row {first}" if num_rows else what
            for what, (num_rows, first) in self.found.items()
        ]
        if problems:
            hint = "; remove these rows" if any(count for count, _ in self.found.values()) else ""
            raise ValueError(f"{self.place}: {'; '.join(problems)}{hint}")


def _first_length(column: pa.Array) -> int:
    """Return the length of the first vector; 1 if there is none."""
    length_b = pc.list_value_length(column).drop_null()
    return max(1, length_b[0].as_py()) if len(length_b) else 1


def _numbers(column: pa.Array) -> np.ndarray:
    """Return the numbers of all lists in one array, NaN for null; no list may be null."""
    return column.flatten().to_numpy(zero_copy_only=False)


def _plain(batch: pa.Table) -> pa.Table:
    """Return a batch whose texts are of one Arrow type, so that batches can be joined."""
    for position, field in enumerate(batch.schema):
        if is_text(field.type):
            column = batch.column(position).cast(pa.large_string())
        elif pa.types.is_dictionary(field.type):
            column = batch.column(position).cast(field.type.value_type)
        else:
            continue
        batch = batch.set_column(position, field.name, column)
    return batch


def _order(
    columns: pd.DataFrame, rows: pd.DataFrame, order: str | None
) -> tuple[np.ndarray | None, str]:
    """Return the file rows in reading order (N,), None for file order; and the column used.

    Sequences come in the order of their first rows. So do the documents of a sequence, if the
    column starts again in each of them.
    """
    found = [order] if order else [name for name in ORDER_COLUMNS if name in columns]
    if order == NO_ORDER or not found:
        return None, ""
    numeric = [name for name in found if name in columns and _sortable(columns[name])]
    if not numeric:
        if order is None:
            return None, ""
        raise ValueError(f"{order} {NO_NUMBERS}; it cannot order")
    name = str(numeric[0])
    value_N = _sort_values(columns[name])
    sequence_N = pd.factorize(rows["sequence"])[0]
    document_N = np.zeros(len(rows), int)
    if _repeats(sequence_N, document_N, value_N) and "document" in rows:
        document_N = pd.factorize(rows["document"])[0]
    if _repeats(sequence_N, document_N, value_N):
        raise ValueError(
            f"{name} repeats within a sequence, so it cannot order the rows; give "
            f"order=<column>, or order={NO_ORDER} for the order of the file"
        )
    order_N = np.lexsort((value_N, document_N, sequence_N))
    is_sorted = bool((np.diff(order_N) == 1).all())
    return (None if is_sorted else order_N), ("" if is_sorted and order is None else name)


def _sortable(values: pd.Series) -> bool:
    if values.isna().any():
        return False
    is_time = pd.api.types.is_datetime64_any_dtype(values)
    return is_time or bool(pd.to_numeric(values, errors="coerce").notna().all())


def _sort_values(values: pd.Series) -> np.ndarray:
    if pd.api.types.is_datetime64_any_dtype(values):
        return values.to_numpy("datetime64[ns]")
    return pd.to_numeric(values).to_numpy()


def _repeats(*keys_N: np.ndarray) -> bool:
    return bool(pd.DataFrame(dict(enumerate(keys_N))).duplicated().any())


def _parquet_batches(path: Path, names: list[str]) -> Iterator[pa.Table]:
    """Yield batches; only pages of a row group are in memory, however large the group is."""
    # With pre_buffer, which is the default, pyarrow holds whole column chunks.
    file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
        yield pa.Table.from_batches([batch])


def _json_batches(path: Path, names: list[str]) -> Iterator[pa.Table]:
    batch: dict[str, list[object]] = {name: [] for name in names}
    for number, entry in _entries(path):
        for name in names:
            batch[name].append(entry.get(name))
        if len(batch[names[0]]) == BATCH_ROWS:
            yield _json_table(path, number, batch)
            batch = {name: [] for name in names}
    if batch[names[0]]:
        yield _json_table(path, number, batch)


def _json_table(path: Path, number: int, batch: dict[str, list[object]]) -> pa.Table:
    columns = {}
    for name, cells in batch.items():
        try:
            kind = pa.large_list(pa.float64()) if name in VECTOR_COLUMNS else None
            columns[name] = pa.array(cells, kind)
        except (pa.ArrowException, TypeError) as error:
            wanted = "lists of numbers" if name in VECTOR_COLUMNS else "values of one kind"
            raise ValueError(
                f"{path}: {name} does not hold {wanted} in every line up to line {number} ({error})"
            ) from None
    return pa.table(columns)
