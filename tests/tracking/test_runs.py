"""Runs in a real sqlite store: identity, parameters, figures, every way to end."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from mlflow.tracking import MlflowClient
from mlflow.tracking.fluent import run_id_to_system_metrics_monitor
from mlflow.utils import mlflow_tags

from lvm.bank.bank import write_bank
from lvm.system.processes import SIGNALS, Stopped, hold_signals
from lvm.tracking import datasets, runs
from lvm.tracking.store import PROCESS, is_dirty, project_root
from lvm.windows.export import ensure_windows
from tests.synthetic import make_bank

ROOT = Path(__file__).parents[2]


def finished(run_id: str) -> mlflow.entities.Run:
    return MlflowClient().get_run(run_id)


def launched(monkeypatch, params: dict[str, str]) -> str:
    """Do what `mlflow run` does before it starts a command; return the run's id."""
    tags = {mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: "train"}
    run = MlflowClient().create_run("0", tags=tags)
    for key, value in params.items():
        MlflowClient().log_param(run.info.run_id, key, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    return run.info.run_id


def test_a_run_logs_system_metrics_unless_they_are_turned_off(store, monkeypatch):
    for word, is_on in (("true", True), ("false", False)):
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", word)
        with runs.run("train", {}) as run_id:
            monitor = run_id_to_system_metrics_monitor.get(run_id)
            assert (monitor is not None) == is_on
            if monitor is not None:
                monitor.collect_metrics()
                monitor.publish_metrics(monitor.aggregate_metrics())
        known = [name for name in finished(run_id).data.metrics if name.startswith("system/")]
        assert ("system/cpu_utilization_percentage" in known) == is_on
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    runs.configure()
    assert os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] == "true"


def test_run_logs_its_parameters_its_config_and_the_state_of_the_checkout(store):
    with runs.run("train", {"lr": "auto", "ctx": "50"}) as run_id:
        runs.log_config({"lr": 0.1, "ctx": 50})
    run = finished(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "train"
    assert run.data.params == {"lr": "auto", "ctx": "50", "resolved/lr": "0.1"}
    dirty = {True: "true", False: "false", None: None}[is_dirty(project_root())]
    assert run.data.tags.get("mlflow.source.git.dirty") == dirty
    assert json.loads(runs.read_text(run_id, "config.json")) == {"lr": 0.1, "ctx": 50}


def test_run_resumes_the_launchers_run_and_leaves_its_raw_strings(store, monkeypatch):
    run_id = launched(monkeypatch, {"lr": "1e-3", "ctx": "2000"})
    with runs.run("train", {"lr": "0.001", "ctx": "2000", "seed": "0"}) as opened:
        assert opened == run_id
    assert finished(run_id).data.params == {"lr": "1e-3", "ctx": "2000", "seed": "0"}
    assert finished(run_id).info.status == "FINISHED"


def test_a_name_given_by_the_user_stays(store, monkeypatch):
    run_id = launched(monkeypatch, {})
    MlflowClient().set_tag(run_id, "mlflow.runName", "my own name")
    with runs.run("train", {}):
        runs.name_run("memory_gru ctx 50")
    assert finished(run_id).info.run_name == "my own name"


def test_a_run_without_a_name_gets_a_telling_one_with_a_description(store):
    with runs.run("train", {}) as run_id:
        runs.name_run("memory_gru ctx 50")
        runs.describe_run("**best** epoch 3")
    run = finished(run_id)
    assert run.info.run_name == "train memory_gru ctx 50"
    assert (run.data.tags["entry"], run.data.tags["mlflow.note.content"]) == (
        "train",
        "**best** epoch 3",
    )


def test_an_exception_fails_the_run_with_its_reason(store):
    with pytest.raises(ValueError, match="no such bank"), runs.run("eval", {}) as run_id:
        raise ValueError("bank: no such bank\nanywhere")
    run = finished(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == "bank: no such bank anywhere"
    assert "Traceback" in runs.read_text(run_id, "error.txt")


def test_a_launched_run_that_was_never_opened_fails_with_its_reason(store, monkeypatch):
    run_id = launched(monkeypatch, {"lr": "banana"})
    runs.refuse_launched_run("'banana' is not a valid float")
    assert finished(run_id).info.status == "FAILED"
    assert finished(run_id).data.tags["error"] == "'banana' is not a valid float"
    assert "MLFLOW_RUN_ID" not in os.environ


@pytest.mark.parametrize(
    ("status", "tags", "reason"),
    [
        ("FINISHED", {mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: "train"}, "has ended (FINISHED)"),
        ("FAILED", {mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: "train"}, "has ended (FAILED)"),
        ("RUNNING", {}, "which `mlflow run` did not open"),
        (
            "RUNNING",
            {mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: "train", PROCESS: "another-host 1 2 3.0"},
            "which another process has claimed",
        ),
        (None, {}, "which this store does not have"),
    ],
)
@pytest.mark.parametrize("is_refused", [False, True])
def test_the_run_of_another_command_is_left_alone(
    store, monkeypatch, capsys, status, tags, reason, is_refused
):
    run_id = "0" * 32
    if status is not None:
        run_id = MlflowClient().create_run("0", tags=tags).info.run_id
        MlflowClient().set_terminated(run_id, status)
    before = finished(run_id).to_dictionary() if status is not None else None
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    if is_refused:
        runs.refuse_launched_run("max_queries: 'many' is no number")
    else:
        with runs.run("eval", {}) as opened:
            assert opened != run_id
        assert finished(opened).info.status == "FINISHED"
    line = capsys.readouterr().err
    assert line.startswith(f"warning: MLFLOW_RUN_ID names run {run_id}, which ") and reason in line
    assert status is None or finished(run_id).to_dictionary() == before


def test_a_stop_is_told_though_its_clean_up_fails(store, monkeypatch):
    """The signal can come while a library makes itself ready, which is broken from then on."""

    def broken(run_id):
        raise mlflow.MlflowException("Invalid clause(s) in filter string")

    monkeypatch.setattr(runs, "child_runs", broken)
    with pytest.raises(Stopped), runs.run("train", {}) as run_id:
        os.kill(os.getpid(), signal.SIGTERM)
    found = mlflow.get_run(run_id)
    assert found.info.status == "KILLED" and found.data.tags["error"] == "stopped by SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_run_as_killed_with_its_children(store, number):
    before = signal.getsignal(number)
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(Stopped) as stopped, runs.run("train", {}) as run_id:
        child = subprocess.Popen(sleeper)
        nested = MlflowClient().create_run("0", tags={"mlflow.parentRunId": run_id})
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert not psutil.pid_exists(child.pid)
    assert finished(run_id).info.status == "KILLED"
    assert finished(run_id).data.tags["error"] == f"stopped by {number.name}"
    assert finished(nested.info.run_id).info.status == "KILLED"
    assert signal.getsignal(number) is before


def test_a_stop_signal_before_the_run_is_open_is_not_lost(store):
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        hold_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), runs.run("train", {}):
            pass
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "KILLED"


def test_metrics_carry_their_step_and_get_legal_names(store):
    with runs.run("train", {}) as run_id:
        for epoch in (1, 2):
            runs.log_metrics({"val/hit_at_5": epoch / 10, "lanes/C++ @ home": 1.0}, epoch)
    history = MlflowClient().get_metric_history(run_id, "val/hit_at_5")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2)]
    (name,) = finished(run_id).data.metrics.keys() - {"val/hit_at_5"}
    assert name == runs.metric_name("lanes/C++ @ home") and name.startswith("lanes/C__ _ home-")


