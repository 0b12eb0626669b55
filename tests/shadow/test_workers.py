"""Candidates measured in processes of their own: the same ranks, no harm to one another."""

import dataclasses
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import evaluate_reranking, evaluate_together
from lvm.models.baselines import CopyLast, MovingAverage, Ridge
from lvm.models.facts import FREE, Facts, facts_of
from lvm.models.weights import save_model
from lvm.retrieval.rerank import LANE, fit_reranker, stage_inputs
from lvm.shadow.comparison import reranked_outcomes
from lvm.shadow.replay import (
    MEASURED_NOW,
    READ_BACK,
    Candidate,
    Job,
    MeasurementFailed,
    Questions,
    measure_here,
    replay,
    write_measurement,
)
from lvm.shadow.workers import Host, Replayer, error_writer, finish, write_job
from lvm.windows.export import plan_windows
from lvm.windows.planning import Queries, Windows, context_queries
from tests.retrieval.test_rerank import lane_bank
from tests.synthetic import telling_bank

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def asked(bank: Bank, windows: Windows, queries: Queries, candidate: Candidate) -> Questions:
    """Return what a replay of these queries asks the candidate."""
    questions = Questions(bank, windows.representative_N, queries, queries)
    return questions.read_by(candidate.facts.ctx)


class Unknown(nn.Module):
    """A model that no process can build from its configuration."""

    config = {"model": "banana", "dim": 16}


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 20)


@pytest.fixture(scope="module")
def queries(windows: Windows) -> Queries:
    return windows.queries["test"].head(60)


@pytest.fixture(scope="module")
def facts(tiny_bank: Bank, windows: Windows) -> Facts:
    return dataclasses.replace(facts_of("ema", "none", tiny_bank, windows), kind=FREE)


@pytest.fixture(scope="module")
def ema(tiny_bank: Bank, windows: Windows) -> Candidate:
    return free_average(tiny_bank, windows)


def free_average(bank: Bank, windows: Windows) -> Candidate:
    random = np.random.default_rng(0)
    correction = np.stack([np.ones(bank.num_rows), random.normal(0, 0.1, bank.num_rows)])
    facts = dataclasses.replace(facts_of("ema", "none", bank, windows), kind=FREE)
    model = MovingAverage(16, 0.5)
    return Candidate("ema", model, facts, row_correction=correction.T.astype(np.float32))


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    shared = Host()
    yield shared
    shared.close()


@pytest.fixture
def replayer(tmp_path: Path, notes: list[str], host: Host) -> Replayer:
    return Replayer(tmp_path / "store", notes.append, host=host)


@pytest.fixture
def stuck(tiny_bank: Bank, windows: Windows, queries: Queries, ema: Candidate, tmp_path) -> Job:
    """A job whose process waits until somebody writes to its `job.pickle`."""
    (tmp_path / "job").mkdir()
    questions = asked(tiny_bank, windows, queries, ema)
    job = write_job(tmp_path / "job", ema, questions, tmp_path / "store")
    (job.folder / "job.pickle").unlink()
    os.mkfifo(job.folder / "job.pickle")
    return job


