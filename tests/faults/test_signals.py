"""SIGTERM or Ctrl-C at random moments: the run says so, its children end, its work goes on."""

import os
import signal
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lvm import tracking
from lvm.seeding import generator
from tests.faults.commands import check_store, finish, printed, restore, start, store_uri
from tests.faults.conftest import Tally
from tests.faults.test_kills import CASES, workplace

pytestmark = pytest.mark.faults

STOPS = 5
ENTRIES = ("train", "shadow_eval")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_stopped_command_says_so(
    entry: str, number: signal.Signals, tmp_path: Path, tally: Tally
) -> None:
    case, folder, snapshot = CASES[entry], tmp_path / "work", tmp_path / "snapshot"
    folder.mkdir()
    workplace(folder)
    for before, words in case.before:
        finish(folder, before, words)
    restore(snapshot, folder)
    seconds = finish(folder, entry, case.words)
    undisturbed = case.left(folder)
    for moment in generator(0, f"{number} in {entry}").uniform(0, seconds, STOPS):
        restore(folder, snapshot)
        with tally.injecting(f"{number.name} in {entry}"):
            stop_after(moment, number, folder, entry)
            finish(folder, entry, case.words)
            check_store(folder)
            assert case.left(folder) == undisturbed


def stop_after(seconds: float, number: signal.Signals, folder: Path, entry: str) -> None:
    """Stop a command as a terminal or a scheduler does; check what its run says."""
    started = start(folder, entry, CASES[entry].words)
    if started.ends_within(seconds):
        return
    if number == signal.SIGINT:
        os.killpg(started.pid, number)  # Ctrl-C reaches all that the terminal runs
    else:
        started.hit(number)
    code = started.wait(60)
    assert started.remains() == []
    assert "Traceback" not in printed(folder)
    assert code in (0, 128 + number), "0 where it was at its end"
    os.environ["MLFLOW_TRACKING_URI"] = store_uri(folder)
    tracking.configure()
    last = MlflowClient().search_runs(["0"], order_by=["start_time DESC"], max_results=1)[0]
    assert last.info.status == ("KILLED" if code else "FINISHED")
    assert not code or last.data.tags["error"] == f"stopped by {number.name}"
