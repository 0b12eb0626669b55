"""Commands of lvm in processes of their own, which can be hit at any moment of their work.

Most are forked from a process that has imported lvm already: the moments at which they are hit lie
in their work, not in the imports. In a copy of the project they are started as users start them.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
import torch

ENTRIES = ("ingest", "export", "train", "eval", "shadow_eval", "promote", "rollback")
LOADED = ("lvm.tracking.registry", "lvm.serving.predictor", "mlflow.pyfunc")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, *LOADED, *(f"entrypoints.{name}" for name in ENTRIES)])
END_SECONDS = 30.0  # children have 20 of them to end by themselves


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-n after signal n), what it printed, what it told."""

    code: int | None
    printed: str
    told: str

    def line(self) -> str:
        """Return the one line by which it refused; fail where there is another, or a traceback."""
        assert self.code == 2, self
        assert "Traceback" not in self.told, self.told
        (line,) = (one for one in self.told.splitlines() if one.startswith("error: "))
        return line


class Command:
    """An entry point that runs in `folder` on the store `uri` until it is waited for.

    Its process leads a session of its own.
    """

    def __init__(self, folder: Path, uri: str, logs: Path, *words: str, **environment: str) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.iterdir()))
        self._out, self._err = logs / f"{number:03}.out", logs / f"{number:03}.err"
        self._out.touch()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTEST_"))}
        kept |= {"MLFLOW_TRACKING_URI": uri, **environment}
        if (folder / "MLproject").is_file():
            self.process: _Started | multiprocessing.process.BaseProcess
            self.process = _Started(folder, words, kept, self._out, self._err)
            return
        work = (words, str(folder), kept, str(self._out), str(self._err))
        fork = FORKED.Process(target=_work, args=work)
        fork.start()
        self.process = fork

    @property
    def pid(self) -> int:
        """Return the id of its process."""
        assert self.process.pid is not None
        return self.process.pid

    def printed(self) -> str:
        """Return what it has printed by now."""
        return self._out.read_text()

    def wait_for(self, words: str, seconds: float = 300) -> None:
        """Return once it has printed `words`."""
        end = time.monotonic() + seconds
        while words not in self.printed():
            assert self.process.is_alive() and time.monotonic() < end, self._err.read_text()
            time.sleep(0.02)

    def ends_within(self, seconds: float) -> bool:
        """Wait so long for its end; tell whether it came."""
        end = time.monotonic() + seconds
        while self.process.exitcode is None:
            if time.monotonic() > end:
                return False
            time.sleep(0.002)
        return True

    def ended(self, seconds: float = 300) -> Ended:
        """Wait for its end; fail where it takes longer."""
        if not self.ends_within(seconds):
            self.process.kill()
            raise AssertionError(f"hangs: {self._err.read_text()[-3000:]}")
        return Ended(self.process.exitcode, self.printed(), self._err.read_text())

    def remains(self) -> list[psutil.Process]:
        """Return the processes of its session that are there after the time they have to end."""
        end = time.monotonic() + END_SECONDS
        while (left := _session(self.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        return left


class _Started:
    """A python started anew, with the face of a multiprocessing process."""

    def __init__(
        self, folder: Path, words: tuple[str, ...], kept: dict[str, str], out: Path, err: Path
    ) -> None:
        environment = {k: v for k, v in kept.items() if k != "PYTHONPATH"}
        command = [sys.executable, "-m", f"entrypoints.{words[0]}", *words[1:]]
        with out.open("w") as output, err.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self.pid: int | None = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _work(
    words: tuple[str, ...], folder: str, environment: dict[str, str], out: str, err: str
) -> NoReturn:
    """Do in a fork what `python -m entrypoints.<entry>` does."""
    from lvm.system.processes import hold_signals

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    hold_signals()
    torch.set_num_threads(1)
    entry, *arguments = words
    code = importlib.import_module(f"entrypoints.{entry}").main(arguments)
    atexit._run_exitfuncs()
    raise SystemExit(code)
