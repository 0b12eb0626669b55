"""Real SQLite stores: every way to write their URI, a moved one, the saved view of the run list."""

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import zlib
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PROJECT_ENTRY_POINT
from sqlalchemy import URL, make_url

from lvm.tracking import runs
from lvm.tracking.store import (
    SAVED_VIEW,
    VIEW,
    configure,
    database_file,
    missing_folder,
    runs_page,
    ui_command,
)

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_the_view_to_its_experiment_once(store):
    with runs.run("train", {}):
        pass
    tag = MlflowClient().get_experiment("0").tags[SAVED_VIEW + VIEW]
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert {"tags.`phase`", "tags.`ctx`", "metrics.`test/hit_at_5`"} < set(state["selectedColumns"])
    MlflowClient().set_experiment_tag("0", SAVED_VIEW + VIEW, "changed by a user")
    with runs.run("train", {}):
        pass
    assert MlflowClient().get_experiment("0").tags[SAVED_VIEW + VIEW] == "changed by a user"


@pytest.mark.parametrize("name", ["lvm", "mine"])
def test_a_run_belongs_to_the_experiment_lvm_unless_another_is_named(name, store, monkeypatch):
    client = MlflowClient()
    client.rename_experiment("0", "of other projects")
    if name != "lvm":
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        client.create_experiment(name)
    for _ in range(2):
        with runs.run("scaling", {}), runs.child_run("cell", {}):
            pass
    (mine,) = (one for one in client.search_experiments() if one.name == name)
    assert len(client.search_runs([mine.experiment_id])) == 4
    assert client.search_runs(["0"]) == []


def test_the_first_experiment_of_the_projects_own_store_is_named_lvm(store, monkeypatch):
    """`mlflow run` makes the store, and its run, before any code of ours."""
    client = MlflowClient()
    client.rename_experiment("0", "Default")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched_run())
    with runs.run("train", {}):
        pass
    assert client.get_experiment("0").name == "Default", "the store may be that of others"
    monkeypatch.setattr("lvm.tracking.store.project_root", lambda: store)
    monkeypatch.setenv("MLFLOW_RUN_ID", launched_run())
    with runs.run("train", {}):
        pass
    assert client.get_experiment("0").name == "lvm"


def launched_run() -> str:
    tags = {MLFLOW_PROJECT_ENTRY_POINT: "train"}
    return str(MlflowClient().create_run("0", tags=tags).info.run_id)


def test_make_ui_tells_the_address_of_the_view():
    assert runs_page().replace("#", "\\#") in (ROOT / "Makefile").read_text()


def test_default_store_lies_in_the_project_with_its_artifacts(empty_store):
    with sqlite3.connect(empty_store) as connection:
        mode = connection.execute("PRAGMA journal_mode").fetchone()
        place = connection.execute("SELECT artifact_location FROM experiments").fetchall()
    connection.close()
    assert mode == ("wal",)
    assert place == [(str(empty_store.parent / "mlruns" / "0"),)]


def test_the_environment_chooses_the_store(store):
    assert configure() == mlflow.get_tracking_uri() == f"sqlite:///{store}/mlflow.db"
    assert ui_command() == f"mlflow ui --backend-store-uri sqlite:///{store}/mlflow.db"


