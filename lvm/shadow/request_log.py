"""Requests of a server with their answers: written while it serves, read back as sessions.

A folder holds parquet files, a line per context. Shapes: T rows that a request sent, D vector dim,
K passages.
"""

import atexit
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lvm.bank.bank import FloatArray
from lvm.bank.tables import UNREADABLE
from lvm.system.atomic import atomic_replace
from lvm.system.errors import one_line, one_line_errors

FILES = "requests-*.parquet"
FILE_BYTES = 16 * 2**20  # a file that has so many is complete, the next one begins
WAITING_BYTES = 64 * 2**20  # held in memory while the folder cannot be written
PAUSES = 9.0  # times what a write took, between SHORTEST and LONGEST seconds, until the next
SHORTEST, LONGEST = 0.05, 1.0
SERVER, NUMBER, SESSION, POSITION, VECTORS = "server", "number", "session", "position", "vectors"
_log = logging.getLogger("mlflow.lvm")  # MLflow's servers show this logger's lines


@dataclass(frozen=True)
class Request:
    """One context of a request as it was sent, with its answer.

    `session` is "" for a whole context; else the rows follow the first `position` rows of the
    session. `row_K` and `score_K` are empty if no passages were asked for.
    """

    session: str
    position: int
    sent_TD: FloatArray
    prediction_D: FloatArray
    row_K: NDArray[np.int64]
    score_K: FloatArray
    time_us: int = field(default_factory=lambda: time.time_ns() // 1000)


class RequestLog:
    """Appends requests to the parquet files of a folder, in a thread of its own.

    The newest file is replaced as a whole by each write, so files are complete at any time. The end
    of the server loses the requests since the last write, about a second's: uvicorn ends by the
    signal itself, after which no exit handler runs. While the folder cannot be written, requests
    wait in memory, newer ones beyond WAITING_BYTES are dropped; the first failure is a warning.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._server = folder, uuid.uuid4().hex[:12]
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._waiting: list[Request] = []
        self._num_logged = self._num_files = self._num_dropped = self._waiting_bytes = 0
        self._current: list[pa.Table] = []
        self._is_failing = False
        self._wake = threading.Event()
        threading.Thread(target=self._work, daemon=True, name="request log").start()
        atexit.register(self.flush)

    def append(self, request: Request) -> None:
        """Hand a request to the writing thread; it does not wait and does not fail."""
        size = request.sent_TD.nbytes
        with self._lock:
            if self._waiting_bytes + size > WAITING_BYTES:
                self._num_dropped += 1
                return
            self._waiting.append(request)
            self._waiting_bytes += size
        self._wake.set()

    def flush(self) -> None:
        """Write what waits; a failure is a warning, and everything goes on waiting."""
        with self._writing:
            with self._lock:
                taken, num_dropped = list(self._waiting), self._num_dropped
            if not taken:
                return
            added = [self._table(one, self._num_logged + n) for n, one in enumerate(taken)]
            table = pa.concat_tables([*self._current, *added])
            path = self._folder / f"requests-{self._server}-{self._num_files:06}.parquet"
            try:
                with atomic_replace(path) as made:
                    pq.write_table(table, made)
            except (OSError, pa.ArrowException) as error:
                if not self._is_failing:
                    reason = one_line(str(error))
                    _log.warning("LVM_REQUEST_LOG: %s cannot be written (%s)", path, reason)
                self._is_failing = True
                return
            if self._is_failing:
                lost = num_dropped or "none"
                _log.warning("LVM_REQUEST_LOG: %s is written again; lost requests: %s", path, lost)
            self._is_failing = False
            self._num_logged += len(taken)
            is_full = table.nbytes > FILE_BYTES
            self._current = [] if is_full else [table]
            self._num_files += is_full
            with self._lock:
                del self._waiting[: len(taken)]
                self._waiting_bytes -= sum(one.sent_TD.nbytes for one in taken)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            begin = time.perf_counter()
            self.flush()
            took = time.perf_counter() - begin
            time.sleep(min(LONGEST, max(SHORTEST, PAUSES * took)))

    def _table(self, request: Request, number: int) -> pa.Table:
        vector = pa.list_(pa.float32(), request.sent_TD.shape[1])
        columns = {
            SERVER: pa.array([self._server]),
            NUMBER: pa.array([number]),
            "time": pa.array([request.time_us], pa.timestamp("us", tz="UTC")),
            SESSION: pa.array([request.session]),
            POSITION: pa.array([request.position]),
            VECTORS: pa.array([list(request.sent_TD)], pa.list_(vector)),
            "prediction": pa.array([request.prediction_D], vector),
            "rows": pa.array([request.row_K], pa.list_(pa.int64())),
            "scores": pa.array([request.score_K], pa.list_(pa.float32())),
        }
        return pa.table(columns)


@dataclass
class Conversation:
    """The rows that a session sent: `parts` (T, D), one a request, in order."""

    parts: list[FloatArray] = field(default_factory=list)


@one_line_errors
def read_conversations(folder: Path) -> list[Conversation]:
    """Return the sessions of a folder of requests, in the order of their beginnings.

    Rows that a request replaced are left out, and so are whole contexts, of no session. What
    follows a request that is missing belongs to no conversation. Raises ValueError for a folder
    without files, or a file that is none of a RequestLog.
    """
    open_ones: dict[tuple[str, str], Conversation] = {}
    found: list[Conversation] = []
    for server, session, position, sent_TD in _sent(folder):
        key = (server, session)
        if position == 0:
            open_ones[key] = Conversation()
            found.append(open_ones[key])
        conversation = open_ones.get(key)
        if conversation is None:
            continue
        num_rows = sum(map(len, conversation.parts))
        if position > num_rows:
            del open_ones[key]
            continue
        while position < num_rows:
            last_TD = conversation.parts.pop()
            num_rows -= len(last_TD)
            if num_rows < position:
                sent_TD = np.concatenate([last_TD[: position - num_rows], sent_TD])
        conversation.parts.append(sent_TD)
    return found


def _sent(folder: Path) -> Iterator[tuple[str, str, int, FloatArray]]:
    """Yield server, session, position and rows (T, D) of the requests of sessions, in order."""
    paths = sorted(folder.glob(FILES))
    if not paths:
        raise ValueError(f"queries: {folder} holds no {FILES}, which LVM_REQUEST_LOG writes")
    columns = [SERVER, NUMBER, SESSION, POSITION, VECTORS]
    for path in paths:
        try:
            table = pq.read_table(path, columns=columns, filters=[(SESSION, "!=", "")])
            kind: Any = table.schema.field(VECTORS).type
            dim = kind.value_type.list_size
            for line in range(len(table)):
                one = table.slice(line, 1)
                values = one[VECTORS].combine_chunks().flatten().flatten().to_numpy()
                sent_TD = values.astype(np.float32).reshape(-1, dim)
                names = [one[name][0].as_py() for name in (SERVER, SESSION, POSITION)]
                yield str(names[0]), str(names[1]), int(names[2]), sent_TD
        except (*UNREADABLE, AttributeError) as error:
            raise ValueError(f"queries: {path} is no file of requests ({error})") from None