LANES = [
    *("C", "C#", "C+", "C_", "R&D", "R D", "R/D", "a//b", "a/_/b", ".", "..", "", "/", "/a", "a/"),
    *(
        "数学",
        "物理",
        "化学",
        "Физика",
        "Физ",
        "हिन्दी",
        "हिन्दू",
        "தமிழ்",
        "தமிழ",
        "عربي",
        "é",
        "e\u0301",
    ),
    *("long" * 99, "long" * 99 + "er", "a/" * 200, "a/" * 201, "🙂", "🙃", "\ud800"),
]


def test_metric_names_of_any_script_stay_distinct(store):
    names = [f"lanes/{lane}/hit_at_5" for lane in LANES]
    legal = [runs.metric_name(name) for name in names]
    assert len(set(legal)) == len(names)
    unchanged = {
        "C",
        "C_",
        "R D",
        "R/D",
        "a/_/b",
        "数学",
        "物理",
        "化学",
        "Физика",
        "Физ",
        "عربي",
        "é",
    }
    assert {a for a, b in zip(names, legal, strict=True) if a == b} == {
        f"lanes/{lane}/hit_at_5" for lane in unchanged
    }
    with runs.run("lane-diagnostics", {}) as run_id:
        runs.log_metrics({name: float(value) for value, name in enumerate(names)})
    found = finished(run_id).data.metrics
    assert found == {name: float(value) for value, name in enumerate(legal)}


def test_datasets_are_named_by_our_own_hash(store, tiny_bank, tmp_path):
    windows = ensure_windows(tiny_bank, 50, tmp_path / "windows")
    with runs.run("export", {}) as run_id:
        datasets.log_bank(tiny_bank, "training")
        datasets.log_windows(windows, tmp_path / "windows", "training")
    run = finished(run_id)
    logged = {entry.dataset.name: entry.dataset for entry in run.inputs.dataset_inputs}
    assert logged["bank:bank"].digest == tiny_bank.sha256[:36]
    assert logged["windows:windows"].digest == windows.sha256[:36]
    assert json.loads(logged["bank:bank"].profile)["sha256"] == tiny_bank.sha256
    tags = run.data.tags
    assert (tags["bank_sha256"], tags["windows_sha256"]) == (tiny_bank.sha256, windows.sha256)
    assert (tags["bank"], tags["ctx"], tags["leaky"]) == ("bank", str(windows.ctx), "false")


