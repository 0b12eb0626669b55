"""Files as people bring them: encodings, line ends, separators, quoting, Arrow's types."""

import json
import unicodedata
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.bank.tables import (
    kind_of,
    name_text,
    read_json_lines,
    read_lines,
    read_table,
    read_text,
)

TEXT = "Der Fluß steigt.\nÀ bientôt, dit-elle.\n雨が降る。\n"
ROWS = [{"sequence": "Zoë", "target_row": 7}, {"sequence": "山", "target_row": 12}]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_the_same_in_every_encoding(encoding: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert read_text(path) == TEXT
    assert list(read_lines(path)) == TEXT.splitlines()


def test_text_is_composed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(unicodedata.normalize("NFD", TEXT), "utf-8")
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".JSONL", ".Csv", ".ndjson", ".tab"])
def test_a_table_is_the_same_in_every_encoding(encoding: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"log{suffix}"
    if kind_of(path) == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    else:
        mark = "\t" if kind_of(path) == ".tsv" else ","
        lines = [mark.join(ROWS[0]), *(mark.join(map(str, row.values())) for row in ROWS)]
    text = unicodedata.normalize("NFD", "\r\n".join([*lines, "", ""]))
    path.write_bytes(text.encode(encoding))
    found = read_table(path)
    assert list(found) == ["sequence", "target_row"]
    assert found["sequence"].tolist() == ["Zoë", "山"]
    assert found["target_row"].astype(int).tolist() == [7, 12]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_first_line_of_csv_tells_its_separator(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "edges.csv"
    path.write_text(f'parent{mark} child{mark}\n"a{mark}b"{mark}"say ""c""\nnow"{mark}\n')
    assert read_table(path).to_dict("list") == {"parent": [f"a{mark}b"], "child": ['say "c"\nnow']}
    path.write_text(f"sep={mark}\nx{mark}y\n1{mark}2\n")
    assert read_table(path).to_dict("list") == {"x": ["1"], "y": ["2"]}
    assert list(read_table(path, ["y", "z"])) == ["y"]


def test_tabs_separate_without_quoting(tmp_path: Path) -> None:
    cells = ['"open', 'a "b" c', '"', "", '"whole"', "it's; x, y"]
    path = tmp_path / "nodes.TSV"
    path.write_text("node\ttext\n" + "".join(f"n{n}\t{cell}\n" for n, cell in enumerate(cells)))
    assert read_table(path)["text"].tolist() == cells


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n3\n", "line 3: has 1 fields, not 2 as the first line"),
        ("a.csv", 'x,y\n1,"2\n3,4\n', "line 2: not readable as CSV"),
        ("a.csv", 'x,y\n1,2\n3,"a" b\n', "line 3: not readable as CSV"),
        ("a.csv", "x,y,x\n1,2,3\n", "has two columns 'x'; give one"),
        ("a.csv", "\n\n", "is empty; its first line must name the columns"),
        ("a.tsv", "x\ty\n1\t2\t3\n", "line 2: has 3 fields"),
        ("a.jsonl", '{"x": 1}\n\n{"x": \n', "line 3: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: is no JSON object"),
        ("a.xls", "x", "is no .csv, .tsv, .jsonl, .parquet file"),
        ("a.parquet", "PAR1", "not a readable parquet file"),
        ("a.csv", "x\n1\n2\n3\n4\n", "has more than 3 rows"),
        ("a.jsonl", '{"x": [1, 2, 3]}\n{"x": [4, 5]}\n', "lists hold more than 4 values"),
    ],
)
def test_a_broken_table_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path, max_rows=3, max_values=4)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait")
    for read in (read_text, lambda p: list(read_lines(p)), lambda p: list(read_json_lines(p))):
        with pytest.raises(ValueError, match="not UTF-8 or UTF-16 text; convert it"):
            read(path)
    path.write_text("a long line")
    with pytest.raises(ValueError, match="a line of more than 5 characters"):
        list(read_lines(path, 5))


KINDS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_arrow_text_is_text(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array(["é", None, "山", "é"]).cast(kind)
    pq.write_table(pa.table({"lane": column}), tmp_path / "a.parquet")
    found = read_table(tmp_path / "a.parquet")["lane"]
    assert [None if pd.isna(one) else one for one in found] == ["é", None, "山", "é"]


LISTS = [
    *(pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)),
    *(pa.list_view(pa.int16()), pa.large_list_view(pa.uint8())),
]


@pytest.mark.parametrize("kind", LISTS, ids=map(str, LISTS))
def test_every_arrow_list_is_a_list(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([[1, 2], [3, 4]], kind)}), tmp_path / "a.PARQUET")
    assert [list(one) for one in read_table(tmp_path / "a.PARQUET")["x"]] == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="its lists hold more than 3 values"):
        read_table(tmp_path / "a.PARQUET", max_values=3)


def test_numbers_stay_numbers_beside_nulls(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([2**60, None]),
        "coded": pa.array([5, None]).dictionary_encode(),
        "huge": pa.array([2**64 - 1, 0], pa.uint64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = read_table(tmp_path / "a.parquet")
    assert found["id"].tolist() == [2**60, None] and found["coded"].tolist() == [5, None]
    assert found["huge"].tolist() == [2**64 - 1, 0]


def test_a_number_and_its_text_are_one_name() -> None:
    assert {name_text(value) for value in (1001, 1001.0, "1001", pd.Series([1001])[0])} == {"1001"}
    assert name_text(1.5) == "1.5" and name_text("e\u0301") == "é"


def test_suffixes_in_any_case() -> None:
    names = ["A.TXT", "b.markdown", "c.Text", "d.HTM", "e.NDJSON", "f.tab", "g"]
    expected = [".txt", ".md", ".txt", ".html", ".jsonl", ".tsv", ""]
    assert [kind_of(name) for name in names] == expected


def test_a_damaged_footer_of_parquet_never_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"row": [5, 5, 600], "context": [[2, 3, 4], [700], [1, 2]]})
    pq.write_table(table, path)
    raw = path.read_bytes()
    footer = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    refused = 0
    for place in range(footer, len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x70]) + raw[place + 1 :])
        try:
            read_table(path, max_values=100)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused > (len(raw) - footer) / 2
