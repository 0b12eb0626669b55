"""Measure candidates in worker processes, so that one that crashes costs only its own figures.

A `Host` starts `python -m lvm.shadow.workers <id of its parent>`, which loads the libraries once,
then forks for each job. Each line of its input is the folder of a job; each line of its output is
the exit code of the fork that did the job, -n after signal n. The host process itself computes
nothing, so no thread pool is lost in a fork. `multiprocessing`'s forkserver does the same, but a
fork of it imports the caller's main module again (MLflow, matplotlib: 6 s each, measured), its
resource tracker ignores SIGTERM, and it cannot be stopped by a public call.
"""

import gc
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypeVar

import numpy as np

from lvm.bank.files import file_sha256, map_array
from lvm.models.weights import load_model, model_text, save_model
from lvm.retrieval.rerank import StageInputs
from lvm.shadow.replay import (
    MEASURED_NOW,
    STORE,
    Candidate,
    Job,
    Measurement,
    MeasurementFailed,
    Questions,
    measure,
    measurement_key,
    measurement_path,
    read_measurement,
    write_measurement,
)
from lvm.system import progress
from lvm.system.atomic import write_array, write_errors_name
from lvm.system.distributed import FAILURES, launched_size
from lvm.system.errors import DISK_ERRNOS
from lvm.system.processes import GRACE_SECONDS, SIGNALS, Stopped, end_with_parent, stoppable
from lvm.windows.planning import Queries

MODEL, CORRECTION, JOB, ERROR = "model", "row_correction.npy", "job.pickle", "error.txt"
SPENT = "spent.json"
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], None]
T = TypeVar("T")
FAILED_WRITE = re.compile(r"OSError: \[Errno (\d+)\] .*: '(.*)'$")


class Host:
    """Runs jobs in forks of one python process, which is started for the first job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path) -> int:
        """Do the job in `folder`; return the exit code of its process, which has ended by then."""
        if self._process is None:
            self._process = _start_host()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        try:
            process.stdin.write(f"{folder}\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass  # the host was killed; its own exit code says so
        finally:
            if not answer:  # also if this process was told to stop
                self.close()
        return int(answer) if answer else process.returncode

    def close(self) -> None:
        """End the host and whatever still runs below it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.communicate()


def _start_host() -> subprocess.Popen[str]:
    """Start a python that imports this very code."""
    code = str(Path(__file__).resolve().parents[2])
    paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "lvm.shadow.workers", str(os.getpid())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


@dataclass(frozen=True)
class Replayer:
    """Measures each candidate in a process of its own, or reads it from the `store`.

    Use it as a context manager, which ends the host process. `note` receives one status line per
    candidate. Cached results slower than `limit_ms` at P95 are measured again, since the machine
    may have been busy. If `open_stage` is given, it is called with the queries as a candidate reads
    them, and the answers are re-ranked by its stage as well.
    """

    store: Path = STORE
    note: Callable[[str], None] = print
    limit_ms: float = math.inf
    open_stage: Callable[[Queries], StageInputs] | None = None
    host: Host = field(default_factory=Host)

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *error: object) -> None:
        self.host.close()

    def __call__(self, candidate: Candidate, asked: Questions) -> Measurement:
        """Return the measurement of one candidate; raises MeasurementFailed if it breaks off."""
        begin = time.perf_counter()
        if self.open_stage is not None:
            asked = replace(asked, stage=self.open_stage(asked.queries))
        with tempfile.TemporaryDirectory(prefix="lvm-replay-") as folder:
            try:
                job = write_job(Path(folder), candidate, asked, self.store)
                found = read_measurement(job.result, job.key)
                if found is not None and found.latency_ms.get("p95", 0.0) <= self.limit_ms:
                    self.note(f"replay of {candidate.name}: {found.origin}, measured {found.at}")
                    return found
                fetch_weights(candidate, job)
                with progress.part(f"replay {candidate.name}"):
                    if launched_size() > 1:
                        found = measure_here(job)
                    else:
                        found = finish(self.host.run(job.folder), job)
                        progress.merge(json.loads((job.folder / SPENT).read_text()))
            except MeasurementFailed as failure:
                self.note(f"replay of {candidate.name}: {failure}")
                raise
        seconds = time.perf_counter() - begin
        self.note(f"replay of {candidate.name}: measured in {seconds:.1f} s")
        return found


