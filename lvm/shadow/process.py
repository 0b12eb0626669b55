"""Measurement in a process of its own, so that no candidate can harm another."""

import json
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lvm.bank.files import file_sha256
from lvm.bank.store import Bank
from lvm.models.weights import model_text, save_model
from lvm.retrieval.rerank import LanePrediction
from lvm.shadow.child import (
    CORRECTION,
    ERROR,
    GROUPS,
    JOB,
    LANE_ARRAYS,
    MODEL,
    QUERIES,
    REMOVED,
    write_foretold,
    write_queries,
)
from lvm.shadow.host import Host
from lvm.shadow.measuring import Measurement, MeasurementFailed
from lvm.shadow.replay import Candidate
from lvm.shadow.store import (
    STORE,
    arrays_sha256,
    measurement_key,
    measurement_path,
    queries_sha256,
    read_measurement,
)
from lvm.system.atomic import write_array
from lvm.system.errors import DISK_ERRNOS
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

Note = Callable[[str], None]
REFUSED_BY_DISK = re.compile(r"OSError: \[Errno (\d+)\] .*: '(.*)'$")


@dataclass(frozen=True)
class Asked:
    """What every candidate of a replay is asked, over which rows."""

    bank: Bank
    windows: Windows
    removed: Queries
    foretold: LanePrediction | None = None


@dataclass(frozen=True)
class Job:
    """A folder that says what to measure, the file to write it to with its key."""

    folder: Path
    result: Path
    key: str


@dataclass(frozen=True)
class Replayer:
    """Measures candidates, each in its own process; what the `store` holds is read from there.

    As a context it ends the processes' host, which is started for the first that is measured.

    `note` is told about each candidate in one line. What is stored as slower than `limit_ms` at P95
    is measured anew: the machine may have been busy. With `foretell`, which is asked for the
    queries with the contexts that a candidate reads, answers are re-ranked by lane as well.
    """

    store: Path = STORE
    note: Note = print
    limit_ms: float = math.inf
    foretell: Callable[[Queries], LanePrediction] | None = None
    host: Host = field(default_factory=Host)

    def __enter__(self) -> "Replayer":
        return self

    def __exit__(self, *error: object) -> None:
        self.host.close()

    def __call__(
        self, candidate: Candidate, bank: Bank, windows: Windows, removed: Queries
    ) -> Measurement:
        """Return the measurement of one candidate; raises MeasurementFailed where it breaks off."""
        with tempfile.TemporaryDirectory(prefix="lvm-replay-") as folder:
            begin = time.perf_counter()
            try:
                job = self._job(Path(folder), candidate, Asked(bank, windows, removed))
                found = read_measurement(job.result, job.key)
                if found is not None and found.latency_ms.get("p95", 0.0) <= self.limit_ms:
                    self.note(f"replay of {candidate.name}: {found.origin}, measured {found.at}")
                    return found
                fetch_weights(candidate, job)
                found = finish(self.host.measure(job.folder), job)
            except MeasurementFailed as failure:
                self.note(f"replay of {candidate.name}: {failure}")
                raise
            seconds = time.perf_counter() - begin
            self.note(f"replay of {candidate.name}: measured in {seconds:.1f} s")
            return found

    def _job(self, folder: Path, candidate: Candidate, asked: Asked) -> Job:
        if self.foretell is not None:
            foretold = self.foretell(asked.removed.as_read(candidate.facts.ctx))
            asked = replace(asked, foretold=foretold)
        return write_job(folder, candidate, asked, self.store)


def write_job(folder: Path, candidate: Candidate, asked: Asked, store: Path = STORE) -> Job:
    """Write what a process needs to measure a candidate; the bank stays where it is.

    The weights of a candidate whose files lie elsewhere are left to `fetch_weights`. Raises
    MeasurementFailed where its files cannot be had.
    """
    described = _describe(candidate, folder / MODEL)
    bank, removed, groups = asked.bank, asked.removed, asked.windows.representative_N
    queries = removed.as_read(candidate.facts.ctx)
    write_array(folder / GROUPS, groups)
    correction, correction_sha256 = folder / MODEL / CORRECTION, "none"
    if correction.is_file():
        correction_sha256 = file_sha256(correction)
    write_queries(folder / QUERIES, queries)
    write_queries(folder / REMOVED, removed)
    if asked.foretold is not None:
        write_foretold(folder, asked.foretold)
    key = measurement_key(
        {
            "model": described,  # holds the sha256 of the weights
            "row_correction": correction_sha256,
            "bank": bank.sha256,
            "groups": arrays_sha256(groups),
            "queries": queries_sha256(queries),
            "removed": queries_sha256(removed),
            "lanes": _foretold_sha256(asked.foretold),
        }
    )
    result = measurement_path(store.resolve(), key)
    what = {"bank": str(bank.path.resolve()), "bank_sha256": bank.sha256}
    (folder / JOB).write_text(json.dumps(what | {"result": str(result), "key": key}))
    return Job(folder, result, key)


def _foretold_sha256(foretold: LanePrediction | None) -> str:
    if foretold is None:
        return "none"
    arrays = [getattr(foretold, name) for name in LANE_ARRAYS]
    tuned = queries_sha256(foretold.val), queries_sha256(foretold.val_removed)
    return " ".join([*tuned, arrays_sha256(*arrays)])


def fetch_weights(candidate: Candidate, job: Job) -> None:
    """Complete a job whose candidate lies elsewhere; raises MeasurementFailed where it cannot."""
    if candidate.files is not None:
        try:
            candidate.files.fetch(job.folder / MODEL)
        except ValueError as error:
            raise MeasurementFailed(str(error)) from None


def _describe(candidate: Candidate, folder: Path) -> str:
    """Write, return what identifies a candidate; a model that is here is written whole."""
    if candidate.files is not None:
        folder.mkdir()
        try:
            candidate.files.describe(folder)
            return model_text(folder)
        except ValueError as error:
            raise MeasurementFailed(str(error)) from None
    assert candidate.model is not None
    save_model(candidate.model, folder)
    if candidate.row_correction is not None:
        write_array(folder / CORRECTION, candidate.row_correction)
    return model_text(folder)


def finish(code: int, job: Job) -> Measurement:
    """Read what the process of a job wrote that ended with exit code `code`, -n after signal n.

    Raises MeasurementFailed, in one line, where it ended without a result; OSError where its disk
    refused the result, which is no fault of the candidate.
    """
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as happens when memory runs out" if name == "SIGKILL" else ""
        raise MeasurementFailed(f"its process was killed by {name}{hint}")
    if code > 0:
        told = job.folder / ERROR
        reason = (told.read_text() if told.is_file() else "") or "it left no message"
        if code in DISK_ERRNOS:
            raise OSError(code, os.strerror(code), str(told))
        refused = REFUSED_BY_DISK.match(reason)
        if refused and int(refused[1]) in DISK_ERRNOS:
            raise OSError(int(refused[1]), os.strerror(int(refused[1])), refused[2])
        raise MeasurementFailed(f"its process ended with exit code {code}: {reason}")
    found = read_measurement(job.result, job.key)
    if found is None:
        raise MeasurementFailed(f"its process left no readable result at {job.result}")
    return Measurement(found.ranks, found.num_non_finite, found.latency_ms, found.seconds, found.at)
