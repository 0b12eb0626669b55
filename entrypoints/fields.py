"""An option as a field of a dataclass, and what is checked of options before any work."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT_BANK = "data/bank"


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    unset: str = "auto",
) -> Any:
    """Return a dataclass field that becomes a click option.

    `unset` is the word that stands for None; `low` and `high` are inclusive bounds.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "unset": unset}
    return dataclasses.field(default=default, metadata=metadata)


def check_bank(path: str | None) -> None:
    """Raise ValueError if there is no bank at `path`; the default bank can still be made."""
    if path in (None, DEFAULT_BANK) or Path(str(path)).exists():
        return
    raise ValueError(
        f"bank {path}: no such folder or .npz file; make it with `lvm ingest --bank {path}`"
    )


def check_writable(name: str, path: str | None) -> None:
    """Raise ValueError if no file can be written to `path`, the option `name`."""
    if path is None:
        return
    try:
        is_folder = Path(path).is_dir()
        folder = next(one for one in Path(path).absolute().parents if one.exists())
    except OSError as error:  # a name that is too long
        why = f"{error.strerror}; give another file"
        raise ValueError(f"{name}: {path} cannot be written: {why}") from error
    if is_folder:
        raise ValueError(f"{name}: {path} is a folder; give a file such as {path}/{name}.json")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"{name}: {path} cannot be written, for {folder} {why}; give another file")


class Checked:
    """Options that check, before any work, the bank and the path of the report."""

    def __post_init__(self) -> None:
        check_bank(getattr(self, "bank", None))
        check_writable("report", getattr(self, "report", None))
