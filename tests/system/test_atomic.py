"""Files that appear complete or not at all; write errors that name the file; checksums."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvm.bank.files import write_vectors
from lvm.system.atomic import (
    REPLACED,
    atomic_replace,
    is_damaged,
    scratch_folder,
    with_checksum,
    write_array,
    write_errors_name,
)
from lvm.system.processes import Stopped, stoppable

DYING = """
import os, signal, sys
from pathlib import Path
from lvm.system.atomic import atomic_replace
with atomic_replace(Path(sys.argv[1])) as made:
    made.write_text("half")
    print(made.parent.name, flush=True)
    input()
"""

KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from lvm.system.atomic import atomic_replace
os.replace = lambda made, path: os.kill(os.getpid(), signal.SIGKILL)
with atomic_replace(Path(sys.argv[1])) as made:
    made.mkdir()
    (made / "new").touch()
"""


def folder_with(path, name):
    path.mkdir()
    (path / name).touch()
    return path


def content(folder):
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_made_takes_the_place_of_what_was_there(tmp_path, is_folder):
    path = tmp_path / "new" / "thing"
    for text in ("first", "second"):
        with atomic_replace(path) as made:
            if is_folder:
                made.mkdir()
            (made / "part" if is_folder else made).write_text(text)
    assert (path / "part" if is_folder else path).read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "thing"
    path.write_text("before")
    with pytest.raises(OSError, match="disk"), atomic_replace(path) as made:
        made.write_text("half")
        raise OSError("disk")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "file").touch()
    with (
        pytest.raises(IsADirectoryError, match="folder"),
        atomic_replace(tmp_path / "folder") as made,
    ):
        made.touch()
    with pytest.raises(NotADirectoryError), atomic_replace(tmp_path / "file") as made:
        made.mkdir()
    assert {one.name for one in tmp_path.rglob("*")} == {"folder", "precious", "file"}


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    def fail(made, path):
        raise OSError("disk")

    path = folder_with(tmp_path / "thing", "old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"), atomic_replace(path) as made:
        folder_with(made, "new")
    assert content(tmp_path) == {"thing", "thing/old"}


def test_a_stop_signal_between_the_renames_waits(tmp_path, monkeypatch):
    rename = os.rename

    def interrupted(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGTERM)

    path = folder_with(tmp_path / "thing", "old")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(Stopped), stoppable(), atomic_replace(path) as made:
        folder_with(made, "new")
    assert content(tmp_path) == {"thing", "thing/new"}


def killed_between_renames(path):
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(path)])
    assert not path.exists()
    (scratch,) = path.parent.iterdir()
    return scratch


def test_a_folder_whose_replacement_was_killed_is_put_back(tmp_path):
    path = folder_with(tmp_path / "thing", "old")
    killed_between_renames(path)
    with scratch_folder(path):
        assert content(path) == {"old"}
    assert content(tmp_path) == {"thing", "thing/old"}


def test_a_folder_made_since_then_stays(tmp_path):
    path = folder_with(tmp_path / "thing", "old")
    killed_between_renames(path)
    folder_with(path, "another")
    with scratch_folder(path):
        assert content(path) == {"another"}


def test_what_was_replaced_already_is_not_put_back(tmp_path):
    """Such a folder may be half removed, and its user may have removed the new one since."""
    path = folder_with(tmp_path / "thing", "old")
    scratch = killed_between_renames(path)
    shutil.rmtree(scratch / "thing")
    assert (scratch / REPLACED / "old").exists()
    with scratch_folder(path):
        assert not path.exists()


def test_the_remains_of_a_killed_process_go_those_of_a_living_one_stay(tmp_path):
    path = tmp_path / "thing"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", DYING, str(path)]
    dying, living = (subprocess.Popen(words, **pipes) for _ in range(2))
    names = [process.stdout.readline().strip() for process in (dying, living)]
    os.kill(dying.pid, signal.SIGKILL)
    dying.wait()
    foreign = tmp_path / ".thing~another-host~1~2~3.00~x.scratch"
    of_another = tmp_path / names[0].replace(".thing~", ".thing2~")
    for folder in (foreign, of_another):
        folder.mkdir()
    with scratch_folder(path) as scratch:
        expected = {scratch.name, names[1], foreign.name, of_another.name}
        assert {one.name for one in tmp_path.iterdir()} == expected
    living.communicate("\n")
    assert path.read_text() == "half"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(6).reshape(3, 2).T,
        np.zeros((0, 4), np.float32),
        np.array(2.5),
    ],
    ids=str,
)
def test_arrays_are_written_as_numpy_does(tmp_path: Path, array: np.ndarray) -> None:
    write_array(tmp_path / "own.npy", array)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array).reshape(array.shape))
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_vectors_in_blocks_are_written_as_numpy_does(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8))
    blocks = (vectors[start : start + 7] for start in range(0, 50, 7))
    assert write_vectors(tmp_path / "own.npy", blocks, 50, "float16") == (50, 8)
    np.save(tmp_path / "theirs.npy", vectors.astype(np.float16))
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="/own.npy'"):
        (tmp_path / "own.npy").mkdir()
        write_array(tmp_path / "own.npy", np.ones(3))
    with (
        pytest.raises(FileNotFoundError, match="/weights'"),
        write_errors_name(tmp_path / "weights"),
    ):
        save_file({"a": torch.ones(2)}, tmp_path / "no folder" / "weights")
    with (
        pytest.raises(OSError, match="Input/output error: '/array'"),
        write_errors_name(Path("/array")),
    ):
        raise OSError("8 requested and 2 written")


def test_a_sealed_document_tells_every_change() -> None:
    document = {"rows": 3, "share": 0.1, "names": ["a", "\u00e9"], "inner": {"x": None}}
    read = json.loads(json.dumps(with_checksum(document)))
    assert not is_damaged(read) and not is_damaged(with_checksum(with_checksum(document)))
    for changed in ({"rows": 4}, {"share": 0.2}, {"inner": {}}, {"more": 1}):
        assert is_damaged(read | changed)
    assert not is_damaged(document), "those of before carry no hash"
