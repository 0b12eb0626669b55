"""A copy of the project, in which `mlflow run` finds all that it needs."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("MLproject", "conda.yaml", "pyproject.toml", "lvm", "entrypoints")


def copy_project(folder: Path) -> None:
    """Copy what a fresh checkout needs for its entry points into `folder`."""
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
