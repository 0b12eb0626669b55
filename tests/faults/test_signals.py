"""SIGTERM or Ctrl-C at random moments: the run says so, its children end, its work goes on."""

import os
import signal
from pathlib import Path

import pytest

from lvm.system.seeding import generator
from tests.faults.conftest import Tally
from tests.faults.test_kills import CASES, Case, prepared, undisturbed
from tests.faults.workplace import Workplace

pytestmark = pytest.mark.faults

STOPS = 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["train", "shadow-eval"])
def test_a_stopped_command_says_so(
    name: str, number: signal.Signals, tmp_path: Path, tally: Tally
) -> None:
    case = CASES[name]
    place = prepared(tmp_path, case)
    expected, seconds = undisturbed(place, case)
    for moment in generator(0, f"{number} in {name}").uniform(0, seconds, STOPS):
        place.restore()
        with tally.injecting(f"{number.name} in {name}"):
            stop_after(moment, number, place, case)
            place.finish(*case.words)
            place.check()
            assert case.left(place) == expected


def stop_after(seconds: float, number: signal.Signals, place: Workplace, case: Case) -> None:
    """Stop a command as a scheduler or a terminal does; check what its run says."""
    started = place.start(*case.words)
    if started.ends_within(seconds):
        return
    if number == signal.SIGINT:
        os.killpg(started.pid, number)  # Ctrl-C reaches all that the terminal runs
    else:
        os.kill(started.pid, number)
    ended = started.ended(60)
    assert started.remains() == []
    assert "Traceback" not in ended.told
    assert ended.code in (0, 128 + number), "0 where it was at its end"
    client = place.open_store()
    last = client.search_runs(["0"], order_by=["start_time DESC"], max_results=1)[0]
    assert last.info.status == ("KILLED" if ended.code else "FINISHED")
    assert not ended.code or last.data.tags["error"] == f"stopped by {number.name}"
