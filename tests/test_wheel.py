"""The wheel: the files that it contains, its commands without a checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PACKAGES = ("lvm", "entrypoints")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The contents of a wheel that was built from a copy of the project."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist"]
    command = [sys.executable, "-m", "pip", "wheel", ".", *options]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").iterdir()
    folder = tmp_path_factory.mktemp("site")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files(folder: Path) -> set[str]:
    """Return the paths of the files of both packages below `folder`."""
    found = (path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_both_packages(site):
    assert files(site) == files(ROOT)
    assert {"lvm/py.typed", "lvm/gates.yaml", "lvm/phases.yaml"} <= files(site)


def test_a_command_that_launches_others_says_that_it_needs_a_checkout(site, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(site)
    command = [sys.executable, "-m", "entrypoints.main", "--size", "tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    reason = f"error: MLproject: is not in {tmp_path}, and without it no entry point can launch"
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(reason)
    assert (tmp_path / "mlflow.db").is_file()