def write_job(folder: Path, candidate: Candidate, asked: Questions, store: Path = STORE) -> Job:
    """Write what a process needs to measure a candidate; the bank stays where it is.

    Stored weights are not fetched yet (`fetch_weights`). Raises MeasurementFailed if the stored
    files cannot be read.
    """
    model = folder / MODEL
    if candidate.files is not None:
        model.mkdir()
        _read(candidate.files.describe, model)
    else:
        assert candidate.model is not None
        save_model(candidate.model, model)
        if candidate.row_correction is not None:
            write_array(model / CORRECTION, candidate.row_correction)
    correction = model / CORRECTION
    key = measurement_key(
        _read(model_text, model),  # holds the sha256 of the weights
        file_sha256(correction) if correction.is_file() else "none",
        asked,
    )
    job = Job(folder, measurement_path(store.resolve(), key), key, asked)
    with write_errors_name(folder / JOB):
        (folder / JOB).write_bytes(pickle.dumps(job))
    return job


def fetch_weights(candidate: Candidate, job: Job) -> None:
    """Fetch the stored files of a candidate; raises MeasurementFailed if they cannot be read."""
    if candidate.files is not None:
        _read(candidate.files.fetch, job.folder / MODEL)


def finish(code: int, job: Job) -> Measurement:
    """Read the result of a job whose process ended with exit code `code`, -n after signal n.

    Raises MeasurementFailed, in one line, if it ended without a result; OSError if the disk refused
    the result, which is not the candidate's fault.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
        raise MeasurementFailed(f"its process was killed by {name}{hint}")
    if code > 0:
        error = job.folder / ERROR
        reason = (error.read_text() if error.is_file() else "") or "it left no message"
        if code in DISK_ERRNOS:
            raise OSError(code, os.strerror(code), str(error))
        refused = FAILED_WRITE.match(reason)
        if refused and int(refused[1]) in DISK_ERRNOS:
            raise OSError(int(refused[1]), os.strerror(int(refused[1])), refused[2])
        raise MeasurementFailed(f"its process ended with exit code {code}: {reason}")
    found = read_measurement(job.result, job.key)
    if found is None:
        raise MeasurementFailed(f"its process left no readable result at {job.result}")
    return replace(found, origin=MEASURED_NOW)


def _read(reader: Callable[[Path], T], folder: Path) -> T:
    try:
        return reader(folder)
    except ValueError as error:
        raise MeasurementFailed(str(error)) from None


def run_host(arguments: list[str]) -> None:
    """Fork a process for each job until the input ends, or until the parent does."""
    gc.freeze()  # the collector would write to, and so copy, the pages that forks share
    end_with_parent()
    if os.getppid() != int(arguments[0]):
        return  # the parent ended before this process could follow it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be read as an answer
    with stoppable():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which decides
        for line in sys.stdin:
            print(run_in_fork(Path(line.rstrip("\n"))), file=answers, flush=True)


def run_in_fork(folder: Path) -> int:
    """Do the job in `folder` in a fork, which never outlives this call; return its exit code."""
    host = os.getpid()
    child = os.fork()
    if child == 0:
        _work(folder, host)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except Stopped:
        with suppress(ProcessLookupError, ChildProcessError):  # it may have just ended
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise


def measure_here(job: Job) -> Measurement:
    """Do a job in this process, which the other ranks of torchrun assist; return its result.

    Raises MeasurementFailed if it fails. A crash ends the command; candidates measured so far stay
    in the store.
    """
    try:
        return run_job(job)
    except ConnectionError:
        raise  # another rank is lost
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MeasurementFailed(f"its measurement failed: {reason[:500]}") from None


def run_job(job: Job) -> Measurement:
    """Measure the model of a job, write the result and return it."""
    folder = job.folder / MODEL
    path = folder / CORRECTION
    row_correction = np.array(map_array(path)) if path.is_file() else None
    found = measure(load_model(folder), job.asked, row_correction)
    write_measurement(job.result, job.key, found)
    return found


def error_writer(folder: Path) -> ExceptHook:
    """Return an `excepthook` that writes the error that ends a process to `folder`, in one line.

    If even that write fails, the process exits with its errno.
    """

    def write(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = " ".join(f"{kind.__name__}: {error}".split())
        try:
            (folder / ERROR).write_text(line[:500])
        except OSError as refused:
            os._exit(refused.errno or 1)

    return write


def _work(folder: Path, host: int) -> NoReturn:
    """Do a job, then end this process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    sys.excepthook = error_writer(folder)
    end_with_parent()
    if os.getppid() == host:
        progress.reset()
        run_job(pickle.loads((folder / JOB).read_bytes()))
        (folder / SPENT).write_text(json.dumps(progress.report()["parts"]))
    os._exit(0)


if __name__ == "__main__":
    run_host(sys.argv[1:])
