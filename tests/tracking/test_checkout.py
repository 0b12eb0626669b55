"""The checkout's state, in a real git repository."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lvm.tracking.store import is_dirty, project_root

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit."""
    (tmp_path / "lvm").mkdir()
    (tmp_path / "lvm" / "__init__.py").write_text("")
    (tmp_path / "MLproject").write_text("name: lvm\n")
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x@y commit -qm first"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    return tmp_path


def test_a_clean_checkout_is_clean(checkout):
    (checkout / "lvm" / "__pycache__").mkdir()
    (checkout / "lvm" / "__pycache__" / "ignored.pyc").write_bytes(b"")
    assert is_dirty(checkout) is False


@pytest.mark.parametrize("name", ["MLproject", "lvm/new.py"])
def test_a_change_or_a_new_file_makes_it_dirty(checkout, name):
    (checkout / name).write_text("# changed\n")
    assert is_dirty(checkout) is True


def test_outside_of_git_it_is_unknown(checkout):
    shutil.rmtree(checkout / ".git")
    assert is_dirty(checkout) is None


def test_the_project_is_where_its_file_lies():
    assert project_root() == ROOT
