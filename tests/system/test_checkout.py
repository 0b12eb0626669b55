"""The checkout's state, in a real git repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lvm.system.environment import project_root

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit that holds the file under test."""
    (tmp_path / "lvm" / "system").mkdir(parents=True)
    for name in ("__init__.py", "system/__init__.py", "system/environment.py"):
        shutil.copy(ROOT / "lvm" / name, tmp_path / "lvm" / name)
    (tmp_path / "MLproject").write_text("name: lvm\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x@y commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    return tmp_path


def seen_from(folder: Path) -> str:
    """Return what `is_dirty` says in a process that runs from `folder`."""
    code = "from lvm.system.environment import is_dirty; print(is_dirty())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_clean_checkout_is_clean(checkout):
    assert seen_from(checkout) == "False"


@pytest.mark.parametrize("name", ["MLproject", "lvm/new.py"])
def test_a_change_or_a_new_file_makes_it_dirty(checkout, name):
    (checkout / name).write_text("# changed\n")
    assert seen_from(checkout) == "True"


def test_outside_of_git_it_is_unknown(checkout):
    shutil.rmtree(checkout / ".git")
    assert seen_from(checkout) == "None"


def test_the_project_is_where_its_file_lies():
    assert project_root() == ROOT