def test_a_change_in_the_last_row_changes_the_digest(store, tmp_path):
    bank = make_bank(tmp_path / "one")
    vectors = np.array(bank.vectors)
    vectors[-1] = -vectors[-1]
    rows = bank.document_table().loc[lambda table: table.index.repeat(table["num_rows"])]
    other = write_bank(tmp_path / "two", vectors, rows.astype(str), "synthetic", "test")
    with runs.run("export", {}):
        digests = {datasets.log_bank(one, "training").digest for one in (bank, other)}
    assert len(digests) == 2


def test_finished_runs_with_a_tag_are_found_the_latest_first(store):
    """Neither one that failed, nor one of another value, nor the open one itself."""
    made = {}
    for name, value in (("older", "x"), ("newer", "x"), ("other", "y")):
        with runs.run("train", {}) as made[name]:
            runs.set_tags({"key": value})
    with pytest.raises(ValueError), runs.run("train", {}):
        runs.set_tags({"key": "x"})
        raise ValueError("failed")
    with runs.run("phases", {}):
        runs.set_tags({"key": "x"})
        assert runs.find_finished("key", "x") == [made["newer"], made["older"]]
        assert runs.find_finished("key", "z") == []


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Stopped(signal.SIGTERM), "KILLED", None),
        (ValueError("lr:\nfailed"), "FAILED", "lr: failed"),
    ],
)
def test_a_nested_run_says_how_it_ended(error, status, reason, store):
    with pytest.raises(type(error)), runs.run("tune", {}), runs.child_run("trial 1", {}):
        child = runs.active_run_id()
        raise error
    assert finished(child).info.status == status
    assert finished(child).data.tags.get("error") == reason


def test_what_a_tagged_run_launched_is_found_however_that_run_ended(store):
    """Neither another entry point below it, nor what failed, nor what another run launched."""
    with pytest.raises(ValueError), runs.run("phases", {}):
        runs.set_tags({"key": "x"})
        for entry in ("train", "shadow-eval"):
            with runs.child_run(entry, {}):
                runs.set_tags({runs.ENTRY: entry})
                found = runs.active_run_id()
        with runs.child_run("shadow-eval", {}):
            runs.set_tags({runs.ENTRY: "shadow-eval"})
            failed = runs.active_run_id()
            raise ValueError("failed")
    with runs.run("phases", {}), runs.child_run("shadow-eval", {}):
        runs.set_tags({runs.ENTRY: "shadow-eval"})
    with runs.run("phases", {}):
        asked = ("key", "x", "shadow-eval")
        assert runs.find_finished_children(*asked) == [found]
        assert set(runs.find_finished_children(*asked, whole={failed})) == {found, failed}


def test_what_was_decided_otherwise_is_logged_beside_what_was_typed(store):
    with runs.run("train", {"ctx": "1000", "lr": "auto", "chunk": "200"}) as run_id:
        runs.log_config({"ctx": 100, "lr": 0.1, "chunk": 200}, decided={"ctx"})
    params = finished(run_id).data.params
    assert (params["ctx"], params["resolved/ctx"], params["resolved/lr"]) == ("1000", "100", "0.1")
    assert "resolved/chunk" not in params


def test_what_others_added_at_the_same_moment_is_asked_for_once_more():
    with sqlite3.connect(":memory:") as shared:
        shared.execute("CREATE TABLE tags (key TEXT PRIMARY KEY)")
        shared.execute("INSERT INTO tags VALUES ('view')")
        tries = []

        def add() -> None:
            tries.append("INSERT" if not tries else "INSERT OR REPLACE")
            shared.execute(f"{tries[-1]} INTO tags VALUES ('view')")

        runs.add_shared(add)
        assert tries == ["INSERT", "INSERT OR REPLACE"]
        with pytest.raises(sqlite3.IntegrityError):
            runs.add_shared(lambda: shared.execute("INSERT INTO tags VALUES ('view')"))
    shared.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("No such file or directory: 'report.json'"), ValueError),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x"), OSError),
        (mlflow.MlflowException("Run 'abc' not found"), ValueError),
        (mlflow.MlflowException("database is locked"), mlflow.MlflowException),
    ],
)
def test_a_store_that_cannot_be_read_now_lacks_nothing(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fails)
    with pytest.raises(kind) as caught:
        runs.read_json("abc")
    assert type(caught.value) is kind
