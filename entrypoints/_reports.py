"""JSON reports: an artifact of the run plus a file that the user names."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvm.system.atomic import atomic_replace, jsonable, write_errors_name
from lvm.tracking import runs as tracking

HITS = ("hit_at_1", "hit_at_5", "hit_at_10")
REPORT_HELP = "File to write the JSON report to."


def check_report(path: str | None) -> None:
    """Raise ValueError, before any work, where no report can be written to `path`."""
    if path is None:
        return
    try:
        is_folder = Path(path).is_dir()
        folder = next(one for one in Path(path).absolute().parents if one.exists())
    except OSError as error:  # a name that is too long
        why = f"{error.strerror}; give another file"
        raise ValueError(f"report: {path} cannot be written: {why}") from error
    if is_folder:
        raise ValueError(f"report: {path} is a folder; give a file such as {path}/report.json")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"report: {path} cannot be written, for {folder} {why}; give another file")


def publish(report: Mapping[str, Any], path: str | None) -> None:
    """Log the report as `report.json`; write it to `path`, whole or not at all, unless None."""
    contents = jsonable(report)
    tracking.log_report(contents)
    if path is None:
        return
    target = Path(path)
    with write_errors_name(target), atomic_replace(target) as made:
        made.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n")
    print(f"report written to {target}")
