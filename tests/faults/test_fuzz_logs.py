"""Query logs that are mutated: asked as they say, or refused in a line."""

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from lvm.bank.bank import Bank
from lvm.bank.tables import name_text
from lvm.shadow.query_log import log_queries, read_query_log
from tests.faults.conftest import Tally
from tests.faults.fuzzing import (
    ODD,
    fuzz,
    mutated_bytes,
    mutated_lines,
    mutated_tree,
    read_or_refused,
)

pytestmark = pytest.mark.faults

CTX = 7
NAMED = [
    {"sequence": "sequence-0", "target_row": 5},
    {"sequence": "sequence-2", "target_row": 600},
    {"sequence": "sequence-0", "target_row": 9},
]
RECORDED = [
    {"target_row": 5, "context_rows": [2, 3, 4]},
    {"target_row": 5, "context_rows": [700]},
    {"target_row": 600, "context_rows": [1, 2, 3, 9, 0]},
]


def utf_of(raw: bytes) -> str:
    """Return the encoding that the byte order mark tells, else UTF-8."""
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_wide else "utf-8-sig"


def assert_asked(path: Path, bank: Bank, entries: list[dict[str, Any]]) -> None:
    """Assert that what is read, then asked, is what `entries` say."""
    log = read_or_refused(lambda: read_query_log(path), str(path))
    if log is None:
        return
    assert [int(row) for row in log.target_row_Q] == [
        row if abs(row) < 2**62 else -1 for row in (entry["target_row"] for entry in entries)
    ]
    assert all(type(entry["target_row"]) is int for entry in entries)
    if log.sequence_Q is not None:
        assert log.sequence_Q == [name_text(entry["sequence"]) for entry in entries]
    if log.contexts is not None:
        assert [one.tolist() for one in log.contexts] == [
            [row if abs(row) < 2**62 else -1 for row in entry["context_rows"]] for entry in entries
        ]
    queries = read_or_refused(lambda: log_queries(log, bank, CTX), str(path))
    if queries is None:
        return
    assert queries.target_row_Q.tolist() == [entry["target_row"] for entry in entries]
    assert ((queries.target_row_Q >= 0) & (queries.target_row_Q < bank.num_rows)).all()
    for place, entry in enumerate(entries):
        if log.sequence_Q is not None:
            own = bank.sequences[bank.sequence_N[entry["target_row"]]]
            assert own == name_text(entry["sequence"])
        if log.contexts is not None:
            rows = queries.context_row_Q[place].tolist()
            assert rows == entry["context_rows"] and entry["target_row"] not in rows


def jsonl(entries: Any) -> bytes:
    lines = entries if isinstance(entries, list) else [entries]
    return "".join(json.dumps(entry) + "\n" for entry in lines).encode()


def test_mutated_jsonl(tiny_bank: Bank, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "log.jsonl"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            text = raw.decode(utf_of(raw))
            entries = [json.loads(line) for line in io.StringIO(text) if line.strip()]
        except (ValueError, RecursionError):
            entries = []
        assert_asked(path, tiny_bank, entries)

    repeated = b'{"target_row": 5, "target_row": 6, "sequence": "sequence-0"}\n'
    fixed = st.sampled_from([b"", b"\n", b"[" * 100_000, b"\xff", repeated, b"NaN\n", b"1" * 5000])
    trees = st.one_of(mutated_tree(NAMED), mutated_tree(RECORDED)).map(jsonl)
    raw = st.one_of(mutated_bytes(jsonl(NAMED)), mutated_bytes(jsonl(RECORDED)))
    fuzz(tally, "query logs, JSONL", 1200, st.one_of(trees, trees, raw, fixed), check)


def csv_of(entries: Any) -> str:
    return pd.DataFrame(entries).to_csv(index=False)


ODD_LINES = ["sequence-0,5,6", "sequence-0", ",", '"', "sequence-0,1e3", "sequence-0,0x5", "é,5"]
ODD_LINES += [
    "sequence-0,5.0",
    "sequence-0, 11",
    "sequence-0,true",
    "sequence-0," + "9" * 30,
    "NA,3",
]


def test_mutated_csv(tiny_bank: Bank, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "log.csv"
    good = csv_of(NAMED)

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            lines = raw.decode(utf_of(raw)).lstrip("\r\n")
            entries = list(csv.DictReader(io.StringIO(lines, newline="")))
        except (ValueError, csv.Error):
            entries = []
        numbered = []
        for entry in entries:
            try:
                numbered.append(entry | {"target_row": int(entry.get("target_row") or "")})
            except ValueError:
                continue
        assert_asked(path, tiny_bank, numbered)

    texts = mutated_lines(good, ODD_LINES).map(lambda text: text.encode("utf-8", "surrogatepass"))
    fixed = [b"", b"\n", b"target_row,sequence,target_row\n5,sequence-0,6\n", b"\x00"]
    inputs = st.one_of(texts, texts, mutated_bytes(good.encode()), st.sampled_from(fixed))
    fuzz(tally, "query logs, csv", 800, inputs, check)


@st.composite
def parquet(draw: st.DrawFn) -> bytes:
    """Return a parquet file with columns of odd types, or with bytes changed."""
    entries = draw(st.sampled_from([NAMED, RECORDED]))
    columns: dict[str, Any] = {
        name: [entry[name] for entry in entries]  # type: ignore[index]
        for name in entries[0]
    }
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(list(columns)))
        columns[name][draw(st.integers(0, 2))] = draw(
            st.sampled_from([*ODD, [[3]], [None, 4], b"x"])
        )
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
    except (pa.ArrowException, UnicodeError, OverflowError):
        arrays = {name: pa.array([e[name] for e in entries]) for name in entries[0]}  # type: ignore[index]
    name = draw(st.sampled_from(list(arrays)))
    kind = draw(
        st.sampled_from([None, pa.int8(), pa.uint64(), pa.float64(), pa.string(), pa.binary()])
    )
    if kind is not None:
        try:
            arrays[name] = arrays[name].cast(kind)
        except pa.ArrowException:
            pass
    if draw(st.integers(0, 5)) == 0:
        arrays["target_row"] = arrays["target_row"].dictionary_encode()
    table = pa.table(arrays)
    if draw(st.integers(0, 9)) == 0:
        table = table.append_column("target_row", table["target_row"])
    opened = io.BytesIO()
    pq.write_table(table, opened, compression=draw(st.sampled_from(["none", "snappy"])))
    raw = opened.getvalue()
    return draw(mutated_bytes(raw)) if draw(st.booleans()) else raw


def test_mutated_parquet(tiny_bank: Bank, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "log.parquet"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            entries = pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError):
            entries = []
        assert_asked(path, tiny_bank, entries)

    fuzz(tally, "query logs, parquet", 1000, parquet(), check)


def test_a_long_name_is_not_echoed(tiny_bank: Bank, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "log.jsonl"
    entries = [{"sequence": "x" * 10_000_000, "target_row": 5}]
    with tally.injecting("a name of 10 MB"):
        path.write_bytes(jsonl(entries))
        assert_asked(path, tiny_bank, entries)
        log = read_query_log(path)
        assert np.array_equal(log.target_row_Q, [5])
        assert read_or_refused(lambda: log_queries(log, tiny_bank, CTX), str(path)) is None
