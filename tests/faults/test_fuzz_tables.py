"""Row tables or .npz files with odd columns: kept as they were given, or refused in a line."""

import datetime
import decimal
import io
import itertools
import numbers
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import strategies as st

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.bank.row_table import TMD_LANES, row_table
from tests.faults.conftest import Tally
from tests.faults.fuzzing import ODD, fuzz, is_name, mutated_bytes, read_or_refused

pytestmark = pytest.mark.faults

ROWS = 12
VECTORS = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)
COLUMNS = ("sequence", "document", "lane", "split", "text")
GOOD: dict[str, list[Any]] = {
    "sequence": ["a"] * 6 + ["b"] * 6,
    "document": ["x", "x", "y", "y", "z", "z"] * 2,
    "lane": ["law"] * 6 + ["art"] * 6,
    "split": ["train"] * 6 + [None] * 6,
    "text": [f"Sentence {row}." for row in range(ROWS)],
}
VALUES = [*ODD, b"bytes", 1j, decimal.Decimal("1.5"), datetime.date(2026, 1, 2), ("a",), 1, "1"]
VALUES += [pd.Timestamp("2026-01-02"), np.datetime64("NaT"), pd.NA, np.float32(2), "a", "b", "law"]
DTYPES = ["category", "string", "object", "bool", "float64", "Int64", "datetime64[ns]", "complex64"]


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """Return the good table with some columns odd: in values, in type, in number, in order."""
    columns = {name: list(values) for name, values in GOOD.items()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(COLUMNS))
        change = draw(st.sampled_from(["value", "value", "all", "drop", "shuffle", "numbers"]))
        if change == "value" and columns[name]:
            for row in draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=3)):
                columns[name][row] = draw(st.sampled_from(VALUES))
        elif change == "all":
            columns[name] = [draw(st.sampled_from(VALUES))] * ROWS
        elif change == "drop":
            columns[name] = []
        elif change == "shuffle":
            columns[name] = draw(st.permutations(columns[name])) if columns[name] else []
        else:
            columns[name] = draw(st.sampled_from([[0] * 6 + [1] * 6, [15] * ROWS, [-1.0] * ROWS]))
    whole = {name: values for name, values in columns.items() if len(values) == ROWS}
    built = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in whole.items()})
    try:
        built = built.infer_objects()
    except UnicodeEncodeError:  # pandas has no text with halves of surrogate pairs
        pass
    if draw(st.integers(0, 3)) == 0 and len(built.columns):
        name = draw(st.sampled_from(list(built.columns)))
        try:
            built[name] = built[name].astype(draw(st.sampled_from(DTYPES)))
        except (TypeError, ValueError, OverflowError):
            pass
    if draw(st.integers(0, 20)) == 0 and len(built.columns):
        built = pd.concat([built, built.iloc[:, :1]], axis=1)
    return built if draw(st.integers(0, 30)) else built.iloc[:0]


def told(values: Any) -> list[str]:
    """Return values as text, "" for none."""
    return ["" if pd.isna(value) else str(value) for value in values]


def named(values: Any) -> list[str]:
    """Return values as names, "" for none: 1.0 is "1", and a name is composed Unicode."""
    whole = [int(one) if isinstance(one, float) and one % 1 == 0 else one for one in values]
    return [unicodedata.normalize("NFC", one) for one in told(whole)]


def assert_kept(given: pd.DataFrame, table: Any) -> None:
    """Assert that codes with their names say what the columns said."""
    sequences = named(given["sequence"])
    assert all(sequences) and [table.sequences[code] for code in table.sequence_N] == sequences
    runs = [name for name, _ in itertools.groupby(sequences)]
    assert len(runs) == len(set(runs)) and all(map(is_name, table.sequences))
    if "document" in given:
        assert [table.documents[code] for code in table.document_N] == named(given["document"])
    assert (table.lane_N is not None) == ("lane" in given)
    if "lane" in given:
        found = [table.lanes[code] if code >= 0 else "" for code in table.lane_N]
        wanted = named(given["lane"])
        if all(isinstance(one, numbers.Number) for one in given["lane"].dropna()) and any(wanted):
            codes = [float(value) if value else -1.0 for value in wanted]
            wanted = ["" if code < 0 else TMD_LANES[int(code)] for code in codes]
        assert found == wanted
    pinned = named(given["split"]) if "split" in given else [""] * len(given)
    assert [("train" if pin else "") for pin in table.pinned_N] == pinned


def test_odd_row_tables_in_memory(tally: Tally) -> None:
    def check(given: pd.DataFrame) -> None:
        table = read_or_refused(lambda: row_table(given, "rows of x"), "rows of x")
        if table is not None:
            assert_kept(given, table)

    fuzz(tally, "row tables", 2000, frames(), check)


