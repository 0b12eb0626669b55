"""Bank folders whose parts are mutated: read as they are, or refused in a line."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from lvm.bank.bank import Bank, open_bank
from lvm.bank.files import CONTENTS, ROWS, VECTORS, file_sha256
from tests.faults.conftest import Tally
from tests.faults.fuzzing import (
    fuzz,
    is_name,
    mutated_bytes,
    mutated_tree,
    read_or_refused,
)
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    return make_bank(folder, num_sequences=2, num_documents=3, document_rows=4, dim=4, num_twins=1)


@pytest.fixture
def place(good: Bank, tmp_path: Path) -> Path:
    shutil.copytree(good.path, tmp_path / "bank")
    return tmp_path / "bank"


def contents_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONTENTS).read_text()))


def forge(folder: Path) -> None:
    """Record the hashes of the files as they are now."""
    contents = contents_of(folder)
    contents["files"] = {name: file_sha256(folder / name) for name in (VECTORS, ROWS)}
    (folder / CONTENTS).write_text(json.dumps(contents))


def texts_of(values: pd.Series) -> list[str]:
    return ["" if pd.isna(value) else str(value) for value in values]


def assert_whole(bank: Bank) -> None:
    """Assert that an opened bank is what its files say, read another way."""
    vectors = np.load(bank.path / VECTORS, allow_pickle=False)
    rows = pd.read_parquet(bank.path / ROWS)
    assert bank.vectors.shape == vectors.shape and len(rows) == len(vectors)
    assert np.array_equal(np.asarray(bank.vectors), vectors)
    assert np.isfinite(vectors.astype(np.float64)).all() and vectors.any(axis=1).all()
    assert [bank.sequences[code] for code in bank.sequence_N] == texts_of(rows["sequence"])
    assert len(set(bank.sequences)) == len(bank.sequences)
    assert (np.diff(bank.sequence_N) >= 0).all() and (np.diff(bank.document_N) >= 0).all()
    if "document" in rows:
        assert [bank.documents[code] for code in bank.document_N] == texts_of(rows["document"])
    if "lane" in rows and rows["lane"].dtype.kind not in "iuf":
        named = [bank.lanes[code] if code >= 0 else "" for code in bank.lane_N]
        assert named == texts_of(rows["lane"])
    assert all(map(is_name, (*bank.sequences, *bank.documents, *bank.lanes)))
    texts = bank.texts()
    assert texts is None or texts.tolist() == texts_of(rows["text"])


def contents_bytes(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    trees = mutated_tree(good).map(lambda tree: json.dumps(tree).encode())
    repeated = json.dumps(good)[:-1].encode() + b', "rows": 1}'
    raw = json.dumps(good, indent=1).encode()
    fixed = st.sampled_from([b"", b"[" * 100_000, repeated, b"{}", b"null", b"\xef\xbb\xbf" + raw])
    return st.one_of(trees, trees, mutated_bytes(raw), fixed)


def test_mutated_contents(good: Bank, place: Path, tally: Tally) -> None:
    before = contents_of(good.path)

    def check(raw: bytes) -> None:
        (place / CONTENTS).write_bytes(raw)
        bank = read_or_refused(lambda: open_bank(place, verify=True), str(place))
        if bank is None:
            return
        found = json.loads(raw)
        same = [k for k in ("format", "rows", "dim", "dtype", "files") if found[k] == before[k]]
        assert len(same) == 5 and type(found["rows"]) is type(found["dim"]) is int
        assert (bank.encoder, bank.created_by) == (found["encoder"], found["created_by"])
        assert bank.bases == tuple(found.get("bases", ()))
        assert_whole(bank)

    fuzz(tally, "bank.json", 1200, contents_bytes(before), check)


@pytest.mark.parametrize("name", [VECTORS, ROWS])
def test_a_mutated_file_differs_from_its_hash(
    name: str, good: Bank, place: Path, tally: Tally
) -> None:
    raw = (good.path / name).read_bytes()

    def check(changed: bytes) -> None:
        (place / name).write_bytes(changed)
        bank = read_or_refused(lambda: open_bank(place, verify=True), str(place))
        assert (bank is None) == (changed != raw)

    fuzz(tally, "bank files, hashes kept", 300, mutated_bytes(raw), check)


def npy(array: np.ndarray) -> bytes:
    opened = io.BytesIO()
    np.save(opened, array)
    return opened.getvalue()


def odd_arrays(vectors: np.ndarray) -> list[bytes]:
    """Return other arrays than the right one, in .npy or near it."""
    spoilt = [vectors.copy() for _ in range(4)]
    for one, value in zip(spoilt, (np.nan, np.inf, 0, 65504), strict=True):
        one[3] = value
    arrays = [*spoilt, vectors[:-1], vectors.T, np.asfortranarray(vectors), vectors[None]]
    arrays += [vectors.astype(kind) for kind in ("f8", "f4", ">f2", "i2", "?", "c8", "S4")]
    arrays += [np.zeros(0, np.float16), np.float16(1), vectors.view([("a", "f2"), ("b", "f2")])]
    header = npy(vectors)
    zipped = io.BytesIO()
    np.savez(zipped, vectors=vectors)
    shape = str(vectors.shape).encode()
    lies = [b"(10**12, 4)", b"(9" + b"9" * 20 + b", 4)", b"(-1, 4)", b"(" * 200, b"(True, 4)"]
    changed = [header.replace(shape, lie.ljust(len(shape))) for lie in lies]
    return [npy(array) for array in arrays] + [zipped.getvalue(), b"", b"\x80\x04N.", *changed]


def test_forged_vectors(good: Bank, place: Path, tally: Tally) -> None:
    raw = (good.path / VECTORS).read_bytes()

    def check(changed: bytes) -> None:
        (place / VECTORS).write_bytes(changed)
        forge(place)
        bank = read_or_refused(lambda: open_bank(place, verify=True), str(place))
        if bank is not None:
            assert_whole(bank)

    odd = st.sampled_from(odd_arrays(np.load(good.path / VECTORS)))
    inputs = st.one_of(mutated_bytes(raw, header=128), mutated_bytes(raw, header=128), odd)
    fuzz(tally, "vectors.npy, hashes forged", 1200, inputs, check)


def test_forged_rows(good: Bank, place: Path, tally: Tally) -> None:
    raw = (good.path / ROWS).read_bytes()
    plain = io.BytesIO()
    pq.write_table(pq.read_table(good.path / ROWS), plain, compression="none")

    def check(changed: bytes) -> None:
        (place / ROWS).write_bytes(changed)
        forge(place)
        bank = read_or_refused(lambda: open_bank(place, verify=True), str(place))
        if bank is not None:
            texts = read_or_refused(bank.texts, str(place))
            if texts is not None:
                assert_whole(bank)

    inputs = st.one_of(mutated_bytes(raw), mutated_bytes(plain.getvalue()))
    fuzz(tally, "rows.parquet, hashes forged", 1200, inputs, check)
