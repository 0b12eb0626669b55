"""A bank of many shards is read as the same bank in one file."""

import json

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import ShardWriter, open_bank
from lvm.bank.shards import Cut, Shards, are_stored
from lvm.corpus.ingest import ingest, row_names
from lvm.corpus.reading import SourceOptions
from lvm.system.seeding import generator

VECTORS = generator(0, "shards").standard_normal((50, 4)).astype(np.float32)
PARTS = Shards([VECTORS[:20], VECTORS[20:21], VECTORS[21:50]])


@pytest.mark.parametrize(
    "rows",
    [
        slice(3, 9),
        slice(19, 22),
        slice(0, 50),
        slice(40, 99),
        slice(20, 20),
        slice(0, 50, 7),
        slice(None, None, -1),
        7,
        -1,
        np.array([[49, 20], [0, 19]]),
        np.array([], dtype=np.int64),
        VECTORS[:, 0] > 0,
    ],
    ids=str,
)
def test_rows_are_those_of_one_array(rows):
    np.testing.assert_array_equal(np.asarray(PARTS[rows]), VECTORS[rows])
    assert PARTS.shape == VECTORS.shape and len(PARTS) == 50 and PARTS.nbytes == VECTORS.nbytes


def test_a_row_that_is_not_there_is_refused():
    with pytest.raises(IndexError):
        PARTS[50]


def test_a_stream_is_cut_where_asked():
    cut = Cut(iter([VECTORS[:30], VECTORS[30:35], VECTORS[35:]]))
    for start, stop in ((0, 10), (10, 33), (33, 50)):
        found = np.concatenate(list(cut.take(stop - start)))
        np.testing.assert_array_equal(found, VECTORS[start:stop])
    assert list(cut.take(3)) == []


def test_a_large_source_becomes_shards(tiny_bank, tmp_path):
    report = ingest(str(tiny_bank.path), "made", tmp_path / "bank", SourceOptions(table_rows=100))
    bank = open_bank(tmp_path / "bank", verify=True)
    assert isinstance(bank.vectors, Shards) and are_stored(bank.vectors)
    assert not are_stored(bank.vectors[::-1]) and report.rows == tiny_bank.num_rows
    np.testing.assert_array_equal(np.asarray(bank.vectors), tiny_bank.vectors)
    pd.testing.assert_frame_equal(row_names(bank), row_names(tiny_bank))
    assert ingest(
        str(tiny_bank.path), "made", tmp_path / "bank", SourceOptions(table_rows=100)
    ).reused


def test_texts_are_read_and_encoded_shard_by_shard(tmp_path):
    lanes = ["A" if number < 60 else "B" for number in range(70)]
    rows = [{"text": f"The number {n} is here.", "lane": lane} for n, lane in enumerate(lanes)]
    lines = [json.dumps(row) for row in [*rows, {"text": ""}]]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    source, banks = str(tmp_path / "texts.jsonl"), []
    for name, rows in (("whole", 1000), ("parts", 30)):
        report = ingest(source, None, tmp_path / name, SourceOptions(table_rows=rows))
        banks.append(open_bank(tmp_path / name, verify=True))
        assert (report.rows, report.rows_read) == (70, 71)
    whole, parts = banks
    np.testing.assert_array_equal(np.asarray(parts.vectors), whole.vectors)
    assert list(parts.texts()) == list(whole.texts()) and parts.lanes == whole.lanes
    np.testing.assert_array_equal(parts.lane_N, whole.lane_N)


@pytest.mark.parametrize("name", ["vectors-00001.npy", "rows-00001.parquet"])
def test_a_missing_shard_is_refused(tiny_bank, tmp_path, name):
    ingest(str(tiny_bank.path), "made", tmp_path / "bank", SourceOptions(table_rows=100))
    (tmp_path / "bank" / name).unlink()
    with pytest.raises(ValueError, match="missing|rows for"):
        open_bank(tmp_path / "bank")


def test_shards_of_another_source_are_deleted(tmp_path):
    old, new = (ShardWriter(tmp_path / "bank", "e", made, "float32", 10) for made in "ab")
    old.start()
    old.write(0, [VECTORS[:10]], pd.DataFrame({"sequence": ["one"] * 10}))
    assert old.finished(0) and not new.finished(0)
    new.start()
    assert not old.folder.exists() and new.folder.exists()
    with pytest.raises(ValueError, match="shard 0 is not there"):
        new.finish(1)
