"""Disks that are full or read-only: one clear line or none at all, afterwards the same results."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http import ask, http_server, json_body
from lvm.bank.bank import open_bank
from lvm.shadow.request_log import read_conversations
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import open_windows
from tests.faults.commands import Command, Ended
from tests.faults.disks import PAGE, Disk, mounted
from tests.faults.workplace import steady
from tests.served import baseline_of
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults
KILO = 1024
DATA_FREE = (0, PAGE, 4 * PAGE, 12 * PAGE, 32 * PAGE)
STORE_FREE = (0, 40 * KILO, 160 * KILO, 400 * KILO, 1200 * KILO)
SIZES = ("--model", "memory_gru", "--hidden", "8", "--layers", "2", "--slots", "2", "--chunk", "5")
INGEST = ("ingest", "--source", "../bank", "--bank", "bank")
EXPORT = ("export", "--bank", "../bank", "--ctx", "20", "--report", "export.json")
TRAIN = ("train", "--bank", "../bank", "--ctx", "20", "--epochs", "3", "--report", "train.json")
TRAIN += SIZES
EVAL = ("eval", "--model", "models:/lvm/1", "--controls", "false", "--report", "eval.json")
SHADOW = ("shadow_eval", "--promote", "enabled", "--report", "shadow.json")
COMMANDS = {words[0]: words for words in (INGEST, EXPORT, TRAIN, EVAL, SHADOW)}


@dataclass(frozen=True)
class Place:
    """A working folder beside its bank, with a store; either may lie on a small disk."""

    folder: Path
    store: Path

    def start(self, *words: str, **environment: str) -> Command:
        """Start a command there."""
        logs = self.folder.parent / f"logs-{self.folder.name}"
        return Command(self.folder, self.uri, logs, *words, **environment)

    def run(self, *words: str, **environment: str) -> Ended:
        """Run a command there to its end."""
        return self.start(*words, **environment).ended()

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.store}/mlflow.db"

    def result(self, entry: str) -> Any:
        """Return what the last run of a command reported, without what differs by chance."""
        if entry == "ingest":
            return open_bank(self.folder / "bank", verify=True).sha256
        report = json.loads((self.folder / f"{entry.removesuffix('_eval')}.json").read_text())
        return steady(report)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the store's database."""
        with closing(sqlite3.connect(self.store / "mlflow.db")) as connection:
            return connection.execute(query).fetchall()


def new_store(empty_store: Path, folder: Path) -> None:
    """Copy the created store there, with artifacts of its own."""
    shutil.copy(empty_store, folder / "mlflow.db")
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        place = str(folder / "mlruns" / "0")
        connection.execute("UPDATE experiments SET artifact_location = ?", [place])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, empty_store) -> Place:
    """A place where every command has run once, in the order of COMMANDS."""
    root = tmp_path_factory.mktemp("undisturbed")
    make_bank(root / "bank", num_sequences=3)
    place = Place(root / "work", root / "store")
    for folder in (place.folder, place.store):
        folder.mkdir()
    new_store(empty_store, place.store)
    for words in COMMANDS.values():
        ended = place.run(*words)
        assert ended.code == 0, ended
    return place


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as made:
        yield made


@pytest.fixture(params=["data", "store"])
def small(request, tmp_path, disk, undisturbed, empty_store) -> tuple[Place, Disk]:
    """A place whose data folder or whose tracking store lies on the small disk."""
    shutil.copytree(undisturbed.folder.parent / "bank", tmp_path / "bank")
    other = tmp_path / "elsewhere"
    other.mkdir()
    place = Place(disk.path, other) if request.param == "data" else Place(other, disk.path)
    new_store(empty_store, place.store)
    return place, disk


@pytest.mark.parametrize("entry", COMMANDS)
def test_a_full_disk(tally, small, undisturbed, entry):
    """More is free each time; what failed before stays there, as on a real disk."""
    place, disk = small
    if entry in ("eval", "shadow_eval"):
        assert place.run(*TRAIN).code == 0
        for name in ("windows", "replays", "index"):
            shutil.rmtree(place.folder / "data" / name, ignore_errors=True)
        check_whole(place)  # and sqlite's log is gone, whose megabytes would come free in the test
    is_data = place.folder == disk.path
    codes = []
    for free in DATA_FREE if is_data else STORE_FREE:
        disk.leave(free)
        with tally.injecting(f"disk full: {entry}, {'data' if is_data else 'store'}"):
            ended = place.run(*COMMANDS[entry])
            codes.append(ended.code)
            if ended.code != 0:
                assert "disk" in ended.line(), ended.line()
        disk.empty()  # an sqlite store is not even read without 32 kB of room
        check_whole(place)
    assert codes[0] == 2
    ended = place.run(*COMMANDS[entry])
    assert ended.code == 0, ended
    assert place.result(entry) == undisturbed.result(entry)
    check_whole(place)
    assert left_behind(place.folder) == []


