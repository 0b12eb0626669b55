"""Query logs: what is read, what is asked, what is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.shadow import query_log
from lvm.shadow.query_log import log_queries, read_query_log
from lvm.windows.planning import ContextQueries, Queries

CTX = 7
GOOD = [
    {"sequence": "sequence-0", "target_row": 5},
    {"sequence": "sequence-2", "target_row": 600},
]
RECORDED = [
    {"target_row": 5, "context_rows": [2, 3, 4]},
    {"target_row": 5, "context_rows": [700]},
    {"target_row": 600, "context_rows": list(range(100))},
]


def write(path: Path, entries: list) -> Path:
    """Write the entries in the format that the file's name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    elif path.suffix == ".csv":
        pd.DataFrame(entries).to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pylist(entries), path)
    return path


def asked(path: Path, bank: Bank) -> Queries:
    return log_queries(read_query_log(path), bank, CTX)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_are_asked_from_the_rows_before_them(tmp_path, tiny_bank, suffix):
    queries = asked(write(tmp_path / f"log{suffix}", GOOD), tiny_bank)
    assert not isinstance(queries, ContextQueries)
    assert queries.target_row_Q.tolist() == [5, 600]
    assert queries.first_row_Q.tolist() == [0, 593]
    assert queries.sequence_start_Q.tolist() == [0, 480]
    assert queries.query_Q.tolist() == [0, 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_recorded_contexts_are_kept_as_they_were(tmp_path, tiny_bank, suffix):
    queries = asked(write(tmp_path / f"log{suffix}", RECORDED), tiny_bank)
    assert isinstance(queries, ContextQueries)
    contexts = [rows.tolist() for rows in queries.context_row_Q]
    assert contexts == [entry["context_rows"] for entry in RECORDED]
    assert queries.with_ctx(2) is queries and queries.ctx == 100
    read = queries.as_read(2)
    assert [rows.tolist() for rows in read.context_row_Q] == [rows[-2:] for rows in contexts]
    assert read.ctx == 2 and queries.as_read(500).ctx == 100
    turned = queries.take(np.array([2, 0]))
    assert [len(rows) for rows in turned.context_row_Q] == [100, 3]
    assert turned.query_Q.tolist() == [2, 0]


def test_contexts_of_one_length_stay_separate(tmp_path, tiny_bank):
    entries = [{"target_row": row, "context_rows": [row - 2, row - 1]} for row in (9, 11, 13)]
    queries = asked(write(tmp_path / "log.jsonl", entries), tiny_bank)
    assert queries.context_row_Q.shape == (3,)


BAD = {
    "a missing file": (None, "neither 'test' nor a .csv, .tsv, .jsonl, .parquet file"),
    "no query": ([], "is empty; a log needs at least one query"),
    "no target": ([{"sequence": "sequence-0"}], "has the columns sequence; it needs target_row"),
    "a target alone": ([{"target_row": 5}], "has the columns target_row; it needs"),
    "a fraction": ([{"sequence": "sequence-0", "target_row": 5.5}], "query 1: target_row is 5.5"),
    "true": ([{"sequence": "sequence-0", "target_row": True}], "query 1: target_row is True"),
    "null": ([GOOD[0], {"sequence": "x", "target_row": None}], "query 2: target_row is None"),
    "text": ([{"sequence": "sequence-0", "target_row": "5"}], "query 1: target_row is '5'"),
    "a row too far": ([{"sequence": "sequence-0", "target_row": 1440}], "rows are 0 ... 1439"),
    "a negative row": ([{"sequence": "sequence-0", "target_row": -1}], "row -1 is not a row"),
    "a row beyond int64": ([{"sequence": "sequence-0", "target_row": 10**30}], "is not a row of"),
    "another sequence": (
        [GOOD[1] | {"sequence": "sequence-1"}],
        "target_row 600 belongs to the sequence 'sequence-2', not to 'sequence-1'",
    ),
    "the first row of a sequence": (
        [{"sequence": "sequence-1", "target_row": 240}],
        "target_row 240 begins its sequence",
    ),
    "a row twice": ([*GOOD, GOOD[0]], "query 3: repeats query 1 (target_row 5)"),
    "a context twice": ([*RECORDED, RECORDED[1]], "query 4: repeats query 2"),
    "an empty context": ([{"target_row": 5, "context_rows": []}], "query 1: context_rows must be"),
    "no list": ([{"target_row": 5, "context_rows": 4}], "query 1: context_rows must be a list"),
    "words": ([{"target_row": 5, "context_rows": ["4"]}], "query 1: context_rows must be a list"),
    "context too far": ([{"target_row": 5, "context_rows": [4, 1440]}], "context row 1440"),
    "the answer": ([{"target_row": 5, "context_rows": [4, 5]}], "the context holds the answer"),
    "mixed lines": ([GOOD[0], RECORDED[0]], "query 2: sequence is None; it must be a name"),
    "no object": ([GOOD[0], 7], "line 2: is no JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_log_is_refused_in_one_line(case, tmp_path, tiny_bank):
    entries, reason = BAD[case]
    path = tmp_path / "log.jsonl"
    if entries is not None:
        write(path, entries)
    with pytest.raises(ValueError) as refused:
        asked(path, tiny_bank)
    message = str(refused.value)
    assert message.startswith("queries: ") and str(path) in message and "\n" not in message
    assert reason in message


@pytest.mark.parametrize("kind", [pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)])
def test_every_kind_of_parquet_list_is_read(kind, tmp_path, tiny_bank):
    contexts = pa.array([[2, 3], [7, 8]], kind)
    table = pa.table({"target_row": [5, 9], "context_rows": contexts})
    pq.write_table(table, tmp_path / "log.parquet")
    queries = asked(tmp_path / "log.parquet", tiny_bank)
    assert [rows.tolist() for rows in queries.context_row_Q] == [[2, 3], [7, 8]]


def test_a_line_nested_without_end_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_query_log(path)


def test_a_malformed_line_is_named(tmp_path):
    path = write(tmp_path / "log.jsonl", GOOD)
    path.write_text(path.read_text() + '{"target_row": \n')
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        read_query_log(path)


@pytest.mark.parametrize("name", ["log.parquet", "log.jsonl", "log.csv"])
def test_a_broken_file_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"PAR1\xff\xfe\x00 no such thing \xff\n\x00" * 9)
    with pytest.raises(ValueError) as refused:
        read_query_log(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_huge_log_is_refused_before_it_is_held(suffix, tmp_path, monkeypatch):
    path = write(tmp_path / f"log{suffix}", GOOD * 3)
    monkeypatch.setattr(query_log, "MAX_LOGGED", 5)
    with pytest.raises(ValueError, match="has more than 5 rows; give a part of it"):
        read_query_log(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_huge_contexts_are_refused(suffix, tmp_path, monkeypatch):
    path = write(tmp_path / f"log{suffix}", RECORDED)
    monkeypatch.setattr(query_log, "MAX_CONTEXT_ROWS", 103)
    with pytest.raises(ValueError, match="lists hold more than 103 values; give a part"):
        read_query_log(path)


def test_lists_that_are_none_are_refused_in_parquet(tmp_path):
    path = write(tmp_path / "log.parquet", [{"target_row": 5, "context_rows": 4}])
    with pytest.raises(
        ValueError, match="context_rows holds int64; it must hold lists of row numbers"
    ):
        read_query_log(path)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("target_row", pa.string(), "target_row holds string; it must hold whole numbers"),
        ("target_row", pa.list_(pa.int64()), "target_row holds list"),
        (
            "context_rows",
            pa.list_(pa.string()),
            "context_rows holds list.*; it must hold lists of row numbers",
        ),
        (
            "context_rows",
            pa.list_(pa.list_(pa.int64())),
            "context_rows holds list.*; it must hold lists of row numbers",
        ),
        ("sequence", pa.binary(2), "sequence holds fixed_size_binary.2.; it must hold names"),
    ],
)
def test_values_that_may_grow_are_refused_before_they_are_read(
    name, kind, reason, tmp_path, monkeypatch
):
    good = {"target_row": [5], "sequence": ["sequence-0"], "context_rows": [[3, 4]]}
    value = b"xx" if name == "sequence" else "x" if kind == pa.string() else []
    table = pa.table(good | {name: pa.array([value], kind)})
    pq.write_table(table, tmp_path / "log.parquet")
    read: list[object] = []
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *parts: read.append(parts))
    with pytest.raises(ValueError, match=reason):
        read_query_log(tmp_path / "log.parquet")
    assert not read


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            "target_row,sequence,target_row\n5,sequence-0,6\n",
            "has two columns 'target_row'; give one",
        ),
        ("target_row,sequence\n5,sequence-0,6\n", "line 2: has 3 fields, not 2"),
        ("target_row,sequence\n7,5,sequence-0\n8,6,sequence-0\n", "line 2: has 3 fields"),
        ("target_row,sequence\n5.0,sequence-0\n", "query 1: target_row is '5.0'"),
        ('target_row,sequence\n5,"sequence-0\n', "not readable as CSV"),
        ('target_row,sequence,context_rows\n5,sequence-0,"[3, 4]"\n', "a .csv file holds no lists"),
        ("context_rows,target_row\n[3],5\n", "a .csv file holds no lists; give JSONL or parquet"),
    ],
)
def test_a_csv_says_what_it_says(lines, reason, tmp_path, tiny_bank):
    path = tmp_path / "log.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=reason):
        asked(path, tiny_bank)


