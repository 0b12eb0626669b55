"""Files and folders that appear whole, what killed processes leave of them."""

import os
import signal
import subprocess
import sys

import pytest

from lvm.scratch import put_whole, scratch_beside

DYING = """
import os, signal, sys
from pathlib import Path
from lvm.scratch import put_whole
with put_whole(Path(sys.argv[1])) as made:
    made.write_text("half")
    print(made.parent.name, flush=True)
    input()
"""


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_made_takes_the_place_of_what_was_there(tmp_path, is_folder):
    path = tmp_path / "new" / "thing"
    for text in ("first", "second"):
        with put_whole(path) as made:
            if is_folder:
                made.mkdir()
            (made / "part" if is_folder else made).write_text(text)
    assert (path / "part" if is_folder else path).read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "thing"
    path.write_text("before")
    with pytest.raises(OSError, match="disk"), put_whole(path) as made:
        made.write_text("half")
        raise OSError("disk")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="folder"), put_whole(tmp_path / "folder") as made:
        made.touch()
    with pytest.raises(NotADirectoryError), put_whole(tmp_path / "file") as made:
        made.mkdir()
    assert {one.name for one in tmp_path.rglob("*")} == {"folder", "precious", "file"}


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
    with scratch_beside(path) as scratch:
        expected = {scratch.name, names[1], foreign.name, of_another.name}
        assert {one.name for one in tmp_path.iterdir()} == expected
    living.communicate("\n")
    assert path.read_text() == "half"
