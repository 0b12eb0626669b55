"""The requests of a server: complete files at any time, sessions, the queries that they were.

Shapes: T time, D vector dim.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lvm.shadow import request_log
from lvm.shadow.query_log import log_queries, read_query_log
from lvm.shadow.request_log import Request, RequestLog, read_conversations
from tests.synthetic import make_bank

DIM = 16


def request(session: str, position: int, sent_TD: np.ndarray) -> Request:
    nothing = np.empty(0)
    return Request(session, position, sent_TD, sent_TD[-1], nothing.astype(int), nothing)


def written(folder: Path, requests: list[Request]) -> Path:
    log = RequestLog(folder)
    for one in requests:
        log.append(one)
    log.flush()
    return folder


def drawn(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, DIM)).astype(np.float32)


@pytest.fixture
def bank(tmp_path):
    return make_bank(tmp_path / "bank", num_twins=0)


def test_a_request_is_logged_with_its_answer(tmp_path):
    sent_TD, answer_D = drawn(3), drawn(1, 1)[0]
    one = Request("a", 4, sent_TD, answer_D, np.array([7, 9]), np.array([0.5, 0.25], np.float32))
    (path,) = written(tmp_path / "log", [one]).glob("*.parquet")
    (line,) = pq.read_table(path).to_pylist()
    assert (line["session"], line["position"], line["rows"]) == ("a", 4, [7, 9])
    assert np.array_equal(line["vectors"], sent_TD) and line["scores"] == [0.5, 0.25]
    assert np.array_equal(line["prediction"], answer_D)
    assert line["time"].timestamp() == pytest.approx(one.time_us / 1e6)


def test_full_files_are_left_and_others_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "FILE_BYTES", 1000)
    log = RequestLog(tmp_path)
    for number in range(20):
        log.append(request("a", number, drawn(1, number)))
        log.flush()
    paths = sorted(tmp_path.glob("*.parquet"))
    assert len(paths) > 2
    numbers = [n for path in paths for n in pq.read_table(path)["number"].to_pylist()]
    assert numbers == list(range(20))
    (one,) = read_conversations(tmp_path)
    assert np.array_equal(np.concatenate(one.parts), np.concatenate([drawn(1, n) for n in numbers]))


KILLED = """
import sys
from pathlib import Path
from tests.shadow.test_request_log import drawn, request
from lvm.shadow import request_log
request_log.FILE_BYTES = 20_000
log, number = request_log.RequestLog(Path(sys.argv[1])), 0
while True:
    log.append(request("a", number, drawn(1, number)))
    log.flush()
    number += 1
    print(number, flush=True)
"""


@pytest.mark.slow
def test_files_are_whole_after_a_kill(tmp_path):
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "log")],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(150)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    (one,) = read_conversations(tmp_path / "log")
    assert len(one.parts) >= int(told[-1]) == 150
    assert len(list((tmp_path / "log").glob("*.parquet"))) > 1


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(request_log._log, "warning", lambda text, *more: lines.append(text % more))

    def full(*parts: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RequestLog(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(request_log.pq, "write_table", full)
        for number in range(3):
            log.append(request("a", number, drawn(1, number)))
            log.flush()
    (line,) = lines
    assert line.startswith("LVM_REQUEST_LOG: ") and "No space left on device" in line
    assert list(tmp_path.iterdir()) == []
    log.append(request("a", 3, drawn(1, 3)))
    log.flush()
    (one,) = read_conversations(tmp_path)
    assert len(one.parts) == 4 and lines[1].endswith("is written again; lost requests: none")


def test_what_waits_is_bounded(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(request_log, "WAITING_BYTES", 10 * DIM * 4)
    log = RequestLog(blocked)  # a file, not a folder
    for number in range(25):
        log.append(request("a", number, drawn(1, number)))
    log.flush()
    blocked.unlink()
    log.flush()
    assert len(pq.read_table(next(blocked.glob("*.parquet")))) == 10


def test_a_thread_writes_without_being_asked(tmp_path):
    seen = threading.Event()
    flush = RequestLog.flush

    class Watched(RequestLog):
        def flush(self) -> None:
            flush(self)
            seen.set()

    Watched(tmp_path).append(request("a", 0, drawn(1)))
    assert seen.wait(30) and len(list(tmp_path.glob("*.parquet"))) == 1


def test_sessions_are_read_as_they_were_at_the_end(tmp_path):
    rows = drawn(20)
    requests = [
        request("a", 0, rows[:3]),
        request("b", 0, rows[5:6]),
        request("", 0, rows),  # a whole context
        request("a", 3, rows[3:4]),
        request("a", 3, rows[3:4]),  # sent again
        request("b", 9, rows[9:10]),  # after a gap
        request("b", 10, rows[10:11]),
        request("a", 2, rows[8:9]),  # another third row
        request("a", 0, rows[15:17]),  # begun anew
    ]
    found = read_conversations(written(tmp_path, requests))
    assert [[len(part_TD) for part_TD in one.parts] for one in found] == [[3], [1], [2]]
    expected = [rows[[0, 1, 8]], rows[5:6], rows[15:17]]
    for one, expected_TD in zip(found, expected, strict=True):
        assert np.array_equal(np.concatenate(one.parts), expected_TD)


def test_the_next_vector_of_a_session_answers_a_request(tmp_path, bank):
    rows = bank.unit(slice(0, 60))
    stranger = drawn(1, 9)
    requests = [
        request("a", 0, 3 * rows[:5]),
        request("a", 5, rows[5:7]),  # answers the first: row 5
        request("a", 7, stranger),  # not in the bank
        request("a", 8, rows[8:9]),  # answers: row 8, whose context has no stranger
        request("a", 9, rows[2:3]),  # is in the context
        request("b", 0, rows[:5]),
        request("b", 5, rows[5:6]),  # repeats the first
        request("c", 0, stranger),
        request("c", 1, rows[20:21]),  # from no row of the bank
    ]
    log = read_query_log(written(tmp_path / "log", requests))
    found = log.in_bank(bank)
    assert found.target_row_Q.tolist() == [5, 8]
    assert [rows.tolist() for rows in found.contexts or []] == [[*range(5)], [*range(7)]]
    assert found.note == (
        "2 queries of 3 sessions; without 1 whose answer is not in the bank; without 1 whose "
        "answer is in the context; without 1 that repeat another; without 1 whose context is not "
        "in the bank"
    )
    assert log_queries(log, bank, 100).target_row_Q.tolist() == [5, 8]
    found.table().to_parquet(tmp_path / "queries.parquet")
    again = log_queries(read_query_log(tmp_path / "queries.parquet"), bank, 100)
    assert again.target_row_Q.tolist() == [5, 8]


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([], "holds no requests-*.parquet, which LVM_REQUEST_LOG writes"),
        ([request("", 0, drawn(3))], "has no query for bank"),
        ([request("a", 0, drawn(3)[:, 1:]), request("a", 3, drawn(1)[:, 1:])], "is not of bank"),
    ],
)
def test_a_folder_without_queries_is_refused(tmp_path, bank, requests, reason):
    folder = tmp_path / "log"
    folder.mkdir()
    written(folder, requests)
    with pytest.raises(ValueError, match=re.escape(reason)) as refused:
        log_queries(read_query_log(folder), bank, 100)
    assert str(refused.value).startswith("queries: ") and "\n" not in str(refused.value)


def test_a_damaged_file_is_named(tmp_path):
    (path,) = written(tmp_path, [request("a", 0, drawn(2))]).glob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"queries: {path} is no file of requests"):
        read_query_log(tmp_path)
