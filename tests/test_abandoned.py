"""Runs whose process is gone, in a real sqlite store."""

import time

import pytest
from mlflow.tracking import MlflowClient

from lvm import tracking
from lvm.abandoned import PROCESS, REASON, UNCLAIMED_SECONDS, close_abandoned
from lvm.processes import own_name

MINUTE_MS = 60_000


def gone_name() -> str:
    *place, started = own_name().split(" ")
    return " ".join([*place, str(float(started) - 3600)])


def named(which: str | None) -> str | None:
    """Return the name of a process that is gone, of this one, of one on another host, or none."""
    names = {"gone": gone_name(), "own": own_name(), "elsewhere": "another-host 1 2 3.0"}
    return None if which is None else names[which]


def running(process: str | None, age_ms: float = 0, backend: str | None = None) -> str:
    tags = {PROCESS: process, "mlflow.project.backend": backend}
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
    assert close_abandoned(["0"]) == [run_id] * (expected == "KILLED")
    assert status(run_id) == expected
    reason = MlflowClient().get_run(run_id).data.tags.get("error")
    assert reason == (REASON if expected == "KILLED" else None)


def test_the_next_run_closes_those_of_its_experiment(store, capsys):
    other = MlflowClient().create_experiment("other")
    elsewhere = MlflowClient().create_run(other, tags={PROCESS: gone_name()}).info.run_id
    abandoned = running(gone_name())
    with tracking.run("train", {}) as run_id:
        assert (status(abandoned), status(run_id)) == ("KILLED", "RUNNING")
        with tracking.child_run("one lane", {}):
            assert close_abandoned() == [elsewhere]
    assert capsys.readouterr().out == f"run {abandoned} is closed: its process is gone\n"
    assert status(run_id) == "FINISHED"
