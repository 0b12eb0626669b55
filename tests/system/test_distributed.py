"""Commands that two processes of a real torchrun share, against one process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lvm.bank.bank import open_bank
from lvm.system.distributed import World, share
from tests.conftest import copy_store
from tests.synthetic import make_bank

ROOT = Path(__file__).parents[2]
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
SECONDS = 400
TIMED = re.compile("latency|seconds|_ms$|_at$|run_id|experiment")
pytestmark = [pytest.mark.slow, pytest.mark.battery]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return make_bank(folder / "bank", num_sequences=6, num_documents=30, document_rows=11).path


def run(folder: Path, *words: str, shared: bool = True) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, *(TORCHRUN if shared else []), "-m", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )


def done(folder: Path, *words: str, shared: bool = True) -> str:
    found = run(folder, *words, shared=shared)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_shards_survive_a_kill_and_are_read_as_one_bank(source, tmp_path):
    work = ["tests.system.shared_work", "ingest", str(source)]
    done(tmp_path, *work, "alone", shared=False)
    killed = run(tmp_path, *work, "bank", "die")
    assert killed.returncode != 0 and not (tmp_path / "bank").exists()
    lines = [line for line in killed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "lost another rank" in lines[0]
    (left,) = tmp_path.glob(".bank.shards-*")
    kept = {path.name: path.stat().st_mtime_ns for path in left.glob("vectors-*")}
    assert {"vectors-00000.npy", "vectors-00001.npy"} <= kept.keys()
    done(tmp_path, *work, "bank")
    bank, alone, whole = (open_bank(p) for p in (tmp_path / "bank", tmp_path / "alone", source))
    assert bank.sha256 == alone.sha256 and bank.vectors.shape == whole.vectors.shape
    first = bank.path / "vectors-00000.npy"
    assert first.stat().st_mtime_ns == kept[first.name]
    np.testing.assert_array_equal(np.asarray(bank.vectors), np.asarray(whole.vectors))
    assert bank.documents == whole.documents and not list(tmp_path.glob(".bank.shards-*"))


def test_predictions_ranks_and_corrections_are_equal_to_the_bit(source, tmp_path):
    for kind, shared in (("two", True), ("one", False)):
        arguments = ("validate", str(source), f"{kind}.json")
        done(tmp_path, "tests.system.shared_work", *arguments, shared=shared)
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--model", "ridge", "--ctx", "20"],
        ["lane-diagnostics", "--model", "ridge", "--ctx", "20"],
        ["shadow-eval", "--ctx", "20"],
    ],
    ids=lambda words: words[0],
)
def test_reports_are_equal_but_for_times(source, tmp_path, empty_store, words, monkeypatch):
    reports = []
    for shared in (True, False):
        folder = tmp_path / str(shared)
        folder.mkdir()
        shutil.copytree(source, folder / "bank")
        copy_store(empty_store, folder / "store", monkeypatch)
        entry = f"entrypoints.{words[0].replace('-', '_')}"
        done(folder, entry, *words[1:], "--bank", "bank", "--report", "r.json", shared=shared)
        reports.append(untimed(json.loads((folder / "r.json").read_text())))
    assert reports[0] == reports[1]


def untimed(report):
    """Return a report without the values that differ from run to run."""
    if isinstance(report, dict):
        return {k: untimed(v) for k, v in report.items() if not TIMED.search(k)}
    return [untimed(one) for one in report] if isinstance(report, list) else report


class Named:
    def run(self, rank: int, size: int) -> tuple[int, int]:
        return rank, size


def test_a_process_alone_runs_every_part():
    assert share(Named()) == [(0, 1)]
    with World().assisted() as leads:
        assert leads and share(Named()) == [(0, 1)]
