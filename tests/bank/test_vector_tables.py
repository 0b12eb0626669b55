"""Tables of vectors: what is read, in which order, what is refused, all at once."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.bank import vector_tables
from lvm.bank.vector_tables import CheckedTable, check_table, vector_table

VECTORS = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
COLUMNS = {"sequence": [1001] * 4 + [7] * 3, "text": list("abcdefg")}
LISTS = {
    "list": pa.list_(pa.float32()),
    "large": pa.large_list(pa.float64()),
    "fixed": pa.list_(pa.float32(), 3),
    "view": pa.list_view(pa.float32()),
    "large view": pa.large_list_view(pa.float32()),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_tables, "BATCH_ROWS", 3)


def write(path: Path, columns: dict, name: str = "vector", kind: pa.DataType | None = None) -> Path:
    if path.suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        arrays = {key: pa.array(value) for key, value in columns.items() if key != name}
        if name in columns:
            arrays[name] = pa.array(columns[name], kind)
        pq.write_table(pa.table(arrays), path, row_group_size=4)
    return path


def read(path: Path, order: str | None = None) -> tuple[CheckedTable, np.ndarray]:
    table = vector_table(path)
    assert table is not None
    checked = check_table(table, path.stem, order)
    return checked, np.concatenate(list(checked.blocks(path.parent / "bank")))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".PARQUET"])
@pytest.mark.parametrize("name", ["vector", "embedding"])
def test_rows_are_read_with_their_vectors(suffix: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a{suffix}", COLUMNS | {name: VECTORS.tolist()}, name)
    checked, found = read(path)
    np.testing.assert_array_equal(found, VECTORS)
    assert checked.order_N is None and (checked.dim, checked.dtype) == (3, "float32")
    assert checked.rows["text"].tolist() == COLUMNS["text"]
    assert checked.rows["sequence"].tolist() == COLUMNS["sequence"]


@pytest.mark.parametrize("kind", LISTS.values(), ids=list(LISTS))
def test_every_kind_of_list_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"vector": VECTORS.tolist()}, kind=kind)
    checked, found = read(path)
    np.testing.assert_array_equal(found, VECTORS)
    assert checked.notes == ("no column sequence: all rows are one sequence, a",)
    halves = VECTORS.astype(np.float16)
    write(path, {"vector": list(halves)}, kind=pa.list_(pa.float16()))
    checked, found = read(path)
    assert checked.dtype == "float16" and np.array_equal(found, halves)


@pytest.mark.parametrize("order", [None, "place"])
def test_an_order_column_sorts_each_sequence(order: str | None, tmp_path: Path) -> None:
    shuffled = [5, 0, 6, 3, 2, 4, 1]
    columns = {name: [values[n] for n in shuffled] for name, values in COLUMNS.items()}
    columns |= {"vector": VECTORS[shuffled].tolist(), order or "chunk_index": shuffled}
    checked, found = read(write(tmp_path / "a.parquet", columns), order)
    expected = [4, 5, 6, 0, 1, 2, 3]  # sequences by their first row
    np.testing.assert_array_equal(found, VECTORS[expected])
    assert "".join(checked.rows["text"]) == "efgabcd"
    assert checked.notes == (f"rows are in the order of the column {order or 'chunk_index'}",)
    assert [one.name for one in tmp_path.iterdir()] == ["a.parquet"]
    with pytest.raises(ValueError, match="no column 'page' to order the rows by"):
        read(tmp_path / "a.parquet", "page")
    _, as_written = read(tmp_path / "a.parquet", "none")
    np.testing.assert_array_equal(as_written, VECTORS[shuffled])


def test_an_order_may_begin_anew_in_each_document(tmp_path: Path) -> None:
    columns = {"document": list("xxxyyyy"), "sequence": ["s"] * 7, "order": [2, 1, 0, 1, 3, 0, 2]}
    _, found = read(write(tmp_path / "a.parquet", columns | {"vector": VECTORS.tolist()}))
    np.testing.assert_array_equal(found, VECTORS[[2, 1, 0, 5, 3, 6, 4]])
    columns["order"] = [0, 0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="order repeats within a sequence.*order=none"):
        read(write(tmp_path / "a.parquet", columns | {"vector": VECTORS.tolist()}))


def test_without_sequences_documents_are_sequences(tmp_path: Path) -> None:
    columns = {"document": list("xxxyyyy"), "vector": VECTORS.tolist()}
    checked, _ = read(write(tmp_path / "a.parquet", columns))
    assert checked.rows["sequence"].tolist() == list("xxxyyyy")
    assert checked.notes == ("no column sequence: each document is a sequence of its own",)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    vectors = [list(vector) for vector in VECTORS.tolist()]
    vectors[1], vectors[2], vectors[5] = None, [1.0], [0.0] * 3
    vectors[6][0] = float("nan")
    path = write(tmp_path / "a.parquet", {"vector": vectors})
    with pytest.raises(ValueError) as caught:
        read(path, "page")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in (
        "no column 'page'",
        "1 rows without a vector, first row 1",
        "1 rows whose vector has other than 3 numbers, first row 2",
        "1 rows whose vector is zero, first row 5",
        "1 rows whose vector holds NaN, null or infinity, first row 6",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"vector": ["[1, 2]"] * 7}, "vector holds string; each row needs a list of numbers"),
        ({"vector": [["a"]] * 7}, "vector holds lists of string, not of numbers"),
        ({"vector": VECTORS.tolist(), "embedding": VECTORS.tolist()}, "keep one of them"),
    ],
)
def test_what_is_no_vector_is_refused(columns: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_line_of_jsonl_without_numbers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"vector": [1, 2]}\n{"vector": ["x", 2]}\n')
    with pytest.raises(ValueError, match="a.jsonl: vector does not hold lists of numbers"):
        read(tmp_path / "a.jsonl")


def test_a_table_without_vectors_is_none(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    for name in ("a.parquet", "a.jsonl", "missing.parquet", "a.csv"):
        assert vector_table(tmp_path / name) is None


def test_a_line_of_jsonl_may_have_what_the_first_lacks(tmp_path: Path) -> None:
    lines = [
        {"vector": [1.0, 2.0], "id": 7},
        {"vector": [2.0, 1.0], "text": "b"},
        {"vector": [1.0, 1.0], "page_content": "c", "metadata": {"author": "d"}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    checked, _ = read(path)
    assert checked.rows["text"].fillna("").tolist() == ["", "b", "c"]
    assert "columns that are not read: id" in checked.notes


def test_rows_of_langchain_keep_their_texts_beside_vectors(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    metadata = {"source": "report.pdf", "page": 2}
    line = {"page_content": "One.", "metadata": metadata, "embedding": [1.0, 2.0]}
    path.write_text(json.dumps(line))
    checked, _ = read(path)
    assert checked.rows.to_dict("records") == [
        {"sequence": "report.pdf", "document": "page 2", "text": "One."}
    ]


@pytest.mark.parametrize("values", [[2.0, None, 0.0], ["b", "c", "a"]])
def test_an_order_that_cannot_sort_is_told(values: list, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"vector": VECTORS[:3].tolist(), "order": values}), path)
    checked, _ = read(path)
    assert checked.order_N is None
    assert any("order of the file: order does not hold" in note for note in checked.notes)
    with pytest.raises(ValueError, match="order does not hold a number"):
        read(path, "order")
