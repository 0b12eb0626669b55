"""Commands of lvm in processes of their own, forked from one that has loaded the libraries."""

import atexit
import importlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

ENTRIES = ("ingest", "export", "train", "eval", "shadow_eval", "promote", "rollback")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([__name__, *(f"entrypoints.{name}" for name in ENTRIES)])


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
    """An entry point that runs in `folder` on the store `uri` until it is waited for."""

    def __init__(self, folder: Path, uri: str, logs: Path, *words: str, **environment: str) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.iterdir()))
        self._out, self._err = logs / f"{number:03}.out", logs / f"{number:03}.err"
        self._out.touch()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTEST_"))}
        kept |= {"MLFLOW_TRACKING_URI": uri, **environment}
        work = (words, str(folder), kept, str(self._out), str(self._err))
        self.process = FORKED.Process(target=_work, args=work)
        self.process.start()

    def printed(self) -> str:
        """Return what it has printed by now."""
        return self._out.read_text()

    def wait_for(self, words: str, seconds: float = 300) -> None:
        """Return once it has printed `words`."""
        end = time.monotonic() + seconds
        while words not in self.printed():
            assert self.process.is_alive() and time.monotonic() < end, self._err.read_text()
            time.sleep(0.02)

    def ended(self, seconds: float = 300) -> Ended:
        """Wait for its end; fail where it takes longer."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"hangs: {self._err.read_text()[-3000:]}")
        return Ended(self.process.exitcode, self.printed(), self._err.read_text())


def _work(
    words: tuple[str, ...], folder: str, environment: dict[str, str], out: str, err: str
) -> NoReturn:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    entry, *arguments = words
    code = importlib.import_module(f"entrypoints.{entry}").main(arguments)
    atexit._run_exitfuncs()
    raise SystemExit(code)