def test_patience_with_a_server_is_the_users_where_they_set_one(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    configure()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"


SMALL_DISK = """
import resource, sys
from pathlib import Path
from lvm.tracking.store import configure
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
configure(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_store_that_cannot_be_created_whole_is_not_there(tmp_path, monkeypatch):
    """The database of a creation that broke off would be taken for a store by the next command."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode != 0
    assert {path.name for path in tmp_path.iterdir()} <= {"mlruns", "mlflow.db.lock"}
    configure(tmp_path)
    assert (tmp_path / "mlflow.db").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def no_store(monkeypatch):
    """An environment without a store; the one that a test sets is unset at its end."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def logged_text(run_id: str) -> str:
    return mlflow.artifacts.load_text(f"runs:/{run_id}/note.txt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["with space", "50% of it", "p%20q", "a#b", "what?", "Grüße 数据", "a&b=c;d"]
)
def test_a_folder_of_any_name_holds_a_store(name, tmp_path, no_store):
    """Database, lock and artifacts lie in it, and nothing lies beside it."""
    folder = tmp_path / name
    url = URL.create("sqlite", database=str(folder / "m.db"), query={"timeout": "60"})
    no_store.setenv("MLFLOW_TRACKING_URI", url.render_as_string())
    with runs.run("train", {}) as run_id:
        runs.log_artifact("text", "note.txt")
    uri = mlflow.get_tracking_uri()
    assert database_file(uri) == folder / "m.db" and make_url(uri).query == {"timeout": "60"}
    assert logged_text(run_id) == "text"
    assert (folder / "mlruns" / "0" / run_id / "artifacts" / "note.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in folder.iterdir() if "m.db-" not in path.name} <= {
        "m.db",
        "m.db.lock",
        "mlruns",
    }


@pytest.mark.slow
def test_a_relative_path_is_that_of_the_folder_where_the_command_began(
    tmp_path, no_store, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    no_store.setenv("MLFLOW_TRACKING_URI", "sqlite:///stores/m.db")
    assert configure() == f"sqlite:///{tmp_path}/stores/m.db"
    assert (tmp_path / "stores" / "m.db").is_file()


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "http://host/m.db"])
def test_what_is_no_file_is_none(uri):
    assert database_file(uri) is None


@pytest.mark.parametrize("path", ["~/m.db", "~somebody/m.db"])
def test_a_home_folder_is_refused_since_nothing_expands_it(path, tmp_path, no_store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_store.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI: '~' is not expanded in sqlite:"):
        configure()
    assert list(tmp_path.iterdir()) == []


def test_a_parameter_that_sqlite_does_not_take_is_named(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db?timeout=soon")
    with pytest.raises(ValueError, match="timeout=soon cannot be opened: could not convert"):
        configure()


def test_a_store_below_a_file_is_refused(tmp_path, no_store):
    (tmp_path / "file").write_text("")
    no_store.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/m.db")
    with pytest.raises(ValueError, match="needs a folder that can be written"):
        configure()


def test_a_store_that_is_opened_read_only_is_left_as_it_is(store, monkeypatch, tmp_path):
    before = (store / "mlflow.db").read_bytes()
    uri = f"sqlite:///file:{store}/mlflow.db?mode=ro&uri=true"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    assert make_url(configure()).database == f"file:{store}/mlflow.db"
    with pytest.raises(mlflow.MlflowException, match="readonly database"):
        mlflow.start_run()
    assert (store / "mlflow.db").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_the_command_of_the_ui_survives_the_shell(store, monkeypatch):
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "sqlite:///a b/m.db?x=1&y=2")
    words = subprocess.run(
        ["sh", "-c", f"printf '%s|' {ui_command()}"], capture_output=True, text=True
    ).stdout
    assert words == "mlflow|ui|--backend-store-uri|sqlite:///a b/m.db?x=1&y=2|"


def test_a_store_that_was_moved_is_told_with_the_way_to_mend_it(store, monkeypatch, capsys):
    with runs.run("train", {}) as run_id:
        runs.log_artifact("text", "note.txt")
    assert capsys.readouterr().err == ""
    moved = store.parent / "moved here"
    shutil.move(store, moved)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/mlflow.db")
    configure()
    with pytest.raises(ValueError, match="looked in ") as caught:
        runs.read_text(run_id, "note.txt")
    assert f"its store was moved to {moved}" in str(caught.value)
    with runs.run("train", {}):
        pass
    line = capsys.readouterr().err
    assert line.startswith(f"warning: the artifacts of experiment 0 belong in {store}/mlruns/0")
    command = line[line.index("mkdir -p") : line.index("; new artifacts")]
    subprocess.run(["sh", "-c", command], check=True)
    assert missing_folder(f"{store}/mlruns/0") is None
    assert runs.read_text(run_id, "note.txt") == "text"
    with runs.run("train", {}):
        pass
    assert capsys.readouterr().err == ""


def test_artifacts_that_are_in_two_places_after_a_move_are_told(store, monkeypatch, capsys):
    def note(text: str) -> str:
        with runs.run("train", {}) as run_id:
            runs.log_artifact(text, "note.txt")
        return run_id

    first = note("before the move")
    moved = store.parent / "moved here"
    shutil.move(store, moved)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{moved}/mlflow.db")
    configure()
    second = note("in the old folder, made again")
    assert "which does not exist" in capsys.readouterr().err
    third = note("there, too")
    line = capsys.readouterr().err
    old, new = f"{store}/mlruns/0", f"{moved}/mlruns/0"
    assert f"belong in {old}, but {new} exists, too" in line
    command = line[line.index("cp -a") : line.index("; new artifacts")]
    subprocess.run(["sh", "-c", command], check=True)
    texts = [runs.read_text(run_id, "note.txt") for run_id in (first, second, third)]
    assert texts == ["before the move", "in the old folder, made again", "there, too"]
    note("where all are")
    assert capsys.readouterr().err == ""
