"""Measure candidates in worker processes, so that one that crashes costs only its own figures."""

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from lvm.bank.files import file_sha256
from lvm.models.weights import model_text, save_model
from lvm.retrieval.rerank import LanePrediction
from lvm.shadow.replay import (
    MEASURED_NOW,
    STORE,
    Candidate,
    Job,
    Measurement,
    MeasurementFailed,
    Questions,
    measurement_key,
    measurement_path,
    read_measurement,
)
from lvm.shadow.worker import CORRECTION, ERROR, JOB, MODEL, SPENT
from lvm.system.atomic import write_array, write_errors_name
from lvm.system.errors import DISK_ERRNOS
from lvm.system.processes import GRACE_SECONDS
from lvm.system.progress import merge, part
from lvm.windows.planning import Queries

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
    command = [sys.executable, "-m", "lvm.shadow.worker", str(os.getpid())]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


@dataclass(frozen=True)
class Replayer:
    """Measures each candidate in a process of its own, or reads it from the `store`.

    Use it as a context manager, which ends the host process. `note` receives one status line per
    candidate. Cached results slower than `limit_ms` at P95 are measured again, since the machine
    may have been busy. If `predict_lanes` is given, it is called with the queries as a candidate
    reads them, and the answers are re-ranked by lane as well.
    """

    store: Path = STORE
    note: Callable[[str], None] = print
    limit_ms: float = math.inf
    predict_lanes: Callable[[Queries], LanePrediction] | None = None
    host: Host = field(default_factory=Host)

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *error: object) -> None:
        self.host.close()

    def __call__(self, candidate: Candidate, asked: Questions) -> Measurement:
        """Return the measurement of one candidate; raises MeasurementFailed if it breaks off."""
        begin = time.perf_counter()
        if self.predict_lanes is not None:
            asked = replace(asked, lanes=self.predict_lanes(asked.queries))
        with tempfile.TemporaryDirectory(prefix="lvm-replay-") as folder:
            try:
                job = write_job(Path(folder), candidate, asked, self.store)
                found = read_measurement(job.result, job.key)
                if found is not None and found.latency_ms.get("p95", 0.0) <= self.limit_ms:
                    self.note(f"replay of {candidate.name}: {found.origin}, measured {found.at}")
                    return found
                fetch_weights(candidate, job)
                with part(f"replay {candidate.name}"):
                    found = finish(self.host.run(job.folder), job)
                    merge(json.loads((job.folder / SPENT).read_text()))
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
