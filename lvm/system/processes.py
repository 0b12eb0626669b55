"""Cores, work shared among threads, stop signals, child processes, process identifiers."""

import ctypes
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil

from lvm.system.progress import steps

Result = TypeVar("Result")
NATIVE_BF16 = ("amx_bf16", "avx512_bf16")
CPU_FILE = Path("/proc/cpuinfo")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 20.0
# Setting the clock moves the start times of processes by less than this.
CLOCK_SECONDS = 60.0
NAMESPACE = Path("/proc/self/ns/pid")
_IDENTIFIER = re.compile(r"(\S+) (\d+) (\d+) (\d+\.\d+)")

_held: list[int] = []


def num_cores() -> int:
    """Return the number of cores to use: OMP_NUM_THREADS, or all that this process may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit():
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """Return the processor and the number of threads, recorded beside latencies."""
    words = [platform.machine(), platform.processor()]
    if CPU_FILE.is_file():
        named = (line for line in CPU_FILE.read_text().splitlines() if "model name" in line)
        words.append(next(named, "").partition(":")[2].strip())
    return ", ".join([*filter(None, words), f"{num_cores()} threads"])


def has_native_bf16() -> bool:
    """Tell whether this CPU has native bf16 products; without them bf16 is slower than fp32."""
    import torch  # takes a second to load

    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in NATIVE_BF16)


@lru_cache(maxsize=1)
def bf16_speedup() -> float:
    """Return the rate of bf16 products over that of float32 on this CPU, after a trial of 0.1 s.

    The instruction set alone does not decide. avx512_bf16 without amx reached 0.6 on one Xeon and
    2.2 on one EPYC. Returns 0 without native bf16, whose products are emulated.
    """
    import torch  # takes a second to load

    if not has_native_bf16():
        return 0.0
    left, right = torch.ones(256, 768), torch.ones(768, 2048)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        one, other = left.to(dtype), right.to(dtype)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            torch.matmul(one, other)
            times.append(time.perf_counter() - begin)
        seconds.append(min(times[1:]))
    return seconds[0] / seconds[1]


def share_blocks(
    work: Callable[[Iterator[int]], Result], starts: range, title: str
) -> list[Result]:
    """Run `work` in one thread per core on a shared iterator of block starts; return all results.

    Each worker restricts torch to one thread. On a busy machine torch's own threads wait for each
    other at every operation; these workers do not. The progress bar is called `title`.
    """
    import torch  # takes a second to load

    num_workers = max(1, min(num_cores(), len(starts)))
    before = torch.get_num_threads()
    bar = steps(starts, title, "blocks")
    supply, lock, stopped = iter(bar), threading.Lock(), threading.Event()

    def next_start() -> int:
        with lock:
            return -1 if stopped.is_set() else next(supply, -1)

    def worker() -> Result:
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                return work(iter(next_start, -1))
        except BaseException:
            stopped.set()  # the other workers stop after their current block
            raise

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(worker) for _ in range(num_workers)]
            try:
                return [future.result() for future in futures]
            finally:
                stopped.set()
    finally:
        bar.close()
        torch.set_num_threads(before)


class Stopped(SystemExit):
    """Raised by a stop signal; the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


def hold_signals() -> None:
    """Hold stop signals until `stoppable`: a process that still imports cannot record its end."""
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: _held.append(received))


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent process ends, so that no orphan trains on."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` inside the block on SIGTERM or SIGINT, also on one held since start-up.

    Further signals are ignored while the first is handled.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for handled in SIGNALS:
            signal.signal(handled, signal.SIG_IGN)
        raise Stopped(number)

    with _handlers(stop):
        if _held:
            os.kill(os.getpid(), _held.pop())
        yield


@contextmanager
def defer_signals() -> Iterator[None]:
    """Deliver stop signals only when the block has ended, so that its steps are done together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    received: list[int] = []
    try:
        with _handlers(lambda number, frame: received.append(number)):
            yield
    finally:
        if received:
            os.kill(os.getpid(), received[0])


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def terminate_children() -> None:
    """Send SIGTERM to all descendants, and SIGKILL to those alive after GRACE_SECONDS."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        _send(child, signal.SIGTERM)
    _, alive = psutil.wait_procs(children, timeout=GRACE_SECONDS)
    for child in alive:
        _send(child, signal.SIGKILL)


def _send(child: psutil.Process, number: signal.Signals) -> None:
    try:
        child.send_signal(number)
    except psutil.NoSuchProcess:
        return


def process_identifier() -> str:
    """Return `<host> <namespace of process ids> <id> <start>` of this process.

    It survives the reuse of process ids, and marks files and runs so that stale ones are detected.
    """
    started = psutil.Process().create_time()
    return f"{socket.gethostname()} {_namespace()} {os.getpid()} {started:.2f}"


def has_ended(identifier: str) -> bool:
    """Return whether the process of this identifier has ended.

    False for processes that cannot be seen from here and for texts that are no identifier.
    """
    found = _IDENTIFIER.fullmatch(identifier)
    if found is None or (found[1], found[2]) != (socket.gethostname(), str(_namespace())):
        return False
    try:
        process = psutil.Process(int(found[3]))
        shift = abs(process.create_time() - float(found[4]))
        return process.status() == psutil.STATUS_ZOMBIE or shift > CLOCK_SECONDS
    except psutil.ZombieProcess:
        return True
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return not _exists(int(found[3]))


def _exists(number: int) -> bool:
    """Return whether a process has this id, even one that /proc hides (hidepid)."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _namespace() -> int:
    """Return the inode of the namespace of process ids, as in a container; 0 without /proc."""
    return NAMESPACE.stat().st_ino if NAMESPACE.exists() else 0
