"""Parts of a command: whose time it was, how far it is, what is said of it."""

import io
import sys
import threading
import time

import pytest
import torch

from lvm.system import progress
from lvm.system.progress import add_products, count_products, part, steps, watch


@pytest.fixture(autouse=True)
def _own_ledger():
    progress.reset()
    yield
    progress.reset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.reset()
    return now


def test_time_belongs_to_the_innermost_part(clock):
    with part("fit"):
        clock[0] += 3
        with part("rank"):
            clock[0] += 5
            add_products(8e12)
        clock[0] += 1
    with part("rank"):
        clock[0] += 2
        add_products(1e12)
    clock[0] += 1
    found = progress.report()
    assert {name: one["seconds"] for name, one in found["parts"].items()} == {
        "fit": 4.0,
        "rank": 7.0,
        "rest": 1.0,
    }
    assert found["seconds"] == 12 and found["products"] == 9e12
    assert progress.time_line() == (
        "time: 12 s (rank 7.0, fit 4.0, rest 1.0; 9.0 TFLOP of products)"
    )


def test_a_part_that_fails_ends(clock):
    with pytest.raises(ValueError), part("fit"):
        clock[0] += 2
        raise ValueError
    clock[0] += 3
    assert progress.report()["parts"]["rest"]["seconds"] == 3


def test_parts_of_another_process_are_taken_out_of_the_wait(clock):
    with part("replay"):
        clock[0] += 10
        progress.merge({"rank": {"seconds": 6.0, "products": 2.0}})
    parts = progress.report()["parts"]
    assert parts["replay"]["seconds"] == 4 and parts["rank"] == {"seconds": 6.0, "products": 2.0}


def test_products_are_counted_with_their_gradients():
    layer = torch.nn.Linear(30, 20)
    result, forward = count_products(lambda: layer(torch.ones(5, 30)))
    assert forward == 2 * 5 * 30 * 20
    _, backward = count_products(lambda: result.sum().backward())
    assert backward == forward, "of the weights; the input needs none"


def test_a_line_says_what_is_done_and_how_far_it_is(clock):
    with part("validate"), steps(None, "rank", "blocks", 40) as bar:
        clock[0] += 1
        assert progress.status_line().startswith("validate: rank: 0 of 40 blocks")
        bar.update(10)
        assert progress.status_line().startswith("validate: rank: 10 of 40 blocks, ")
        assert " a second (" in progress.status_line()
    with part("read text"), steps(None, "read notes", "rows") as bar:
        clock[0] += 2
        bar.update(3210)
        line = progress.status_line()
        assert line.startswith("read notes: 3,210 rows, ") and "e+" not in line
    with part("register"):
        clock[0] += 7
        assert progress.status_line() == "register (7 s)"
    assert progress.status_line() == ""


def test_a_command_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "PERIOD", 0.01)
    said = threading.Event()

    class Listening(io.StringIO):
        def write(self, text: str) -> int:
            if "slow part (0 s)" in text:
                said.set()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Listening())
    with watch(), part("slow part"):
        assert said.wait(20)
    assert "slow part" in progress.report()["parts"]


def test_what_speaks_for_itself_is_not_told():
    with part("train", is_shown=False):
        assert progress.status_line() == ""
    assert "train" in progress.report()["parts"]


def test_hidden_steps_are_no_bar():
    assert list(steps([1, 2, 3])) == [1, 2, 3]
    with steps([1, 2], None):
        assert progress.status_line() == ""


def test_a_bar_ends_with_its_loop():
    for _ in steps(range(3), "walk", "starts"):
        assert "walk" in progress.status_line()
        time.sleep(0)
    assert progress.status_line() == ""
