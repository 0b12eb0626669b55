"""Zip bombs, links, paths, pipes in place of files: refused before they cost anything."""

import gzip
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from lvm.bank.bank import open_bank
from lvm.bank.files import CONTENTS, FREE_BYTES, ROWS, VECTORS
from lvm.chains.ontologies import read_edges, read_ontology
from lvm.corpus.reading import read_corpus
from lvm.models.baselines import MovingAverage
from lvm.models.weights import CONFIG, WEIGHTS, load_model, save_model
from lvm.shadow.query_log import read_query_log
from tests.faults.conftest import Tally
from tests.faults.fuzzing import in_memory, in_time, read_or_refused
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("shape", ["(1000000000000, 4)", "(-1, 4)", f"({2**62}, {2**62})", "()"])
def test_an_array_that_declares_too_much(shape: str, tmp_path: Path, tally: Tally) -> None:
    raw = header(shape) + bytes(64)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("vectors.npy", raw)
    (tmp_path / "x.npy").write_bytes(raw)
    bank = make_bank(tmp_path / "bank", num_sequences=1, num_twins=1)
    (bank.path / VECTORS).write_bytes(raw)
    for path in (tmp_path / "x.npz", bank.path):
        with tally.injecting("zip bombs"), in_time(), in_memory():
            assert read_or_refused(lambda p=path: open_bank(p), str(path)) is None


def test_zeros_that_inflate_to_gigabytes(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "bomb.npz"
    rows = 2**28  # of 4 float32: 4 GiB
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as member:
            member.write(header(f"({rows}, 4)"))
            block = bytes(2**24)
            for _ in range(rows * 16 // len(block)):
                member.write(block)
    assert path.stat().st_size * 100 < rows * 16 and rows * 16 > 10 * FREE_BYTES
    with tally.injecting("zip bombs"), in_time(), in_memory():
        assert read_or_refused(lambda: open_bank(path), "as zip bombs do") is None


def test_a_row_table_that_repeats_one_long_text(tmp_path: Path, tally: Tally) -> None:
    """A dictionary of one text of a megabyte, pointed at by every row: a gigabyte of names."""
    bank = make_bank(tmp_path / "bank", num_sequences=5, num_twins=1)
    place = pa.array(np.zeros(bank.num_rows, np.int32))
    table = pq.read_table(bank.path / ROWS)
    for name in ("document", "text"):
        repeated = pa.DictionaryArray.from_arrays(place, pa.array(["x" * 2**20]))
        table = table.drop_columns([name]).append_column(name, repeated)
    pq.write_table(table, bank.path / ROWS, store_schema=False)
    assert (bank.path / ROWS).stat().st_size < 2**24 and bank.num_rows > 1024
    with tally.injecting("zip bombs"), in_memory():
        opened = open_bank(bank.path)
        assert len(opened.documents) == 5 and len(opened.texts()[7]) == 2**20


@pytest.mark.parametrize(
    "name", ["../vectors.npy", "/etc/vectors.npy", "a/../../x.npy", "..", "a\\b.npy"]
)
def test_paths_in_an_archive(name: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "inner" / "x.npz"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        part = io.BytesIO()
        np.save(part, np.eye(4, dtype=np.float32))
        archive.writestr("vectors.npy", part.getvalue())
        archive.writestr(name, part.getvalue())
    with tally.injecting("paths in archives"):
        assert read_or_refused(lambda: open_bank(path), "a path") is None
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["inner", "x.npz"]


@pytest.mark.parametrize("name", [VECTORS, ROWS, CONTENTS])
@pytest.mark.parametrize("kind", ["link out", "pipe", "folder", "dangling"])
def test_what_is_no_file_of_a_bank(name: str, kind: str, tmp_path: Path, tally: Tally) -> None:
    bank = make_bank(tmp_path / "bank", num_sequences=1, num_twins=1)
    path = bank.path / name
    elsewhere = path.rename(tmp_path / name)
    if kind == "link out":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with tally.injecting("links, pipes"), in_time():
        assert read_or_refused(lambda: open_bank(bank.path), str(bank.path)) is None


def test_a_link_in_a_corpus_does_not_leave_it(tmp_path: Path, tally: Tally) -> None:
    (tmp_path / "secret.txt").write_text("This is a secret of seven plain words.")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").symlink_to(tmp_path / "secret.txt")
    with tally.injecting("links, pipes"):
        assert read_or_refused(lambda: read_corpus(str(corpus)), "link out") is None


def test_a_link_in_a_model_does_not_leave_it(tmp_path: Path, tally: Tally) -> None:
    folder = save_model(MovingAverage(16), tmp_path / "model")
    elsewhere = (folder / WEIGHTS).rename(tmp_path / WEIGHTS)
    (folder / WEIGHTS).symlink_to(elsewhere)
    with tally.injecting("links, pipes"):
        assert read_or_refused(lambda: load_model(folder), "link out") is None


def test_sizes_that_no_model_has(tmp_path: Path, tally: Tally) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    for sizes in ({"hidden": 10**7}, {"layers": 10**9}, {"layers": 900, "hidden": 65536}):
        config = {"model": "memory_gru", "dim": 4} | sizes | {"weights_sha256": digest}
        (folder / CONFIG).write_text(json.dumps(config))
        with tally.injecting("zip bombs"), in_time(), in_memory():
            assert read_or_refused(lambda: load_model(folder), str(folder)) is None


def test_an_edge_list_that_repeats_one_edge_too_often(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "edges.parquet"
    one = pa.array(["a"])
    place = pa.array(np.zeros(2**22, np.int8))
    block = pa.table(
        {name: pa.DictionaryArray.from_arrays(place, one) for name in ("parent", "child")}
    )
    with pq.ParquetWriter(path, block.schema) as writer:
        for _ in range(5):
            writer.write_table(block)
    assert path.stat().st_size < 2**20
    with tally.injecting("zip bombs"), in_time(), in_memory():
        assert read_or_refused(lambda: read_edges(path, "parent", "child"), str(path)) is None


@pytest.mark.parametrize("name", ["log.jsonl.gz", "log.csv.gz", "a.obo.gz", "a.txt.gz", "a.npz.gz"])
def test_nothing_is_unpacked_on_the_way(name: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(2**20)))
    readers = [read_query_log, read_ontology, lambda one: read_corpus(str(one)), open_bank]
    for reader in readers:
        with tally.injecting("zip bombs"), in_time(), in_memory():
            assert read_or_refused(lambda r=reader: r(path), str(path)) is None