def test_lanes_are_asked_for_apart_and_kept_apart(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = lane_bank(tmp_path / "bank", informative=True)
    windows = plan_windows(bank, 20)
    queries = windows.queries["test"].head(60)
    ema = free_average(bank, windows)
    by_lane = functools.partial(stage_inputs, LANE, bank, windows)
    plain = Replayer(tmp_path / "store", lambda note: None, host=host)
    lanes = Replayer(tmp_path / "store", lambda note: None, open_stage=by_lane, host=host)
    without = plain(ema, asked(bank, windows, queries, ema))
    found = lanes(ema, asked(bank, windows, queries, ema))
    assert without.ranks["rank_reranked"].isna().all() and found.origin == MEASURED_NOW
    correction = ema.row_correction
    here = fit_reranker(ema.model, bank, windows, correction).weights[LANE]["plain"]
    (own,) = evaluate_together({"ema": ema.model}, bank, windows, queries)
    ranked = own.per_query.assign(rank_corrected=without.ranks["rank_corrected"])
    own = dataclasses.replace(own, row_correction=correction, per_query=ranked)
    _, expected = evaluate_reranking(ema.model, bank, windows, queries, own)
    assert here.beta > 0
    for order in ("rank_reranked", "rank_corrected_reranked"):
        assert found.ranks[order].tolist() == expected[order].tolist()
    same = ["rank", "rank_raw", "rank_corrected", "top_row"]
    pd.testing.assert_frame_equal(found.ranks[same], without.ranks[same])
    shorter = dataclasses.replace(ema, facts=dataclasses.replace(ema.facts, ctx=3))
    own = lanes(shorter, asked(bank, windows, queries, shorter)).ranks
    short_windows = dataclasses.replace(windows, ctx=3)
    there = stage_inputs(LANE, bank, short_windows, queries.with_ctx(3))
    here = by_lane(queries.with_ctx(3))
    assert here.val.ctx == 3 and here.val_removed.ctx == 20
    assert np.array_equal(here.asked.log_p_QL, there.asked.log_p_QL)
    assert own["rank_reranked"].tolist() != found.ranks["rank_reranked"].tolist()
    result = replay([ema], bank, windows, queries, measure=lanes)
    (one,) = reranked_outcomes(result, bank)
    hits = (expected["rank_corrected_reranked"] <= 5).mean()
    assert one.figures["hit_at_5"] == pytest.approx(hits) and one.lead is None
    assert one.change.mean == pytest.approx(hits - (found.ranks["rank_corrected"] <= 5).mean())
    assert result.outcomes[0].served["hit_at_5"] == pytest.approx(hits)


@pytest.mark.parametrize("rerank", ["lexical", "hybrid"])
def test_a_process_orders_by_words_as_an_evaluation_does(host, tmp_path, monkeypatch, rerank):
    monkeypatch.chdir(tmp_path)
    bank = telling_bank(tmp_path / "bank")
    windows = plan_windows(bank, 20)
    queries = windows.queries["test"].head(60)
    ema = free_average(bank, windows)
    open_stage = functools.partial(stage_inputs, rerank, bank, windows)
    staged = Replayer(tmp_path / "store", lambda note: None, open_stage=open_stage, host=host)
    found = staged(ema, asked(bank, windows, queries, ema))
    (own,) = evaluate_together({"ema": ema.model}, bank, windows, queries)
    ranked = own.per_query.assign(rank_corrected=found.ranks["rank_corrected"])
    own = dataclasses.replace(own, row_correction=ema.row_correction, per_query=ranked)
    report, expected = evaluate_reranking(ema.model, bank, windows, queries, own, rerank)
    assert report["plain"]["gamma"] > 0
    for order in ("rank_reranked", "rank_corrected_reranked"):
        assert found.ranks[order].tolist() == expected[order].tolist()


def test_a_process_ranks_as_this_one_does_and_is_read_back(
    tiny_bank, windows, queries, ema, replayer, notes
):
    here = measure_here(ema, asked(tiny_bank, windows, queries, ema))
    apart = replayer(ema, asked(tiny_bank, windows, queries, ema))
    pd.testing.assert_frame_equal(apart.ranks, here.ranks)
    assert apart.origin == MEASURED_NOW and apart.latency_ms["p95"] > 0
    again = replayer(ema, asked(tiny_bank, windows, queries, ema))
    pd.testing.assert_frame_equal(again.ranks, here.ranks)
    assert (again.origin, again.latency_ms) == (READ_BACK, apart.latency_ms)
    assert "measured in" in notes[0] and "read from the store" in notes[1]
    stored = next(replayer.store.rglob("*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-40])
    assert replayer(ema, asked(tiny_bank, windows, queries, ema)).origin == MEASURED_NOW
    assert replayer(ema, asked(tiny_bank, windows, queries, ema)).origin == READ_BACK


def test_recorded_contexts_survive_the_way_to_the_process(tiny_bank, windows, ema, replayer):
    contexts = [np.array([4, 3, 3]), np.array([700]), np.array([8, 9, 10])]
    target_row_Q = np.array([20, 21, 22])
    recorded = context_queries(target_row_Q, np.zeros(3, np.int64), contexts)
    apart = replayer(ema, asked(tiny_bank, windows, recorded, ema))
    here = measure_here(ema, asked(tiny_bank, windows, recorded, ema))
    pd.testing.assert_frame_equal(apart.ranks, here.ranks)


@pytest.mark.parametrize(
    "changed",
    ["configuration", "weights", "correction", "bank", "queries", "groups", "ctx", "removed"]
    + ["torch", "machine"],
)
def test_whatever_a_measurement_depends_on_changes_its_key(
    changed, tiny_bank, windows, queries, ema, tmp_path, monkeypatch
):
    other_windows, other_queries, other, other_bank = windows, queries, ema, tiny_bank
    ridge = Ridge(16)
    if changed == "configuration":
        other = dataclasses.replace(ema, model=MovingAverage(16, 0.6))
    elif changed == "weights":
        ema, other = (dataclasses.replace(ema, model=one) for one in (ridge, Ridge(16)))
        ridge.weight[0, 0] = 1
    elif changed == "bank":
        other_bank = dataclasses.replace(tiny_bank, sha256="0" * 64)
    elif changed == "correction":
        other = dataclasses.replace(ema, row_correction=None)
    elif changed == "queries":
        other_queries = queries.head(59)
    elif changed == "groups":
        alone_N = np.arange(tiny_bank.num_rows)
        other_windows = dataclasses.replace(windows, representative_N=alone_N)
    elif changed == "ctx":
        other = dataclasses.replace(ema, facts=dataclasses.replace(ema.facts, ctx=10))
    elif changed == "removed":
        other_queries = queries.with_ctx(40)
    folders = [tmp_path / name for name in ("first", "again", "second")]
    for folder in folders:
        folder.mkdir()
    first = asked(tiny_bank, windows, queries, ema)
    keys = [write_job(folder, ema, first, tmp_path / "store").key for folder in folders[:2]]
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "1.0")
    elif changed == "machine":
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
    second = asked(other_bank, other_windows, other_queries, other)
    job = write_job(folders[2], other, second, tmp_path / "store")
    assert keys[0] == keys[1] != job.key


def test_a_process_that_breaks_off_costs_only_its_own_candidate(
    tiny_bank, windows, queries, ema, facts, replayer, notes
):
    broken = Candidate("broken", Unknown(), facts)
    result = replay(
        [broken, ema], tiny_bank, windows, queries, measure=replayer, baseline_name="ema"
    )
    lost = result.outcome("broken")
    assert lost is not None and not lost.is_scored
    assert "exit code 1: ValueError: model: unknown 'banana'" in str(lost.failure)
    assert [one.name for one in result.outcomes if one.is_scored] == ["ema"]
    assert any("broken" in note and "exit code 1" in note for note in notes)


def once_it_reads(job: Job, act: Callable[[], None]) -> threading.Thread:
    """Call `act` when the process of a stuck job has come as far as reading."""

    def wait() -> None:
        with open(job.folder / "job.pickle", "wb"):
            act()

    waiting = threading.Thread(target=wait)
    waiting.start()
    return waiting


def kill_the_working(host: bool) -> None:
    """Kill the process of the job that is being done, or its host: it has a parent below us."""
    below = psutil.Process().children(recursive=True)
    (working,) = (process for process in below if process.ppid() != os.getpid())
    (working.parent() if host else working).kill()


def test_a_killed_process_is_told_with_its_signal(stuck, host):
    waiting = once_it_reads(stuck, lambda: kill_the_working(host=False))
    code = host.run(stuck.folder)
    waiting.join()
    with pytest.raises(MeasurementFailed, match="killed by SIGKILL, as happens when memory runs"):
        finish(code, stuck)
    assert not stuck.result.exists()


def test_a_disk_that_refuses_the_result_is_no_fault_of_the_candidate(stuck, tmp_path):
    job = dataclasses.replace(stuck, folder=tmp_path)
    (tmp_path / "error.txt").write_text("OSError: [Errno 28] No space left on device: '/data/it'")
    with pytest.raises(OSError, match="/data/it") as caught:
        finish(1, job)
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "error.txt").write_text("FileNotFoundError: [Errno 2] No such file: 'model'")
    with pytest.raises(MeasurementFailed, match="No such file"):
        finish(1, job)


def test_a_disk_that_refuses_even_the_message_is_told_by_the_exit_code(
    stuck, tmp_path, monkeypatch
):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    error_writer(tmp_path / "gone")(ValueError, ValueError("what it was"), None)
    assert codes == [errno.ENOENT]
    with pytest.raises(OSError) as caught:
        finish(errno.ENOSPC, stuck)
    assert caught.value.errno == errno.ENOSPC


def test_a_killed_host_costs_only_the_candidate_at_hand(
    stuck, tiny_bank, windows, queries, ema, tmp_path
):
    with Replayer(tmp_path / "store", host=Host()) as replayer:
        waiting = once_it_reads(stuck, lambda: kill_the_working(host=True))
        assert replayer.host.run(stuck.folder) == -signal.SIGKILL
        waiting.join()
        again = replayer(ema, asked(tiny_bank, windows, queries, ema))
    assert again.origin == MEASURED_NOW


def test_a_replaced_bank_is_noticed(tiny_bank, windows, queries, ema, replayer):
    claimed = dataclasses.replace(tiny_bank, sha256="0" * 64)
    with pytest.raises(MeasurementFailed, match="was replaced while the replay ran"):
        replayer(ema, asked(claimed, windows, queries, ema))


class Elsewhere:
    """Files of a model in a folder; counts how often its weights are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_fetched = folder, 0

    def describe(self, folder: Path) -> None:
        shutil.copy(self.folder / "config.json", folder)

    def fetch(self, folder: Path) -> None:
        self.num_fetched += 1
        if not (self.folder / "model.safetensors").is_file():
            raise ValueError("model: its weights are lost")
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


def test_a_candidate_elsewhere_is_fetched_only_to_be_measured(
    tiny_bank, windows, queries, facts, replayer, tmp_path
):
    save_model(CopyLast(16), tmp_path / "elsewhere")
    files = Elsewhere(tmp_path / "elsewhere")
    candidate = Candidate("copy-last", None, facts, files=files)
    first = replayer(candidate, asked(tiny_bank, windows, queries, candidate))
    here = Candidate("copy-last", CopyLast(16), facts)
    pd.testing.assert_frame_equal(
        first.ranks, measure_here(here, asked(tiny_bank, windows, queries, here)).ranks
    )
    assert replayer(candidate, asked(tiny_bank, windows, queries, candidate)).origin == READ_BACK
    assert files.num_fetched == 1
    (tmp_path / "elsewhere" / "model.safetensors").unlink()
    lost = replay([candidate], tiny_bank, windows, queries.head(9), measure=replayer).outcomes[0]
    assert lost.failure == "model: its weights are lost"


def test_a_stored_latency_above_the_limit_is_measured_anew(
    tiny_bank, windows, queries, ema, replayer, tmp_path
):
    job = write_job(tmp_path, ema, asked(tiny_bank, windows, queries, ema), replayer.store)
    slow = dataclasses.replace(
        measure_here(ema, asked(tiny_bank, windows, queries, ema)),
        latency_ms={"p50": 1.0, "p95": 5000.0},
    )
    write_measurement(job.result, job.key, slow)
    assert replayer(ema, asked(tiny_bank, windows, queries, ema)).latency_ms == slow.latency_ms
    strict = dataclasses.replace(replayer, limit_ms=1000.0)
    found = strict(ema, asked(tiny_bank, windows, queries, ema))
    assert found.origin == MEASURED_NOW and found.latency_ms["p95"] < 1000
    assert strict(ema, asked(tiny_bank, windows, queries, ema)).origin == READ_BACK


MEASURING = """
import sys
import threading
from pathlib import Path
import psutil
from lvm.shadow.workers import Host
from lvm.system.processes import stoppable
job, held = Path(sys.argv[1]), []
def tell():
    held.append(open(job / "job.pickle", "wb"))
    print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
with stoppable():
    threading.Thread(target=tell, daemon=True).start()
    print("ended", Host().run(job), flush=True)
"""


def measuring(job: Job) -> subprocess.Popen:
    """Start a python that measures a stuck job; it prints the processes below it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURING, str(job.folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def below(parent: subprocess.Popen) -> list[psutil.Process]:
    processes = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
    assert len(processes) == 2, "a host with the process of the job"
    return processes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_leaves_no_process_behind(number, stuck):
    with measuring(stuck) as parent:
        started = below(parent)
        parent.send_signal(number)
    assert parent.returncode == 128 + number
    assert not any(process.is_running() for process in started)


def test_a_process_follows_its_parent_even_when_that_is_killed(stuck):
    with measuring(stuck) as parent:
        started = below(parent)
        keeper = os.open(stuck.folder / "job.pickle", os.O_WRONLY)
        parent.kill()
    gone, alive = psutil.wait_procs(started, timeout=20)
    os.close(keeper)
    assert not alive