def test_a_name_is_text_in_every_line(tmp_path, tiny_bank):
    for name in (None, True, [], ["sequence-0"]):
        path = write(tmp_path / "log.jsonl", [GOOD[0], {"sequence": name, "target_row": 9}])
        with pytest.raises(ValueError, match="query 2: sequence is .*; it must be a name"):
            asked(path, tiny_bank)


def test_a_key_stands_once_in_a_line(tmp_path, tiny_bank):
    path = tmp_path / "log.jsonl"
    path.write_text('{"target_row": 5, "sequence": "sequence-0", "target_row": 6}\n')
    with pytest.raises(ValueError, match="line 1: not valid JSON .a key appears twice"):
        asked(path, tiny_bank)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".JSONL"])
def test_a_log_is_the_same_in_every_encoding(encoding, suffix, tmp_path, tiny_bank):
    path = tmp_path / f"log{suffix}"
    separator = "\t" if suffix == ".tsv" else ";"
    if suffix.lower() == ".jsonl":
        lines = list(map(json.dumps, GOOD))
    else:
        lines = [separator.join(map(str, row)) for row in (GOOD[0], *(g.values() for g in GOOD))]
    path.write_text("\r\n".join(lines), encoding, newline="")
    queries = asked(path, tiny_bank)
    assert queries.target_row_Q.tolist() == [5, 600]
    assert queries.first_row_Q.tolist() == [0, 593]


