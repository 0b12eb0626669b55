"""Orderly ends of a process that is told to stop."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 20.0

_remembered: list[int] = []


class Stopped(SystemExit):
    """The process was told to stop; its exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


def remember_signals() -> None:
    """Keep stop signals for `stoppable`: a process that still imports cannot record its end."""
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: _remembered.append(received))


def follow_parent() -> None:
    """Ask the kernel to send SIGTERM when the parent process ends, so that no orphan trains on."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` inside the block when SIGTERM or SIGINT comes, or came since start-up.

    A second signal is ignored while the first is being handled.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for handled in SIGNALS:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        if _remembered:
            os.kill(os.getpid(), _remembered.pop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off stop signals to the end of the block, so that what it does is done as a whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled by the main thread alone
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


def end_children() -> None:
    """Terminate every process below this one; kill those still there after the grace time."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        _signal_child(child, signal.SIGTERM)
    _, alive = psutil.wait_procs(children, timeout=GRACE_SECONDS)
    for child in alive:
        _signal_child(child, signal.SIGKILL)


def _signal_child(child: psutil.Process, number: signal.Signals) -> None:
    try:
        child.send_signal(number)
    except psutil.NoSuchProcess:
        return
