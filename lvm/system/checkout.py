"""The checkout that lvm runs from."""

import subprocess
from pathlib import Path

import yaml


def project_root() -> Path:
    """Return the folder of the MLproject file, or the working folder where lvm lies elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "MLproject").is_file() else Path.cwd()


def checkout_root() -> Path:
    """Return the folder of the MLproject file; raises ValueError where there is none."""
    root = project_root()
    if not (root / "MLproject").is_file():
        raise ValueError(
            f"MLproject: is not in {root}, and without it no entry point can launch others; run "
            "this in a checkout of lvm, or the entry points one after another"
        )
    return root


def entry_points() -> set[str]:
    """Return the names of the entry points in the MLproject file; none outside of a checkout."""
    project = Path(__file__).resolve().parents[2] / "MLproject"
    return set(yaml.safe_load(project.read_text())["entry_points"]) if project.is_file() else set()


def is_dirty() -> bool | None:
    """Tell whether there are changes that the commit does not show; None outside of git."""
    command = ["git", "-C", str(project_root()), "status", "--porcelain"]
    try:
        status = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return bool(status.stdout) if status.returncode == 0 else None