def check_whole(place: Place) -> None:
    """Read all that is read again: it must be whole; the alias must be at a version that is."""
    source = open_bank(place.folder.parent / "bank", verify=True)
    for bank in place.folder.glob("bank"):
        assert open_bank(bank, verify=True).num_rows == source.num_rows
    for windows in place.folder.glob("data/windows/ctx*"):
        open_windows(windows, source)
    pointed = place.rows("SELECT version FROM registered_model_aliases")
    known = place.rows("SELECT version FROM model_versions")
    assert set(pointed) <= set(known)
    assert place.rows("PRAGMA integrity_check") == [("ok",)]


def left_behind(folder: Path) -> list[str]:
    """Return the files that only a broken write leaves."""
    hidden = [path.name for path in folder.rglob(".*")]
    return [name for name in hidden if not name.endswith(".lock")]


def test_a_disk_that_fills_up_in_mid_training(tally, disk, undisturbed, empty_store, tmp_path):
    """The first state finds its place, the next one does not: training goes on from the first."""
    shutil.copytree(undisturbed.folder.parent / "bank", tmp_path / "bank")
    place = Place(disk.path, tmp_path / "store")
    place.store.mkdir()
    new_store(empty_store, place.store)
    assert place.run(*EXPORT).code == 0
    whole = place.run(*TRAIN, "--register", "false")
    assert whole.code == 0, whole
    (fits,) = (disk.path / "data/windows/ctx20").glob("fits")
    assert list(fits.iterdir())
    states = disk.path / "data/training"
    disk.leave(0)
    with tally.injecting("disk full: train, checkpoint"):
        line = place.run(*TRAIN).line()
        assert "disk full: data/training/" in line
    assert list(states.iterdir()) == []
    disk.empty()
    cut_off = place.start(*TRAIN)
    cut_off.wait_for("epoch 1:")
    cut_off.process.kill()
    cut_off.process.join()
    (state,) = states.glob("*.safetensors")
    size = state.stat().st_size
    shutil.rmtree(states)
    disk.leave(size + size // 2)
    with tally.injecting("disk full: train, checkpoint"):
        line = place.run(*TRAIN).line()
        assert "disk full: data/training/" in line
    (state,) = states.iterdir()
    disk.empty()
    ended = place.run(*TRAIN)
    assert ended.code == 0 and "going on from" in ended.printed
    assert place.result("train") == undisturbed.result("train")
    assert not state.exists()


@pytest.mark.parametrize("entry", ["train", "shadow_eval"])
def test_a_full_disk_of_temporary_files(tally, disk, undisturbed, empty_store, tmp_path, entry):
    shutil.copytree(undisturbed.folder.parent / "bank", tmp_path / "bank")
    place = Place(tmp_path / "work", tmp_path / "work")
    place.folder.mkdir()
    new_store(empty_store, place.store)
    if entry == "shadow_eval":
        assert place.run(*TRAIN).code == 0
    for free in (0, 4 * PAGE, 12 * PAGE):
        disk.leave(free)
        with tally.injecting("disk full: temporary files"):
            ended = place.run(*COMMANDS[entry], TMPDIR=str(disk.path))
            assert ended.code == 0 or "disk full" in ended.line()
    ended = place.run(*COMMANDS[entry])
    assert ended.code == 0
    assert place.result(entry) == undisturbed.result(entry)


def test_read_only_folders(tally, small, undisturbed):
    place, disk = small
    assert place.run(*TRAIN).code == 0
    where = "data" if place.folder == disk.path else "store"
    for words in COMMANDS.values():
        with tally.injecting(f"read-only folder: {where}"), disk.read_only():
            line = place.run(*words).line()
            assert "read-only" in line or "cannot be written" in line, line
    for entry, words in COMMANDS.items():
        ended = place.run(*words)
        assert ended.code == 0, ended
        if entry != "shadow_eval":
            assert place.result(entry) == undisturbed.result(entry)
    check_whole(place)


def test_a_request_log_on_a_full_or_read_only_disk(tally, disk, empty_store, tmp_path):
    """The server answers all the while, tells each failure in one line, and loses no request."""
    bank, server_log = make_bank(tmp_path / "bank", num_sequences=3), tmp_path / "server.log"
    folder, num_asked = disk.path / "requests", 0
    folder.mkdir()

    def ask_until(line: str, times: int) -> None:
        nonlocal num_asked
        while server_log.read_text().count(line) < times:
            assert num_asked < 5000
            body = json_body(bank.unit(slice(num_asked, num_asked + 1))[None], session="one")
            assert ask(address, body)[0] == 200
            num_asked += 1

    settings = {"LVM_REQUEST_LOG": str(folder)}
    with (
        baseline_of(bank, empty_store),
        http_server(BASELINE_URI, server_log, **settings) as address,
    ):
        disk.leave(0)
        with tally.injecting("disk full: request log"):
            ask_until("cannot be written", 1)
            disk.empty()
            ask_until("is written again; lost requests: none", 1)
        with tally.injecting("read-only folder: request log"):
            with disk.read_only():
                ask_until("cannot be written", 2)
            ask_until("is written again; lost requests: none", 2)
    assert server_log.read_text().count("LVM_REQUEST_LOG") == 4
    (conversation,) = read_conversations(folder)
    assert len(conversation.parts) == num_asked
