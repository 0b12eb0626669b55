"""A tracking store that is locked or away: training waits or stops in one line, losing nothing."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import requests
from mlflow.tracking import MlflowClient
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tests.faults.commands import Command
from tests.faults.test_storage import SIZES, Place, new_store
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults
EPOCHS = 40
TRAIN = ("train", "--bank", "../bank", "--ctx", "20", "--patience", "99", *SIZES)
TRAIN += ("--report", "train.json", "--epochs")
AWAY_SECONDS = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a bank; places are made beside it."""
    folder = tmp_path_factory.mktemp("stores")
    make_bank(folder / "bank", num_sequences=3)
    return folder


@pytest.fixture
def place(root, tmp_path_factory, empty_store) -> Place:
    folder = root / f"work-{len(list(root.iterdir()))}"
    folder.mkdir()
    new_store(empty_store, folder)
    return Place(folder, folder)


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Hold the store's database against every other writer."""
    connection = sqlite3.connect(place.store / "mlflow.db", isolation_level=None)
    with closing(connection):
        connection.execute("BEGIN EXCLUSIVE")
        yield


def test_a_store_locked_for_a_moment_is_waited_for(tally, place):
    command = place.start(*TRAIN, "12")
    command.wait_for("epoch 2:")
    with tally.injecting("store locked: for 8 s"), locked(place):
        time.sleep(8)
        assert command.process.is_alive()
    ended = command.ended()
    assert ended.code == 0, ended
    assert logged_epochs(place) == [list(range(1, 13))]


def test_a_store_locked_for_long_stops_the_training_which_goes_on_later(tally, place):
    command = place.start(*TRAIN, "12")
    command.wait_for("epoch 2:")
    with tally.injecting("store locked: for good"), locked(place):
        assert "database is locked" in command.ended().line()
        assert "is locked by another process" in place.run("export", "--bank", "../bank").line()
    assert len(list(place.folder.glob("data/training/*"))) == 1
    ended = place.run(*TRAIN, "12")
    assert ended.code == 0 and "going on from" in ended.printed
    assert logged_epochs(place)[-1] == list(range(1, 13))


def logged_epochs(place: Place) -> list[list[int]]:
    """Return the epochs whose every figure is in the store, a list a run, the oldest first."""
    epochs: dict[str, dict[int, int]] = {}
    query = "SELECT r.run_uuid, m.step, count(*) FROM runs r JOIN metrics m USING (run_uuid) "
    query += "WHERE m.key GLOB 'train/*' OR m.key GLOB 'val/*' "
    for run, step, count in place.rows(query + "GROUP BY 1, 2 ORDER BY r.start_time, 2"):
        epochs.setdefault(run, {})[step] = count
    whole = max(count for steps in epochs.values() for count in steps.values())
    return [[step for step, n in steps.items() if n == whole] for steps in epochs.values()]


class Server:
    """`mlflow server` on a database of its own, which can be killed and started again."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        self.folder, self._log = folder, log
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; return once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", self._port, "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "served")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTEST_"))}
        kept["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command, env=kept, stdout=log, stderr=log, start_new_session=True
            )
        with requests.Session() as session:
            tries = Retry(200, backoff_factor=0.5, backoff_max=0.5)
            session.mount(self.url, HTTPAdapter(max_retries=tries))
            session.get(f"{self.url}/health").raise_for_status()

    def kill(self) -> None:
        """End it with its workers at once."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(place, tmp_path) -> Iterator[Server]:
    made = Server(place.folder, tmp_path / "server.log")
    made.start()
    yield made
    made.kill()


def remote(place: Place, server: Server, *words: str, **environment: str) -> Command:
    logs = place.folder / "logs"
    return Command(place.folder, server.url, logs, *words, **environment)


def test_a_server_away_for_30_seconds_in_mid_training_is_waited_for(tally, place, server):
    command = remote(place, server, *TRAIN, str(EPOCHS))
    command.wait_for("epoch 2:")
    with tally.injecting("tracking server away: for 30 s"):
        server.kill()
        back = threading.Timer(AWAY_SECONDS, server.start)
        back.start()
        ended = command.ended(500)
        back.join()
        assert ended.code == 0, ended
        (run,) = MlflowClient(server.url).search_runs(["0"])
        assert run.info.status == "FINISHED"
        assert logged_epochs(place) == [list(range(1, EPOCHS + 1))]


def test_a_server_away_for_good_stops_the_training_which_goes_on_later(tally, place, server):
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    command = remote(place, server, *TRAIN, str(EPOCHS), **impatient)
    command.wait_for("epoch 2:")
    with tally.injecting("tracking server away: for good"):
        server.kill()
        line = command.ended().line()
        assert "the server does not answer; start it, then run the same command again" in line
        assert len(list(place.folder.glob("data/training/*"))) == 1
    server.start()
    ended = remote(place, server, *TRAIN, str(EPOCHS)).ended()
    assert ended.code == 0 and "going on from" in ended.printed
    assert logged_epochs(place)[-1] == list(range(1, EPOCHS + 1))
