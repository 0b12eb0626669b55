"""Commands in processes of their own that can be hit at any moment of their work.

Most are forked from a process that has imported lvm already: the moments at which they are hit lie
in their work, not in the imports. Those that launch others run in a copy of the project.
"""

import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
from mlflow.tracking import MlflowClient

from lvm import tracking
from lvm.registry import alias

ROOT = Path(__file__).parents[2]
PARTS = ("MLproject", "conda.yaml", "pyproject.toml", "lvm", "entrypoints")
LOG = "printed.txt"
END_SECONDS = 30.0  # children have 20 of them to end by themselves
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"entrypoints.{name}" for name in ("ingest", "export", "train", "eval", "shadow_eval")]
    + ["lvm.registry.registered", "lvm.serving.predictor", "mlflow.pyfunc"]
)
VOLATILE = ("seconds", "latency", "_ms", "_id", "run", "at", "origin", "path", "measured", "model")


@dataclass(frozen=True)
class Started:
    """A command that was started: its process leads a group of its own."""

    pid: int
    exit_code: Callable[[], int | None]

    def ends_within(self, seconds: float) -> bool:
        """Wait so long for its end; tell whether it came."""
        limit = time.monotonic() + seconds
        while self.exit_code() is None:
            if time.monotonic() > limit:
                return False
            time.sleep(0.002)
        return True

    def wait(self, seconds: float) -> int:
        """Return its exit code; it must end within so many seconds."""
        assert self.ends_within(seconds), f"process {self.pid} hangs"
        code = self.exit_code()
        assert code is not None
        return code

    def hit(self, number: signal.Signals) -> None:
        """Send a signal to the command alone, as its user or the kernel does."""
        os.kill(self.pid, number)

    def remains(self) -> list[psutil.Process]:
        """Return the processes of its group that are still there after the time they have."""
        limit = time.monotonic() + END_SECONDS
        while (left := self._group()) and time.monotonic() < limit:
            time.sleep(0.05)
        return left

    def _group(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.pid and process.status() != "zombie":
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found


def start(folder: Path, entry: str, words: Sequence[str]) -> Started:
    """Start an entry point in `folder`, whose store it uses; forked where it launches no other."""
    environment = {"MLFLOW_TRACKING_URI": store_uri(folder), "OMP_NUM_THREADS": "1"}
    if (folder / "MLproject").is_file():
        command = [sys.executable, "-m", f"entrypoints.{entry}", *words]
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        with (folder / LOG).open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=inherited | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Started(process.pid, process.poll)
    fork = FORKS.Process(target=_run, args=(str(folder), entry, list(words), environment))
    fork.start()

    assert fork.pid is not None
    return Started(fork.pid, lambda: fork.exitcode)


def _run(folder: str, entry: str, words: list[str], environment: dict[str, str]) -> None:
    """Do in a fork what `python -m entrypoints.<entry>` does."""
    from lvm.stopping import remember_signals

    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with open(LOG, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    remember_signals()
    command = importlib.import_module(f"entrypoints.{entry}").main
    sys.exit(command(words))


def finish(folder: Path, entry: str, words: Sequence[str]) -> float:
    """Run an entry point to its good end; return its seconds."""
    begun = time.monotonic()
    code = start(folder, entry, words).wait(600)
    assert code == 0, printed(folder)
    return time.monotonic() - begun


def printed(folder: Path) -> str:
    return (folder / LOG).read_text() if (folder / LOG).is_file() else ""


def store_uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def restore(folder: Path, snapshot: Path) -> None:
    """Put a working folder back to what it was: the same place, for a store knows its paths."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(snapshot, folder, symlinks=True)


def copy_project(folder: Path) -> None:
    """Copy what `mlflow run` needs, so that data and store lie in `folder`."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)


def check_store(folder: Path) -> None:
    """Check what holds after every rerun: no run is left open, the alias is at a version."""
    os.environ["MLFLOW_TRACKING_URI"] = store_uri(folder)
    tracking.configure()
    found = MlflowClient().search_runs(["0"])
    assert {run.info.status for run in found} <= {"FINISHED", "KILLED", "FAILED"}
    assert "FINISHED" in {run.info.status for run in found}
    for version in alias.aliases().values():
        alias.check_version(version)


def latest(folder: Path, entry: str) -> mlflow.entities.Run:
    """Return the latest finished run of an entry point."""
    os.environ["MLFLOW_TRACKING_URI"] = store_uri(folder)
    tracking.configure()
    query = f"tags.entry = '{entry}' and attributes.status = 'FINISHED'"
    return MlflowClient().search_runs(["0"], query, order_by=["start_time DESC"])[0]


def artifact(folder: Path, entry: str, name: str) -> bytes:
    """Return an artifact of the latest finished run of an entry point."""
    run = latest(folder, entry)
    return (Path(run.info.artifact_uri) / name).read_bytes()


def steady(value: Any) -> Any:
    """Return a report without what no two runs share: times, ids, places."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if not _is_volatile(k)}
    return [steady(one) for one in value] if isinstance(value, list) else value


def _is_volatile(key: str) -> bool:
    return any(key == word or key.endswith(word) for word in VOLATILE)


def files_sha256(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def read_report(folder: Path, entry: str) -> Any:
    return steady(json.loads(artifact(folder, entry, "report.json")))
