"""Runs whose process is gone, in a real sqlite store."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow.projects.utils import get_or_create_run
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lvm.system.processes import process_identifier
from lvm.tracking import runs
from lvm.tracking.store import PROCESS, REASON, UNCLAIMED_SECONDS, close_stale_runs

ROOT = Path(__file__).parents[2]
MINUTE_MS = 60_000
LATE_MS = UNCLAIMED_SECONDS * 1000 + MINUTE_MS
HERE = {
    mlflow_tags.MLFLOW_SOURCE_NAME: f"file://{ROOT}",
    mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT: "train",
}


def gone_name() -> str:
    *place, started = process_identifier().split(" ")
    return " ".join([*place, str(float(started) - 3600)])


def named(which: str | None) -> str | None:
    """Return the name of a process that is gone, of this one, of one on another host, or none."""
    names = {"gone": gone_name(), "own": process_identifier(), "elsewhere": "another-host 1 2 3.0"}
    return None if which is None else names[which]


def running(
    process: str | None, age_ms: float = 0, backend: str | None = None, source: dict = HERE
) -> str:
    tags = {PROCESS: process, "mlflow.project.backend": backend, **source}
    tags = {key: value for key, value in tags.items() if value is not None}
    started = int(time.time() * 1000 - age_ms)
    return MlflowClient().create_run("0", start_time=started, tags=tags).info.run_id


def status(run_id: str) -> str:
    return MlflowClient().get_run(run_id).info.status


@pytest.mark.parametrize(
    ("process", "age_minutes", "backend", "expected"),
    [
        ("gone", 0, None, "KILLED"),
        ("own", 6000, None, "RUNNING"),
        ("elsewhere", 6000, None, "RUNNING"),
        (None, 6000, None, "RUNNING"),
        (None, UNCLAIMED_SECONDS / 60 - 1, "local", "RUNNING"),
        (None, UNCLAIMED_SECONDS / 60 + 1, "local", "KILLED"),
        ("own", UNCLAIMED_SECONDS / 60 + 1, "local", "RUNNING"),
        (None, 6000, "kubernetes", "RUNNING"),
    ],
)
def test_only_what_nobody_works_at_is_closed(store, process, age_minutes, backend, expected):
    run_id = running(named(process), age_minutes * MINUTE_MS, backend)
    assert close_stale_runs(["0"]) == [run_id] * (expected == "KILLED")
    assert status(run_id) == expected
    reason = MlflowClient().get_run(run_id).data.tags.get("error")
    assert reason == (REASON if expected == "KILLED" else None)


def test_the_next_run_closes_those_of_its_experiment(store, capsys):
    other = MlflowClient().create_experiment("other")
    elsewhere = MlflowClient().create_run(other, tags={PROCESS: gone_name()}).info.run_id
    abandoned = running(gone_name())
    with runs.run("train", {}) as run_id:
        assert (status(abandoned), status(run_id)) == ("KILLED", "RUNNING")
        with runs.child_run("one lane", {}):
            assert close_stale_runs() == [elsewhere]
    printed = capsys.readouterr()
    assert printed.err == f"run {abandoned} is closed: its process is gone\n"
    assert printed.out == "", "what a command prints may be JSON alone"
    assert status(run_id) == "FINISHED"


@pytest.mark.parametrize(
    ("source", "entry", "is_ours"),
    [
        (str(ROOT), "lane-diagnostics", True),
        (f"file://{ROOT.parent}#{ROOT.name}", "main", True),
        (str(ROOT), "benchmarks/ranking.py", False),
        ("/another/project", "train", False),
        (f"file://{ROOT}#another", "train", False),
        ("https://github.com/another/project", "train", False),
        ("", "train", False),
    ],
)
def test_another_projects_runs_are_never_claimed(store, source, entry, is_ours):
    names = (mlflow_tags.MLFLOW_SOURCE_NAME, mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT)
    tags = dict(zip(names, (source, entry), strict=True))
    run_id = running(None, LATE_MS, "local", tags)
    assert close_stale_runs() == [run_id] * is_ours
    assert status(run_id) == ("KILLED" if is_ours else "RUNNING")


def test_a_run_that_mlflow_makes_for_this_checkout_is_told_by_its_tags(store, monkeypatch):
    made = get_or_create_run(None, str(ROOT), "0", str(ROOT), None, "rollback", {}).info
    MlflowClient().set_tag(made.run_id, mlflow_tags.MLFLOW_PROJECT_BACKEND, "local")
    assert close_stale_runs() == []
    late = made.start_time / 1000 + LATE_MS / 1000
    monkeypatch.setattr(time, "time", lambda: late)
    assert close_stale_runs() == [made.run_id]


def test_a_run_that_begins_late_keeps_no_error(store, monkeypatch):
    """Making a conda environment can take longer than a run may stay unclaimed."""
    run_id = running(None, LATE_MS, "local")
    assert close_stale_runs() == [run_id]
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with runs.run("train", {}) as opened:
        assert opened == run_id
    assert status(run_id) == "FINISHED"
    assert "error" not in mlflow.get_run(run_id).data.tags


def test_commands_that_close_one_run_together_do_not_fail_each_other(store):
    """The other's tag comes between MLflow's look whether there is one and its own."""
    run_id = running(gone_name())
    others = []

    def come_first(connection, cursor, statement, *rest):
        if statement.startswith("INSERT INTO tags") and not others:
            others.append("error")
            with closing(sqlite3.connect(store / "mlflow.db")) as other, other:
                other.execute("INSERT INTO tags VALUES ('error', ?, ?)", (REASON, run_id))

    event.listen(Engine, "before_cursor_execute", come_first)
    try:
        assert close_stale_runs() == [run_id]
    finally:
        event.remove(Engine, "before_cursor_execute", come_first)
    assert others == ["error"]
    assert status(run_id) == "KILLED"


@pytest.mark.parametrize("by_its_end", [True, False])
def test_a_run_that_was_closed_or_claimed_meanwhile_is_left_alone(store, monkeypatch, by_its_end):
    run_id = running(gone_name())
    search = MlflowClient.search_runs

    def slow(self, *words):
        found = search(self, *words)
        if by_its_end:
            self.set_terminated(run_id, "FINISHED")
        else:
            self.set_tag(run_id, PROCESS, process_identifier())
        return found

    monkeypatch.setattr(MlflowClient, "search_runs", slow)
    assert close_stale_runs() == []
    assert status(run_id) == ("FINISHED" if by_its_end else "RUNNING")
    assert "error" not in mlflow.get_run(run_id).data.tags