def test_odd_row_tables_written_as_banks(tmp_path: Path, tally: Tally) -> None:
    number = itertools.count()

    def check(given: pd.DataFrame) -> None:
        path = tmp_path / f"bank{next(number)}"
        written = read_or_refused(
            lambda: write_bank(path, VECTORS, given, "e", "test", "float32"), "rows", str(path)
        )
        assert (written is None) == (not path.exists())
        assert len(list(tmp_path.glob(".bank*"))) == 0
        if written is not None:
            if "sequence" not in given and "document" in given:
                given = given.rename(columns={"document": "sequence"})
            elif "sequence" not in given:
                given = given.assign(sequence=path.name)
            assert_kept(given, written)
            assert np.array_equal(np.asarray(written.vectors), VECTORS)
            if "text" in given:
                assert written.texts().tolist() == told(given["text"])

    fuzz(tally, "row tables written", 700, frames(), check)


def odd_members() -> dict[str, list[np.ndarray]]:
    names = np.array(["a"] * 6 + ["b"] * 6)
    codes = [
        np.arange(ROWS) // 6,
        np.zeros(ROWS, bool),
        np.zeros(ROWS, "c8"),
        np.zeros(ROWS, "M8[s]"),
    ]
    codes += [
        np.zeros(ROWS, "V4"),
        np.full(ROWS, np.nan),
        np.zeros(ROWS, "u8"),
        np.zeros((ROWS, 2)),
    ]
    codes += [
        np.arange(ROWS) % 2,
        np.full(ROWS, 2**63, "u8"),
        np.full(ROWS, -5),
        np.zeros(3, int),
    ]
    texts = [names, names.astype("S1"), names.astype(object), np.full(ROWS, ""), names[::-1]]
    texts += [
        np.full(ROWS, "\x1b[2J"),
        np.full(ROWS, "\ud800"),
        np.full(ROWS, "a\nb"),
        np.array("a"),
    ]
    texts.append(np.frombuffer(b"\xff\xff\xff\x7f" * ROWS, "<U1"))
    spoilt = [VECTORS.copy() for _ in range(3)]
    for one, value in zip(spoilt, (np.nan, np.inf, 0), strict=True):
        one[3] = value
    vectors = [
        VECTORS,
        VECTORS.astype("f2"),
        VECTORS.astype("f8"),
        VECTORS.T,
        VECTORS[:5],
        VECTORS[0],
    ]
    vectors += [*spoilt, VECTORS.astype(">f4"), np.asfortranarray(VECTORS), VECTORS.astype(object)]
    both = [*codes, *texts]
    return {"vectors": vectors, "chain_ids": both, "tmd_lanes": both, "concept_texts": both}


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Return an .npz with odd arrays, names, methods, some with a few bytes changed."""
    opened = io.BytesIO()
    method = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]))
    with zipfile.ZipFile(opened, "w", method) as archive:
        for name, choices in MEMBERS.items():
            if draw(st.integers(0, 4)) == 0 and name != "vectors":
                continue
            good = draw(st.integers(0, 2)) > 0
            array = choices[0] if good else draw(st.sampled_from(choices))
            part = io.BytesIO()
            np.save(part, array)
            archive.writestr(f"{name}.npy", part.getvalue())
        if draw(st.integers(0, 9)) == 0:
            names = [
                "../vectors.npy",
                "/etc/x.npy",
                "a\\b.npy",
                "vectors",
                "x" * 60_000,
                "\x1b.npy",
            ]
            archive.writestr(draw(st.sampled_from(names)), b"x")
    raw = opened.getvalue()
    return draw(mutated_bytes(raw)) if draw(st.integers(0, 3)) == 0 else raw


MEMBERS = odd_members()


def assert_archive_kept(path: Path, bank: Bank) -> None:
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in MEMBERS if name in archive.files}
    assert np.array_equal(np.asarray(bank.vectors), arrays["vectors"])
    given = pd.DataFrame({"sequence": [path.stem] * bank.num_rows})
    for name, column in (("chain_ids", "sequence"), ("tmd_lanes", "lane")):
        if name in arrays:
            given[column] = arrays[name]
    assert_kept(given, bank)
    if "concept_texts" in arrays:
        assert bank.texts().tolist() == arrays["concept_texts"].tolist()


def test_odd_archives(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "odd.npz"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        bank = read_or_refused(lambda: open_bank(path), str(path))
        if bank is not None:
            assert_archive_kept(path, bank)

    fuzz(tally, ".npz", 1500, archives(), check)