def test_a_log_without_its_columns_is_told_those_it_has(tmp_path, tiny_bank):
    path = tmp_path / "log.csv"
    path.write_text("sequence;row\nsequence-0;5\n")
    with pytest.raises(ValueError, match="log.csv: has the columns sequence, row; it needs targ"):
        asked(path, tiny_bank)


@pytest.fixture
def numbered_bank(tmp_path):
    """A bank whose sequences are called by numbers, as user ids are."""
    rows = {"sequence": [1001] * 6 + [1002] * 6}
    vectors = np.random.default_rng(0).standard_normal((12, 4))
    return write_bank(tmp_path / "bank", vectors, rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".tsv"])
@pytest.mark.parametrize("kind", [int, float, str])
def test_numbers_name_the_sequences_that_the_bank_calls_so(kind, suffix, tmp_path, numbered_bank):
    path = tmp_path / f"log{suffix}"
    frame = pd.DataFrame({"sequence": [kind(1001), kind(1002)], "target_row": [4, 9]})
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    if kind is float and suffix in (".csv", ".tsv"):
        with pytest.raises(ValueError, match="1001.0"):  # in a table of text it is another name
            asked(path, numbered_bank)
    else:
        assert asked(path, numbered_bank).target_row_Q.tolist() == [4, 9]
    frame.assign(target_row=[9, 4]).to_json(tmp_path / "wrong.jsonl", orient="records", lines=True)
    with pytest.raises(ValueError, match="query 1: .*1001"):
        asked(tmp_path / "wrong.jsonl", numbered_bank)
