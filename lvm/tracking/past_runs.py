"""What runs left behind: those that finished, their artifacts."""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException

from lvm.system.errors import is_environment_error
from lvm.tracking import runs as tracking

FINISHED = RunStatus.to_string(RunStatus.FINISHED)


def find_finished(tag: str, value: str) -> list[str]:
    """Return the finished runs, beside the open one, whose `tag` has this value, latest first."""
    return [run.info.run_id for run in _tagged(tag, value) if run.info.status == FINISHED]


def find_finished_children(
    tag: str, value: str, entry: str, whole: Collection[str] = ()
) -> list[str]:
    """Return the finished runs of `entry` launched by runs whose `tag` has this value.

    Those of `whole` count as finished. The latest launching run comes first; how it ended itself
    does not matter.
    """
    children = [
        child for run in _tagged(tag, value) for child in tracking.child_runs(run.info.run_id)
    ]
    found = [child for child in children if child.data.tags.get(tracking.ENTRY) == entry]
    return [
        child.info.run_id
        for child in found
        if child.info.status == FINISHED or child.info.run_id in whole
    ]


def entry_of(run_id: str) -> str | None:
    """Return the entry that made a run, None for a run of none; ValueError where there is none."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if is_environment_error(error):
            raise
        raise ValueError(f"run {run_id}: there is no such run") from None
    return run.data.tags.get(tracking.ENTRY)


def read_text(run_id: str, name: str) -> str:
    """Return a text artifact of a run; raises ValueError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        return _download(run_id, name, folder).read_text()


def read_json(run_id: str, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON artifact of a run; raises ValueError where there is none."""
    return dict(json.loads(read_text(run_id, name)))


def read_frame(run_id: str, name: str) -> pd.DataFrame:
    """Return a parquet artifact of a run; raises ValueError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        return pd.read_parquet(_download(run_id, name, folder))


def read_array(run_id: str, name: str) -> np.ndarray:
    """Return a .npy artifact of a run; raises ValueError where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        return np.asarray(np.load(_download(run_id, name, folder), allow_pickle=False))


def _download(run_id: str, name: str, folder: str) -> Path:
    try:
        found = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{name}", dst_path=folder)
    except (MlflowException, OSError) as error:
        if is_environment_error(error):
            raise
        raise ValueError(f"run {run_id}: there is no such run with an artifact {name}") from None
    return Path(found)


def _tagged(tag: str, value: str) -> list[Any]:
    """Return the runs of the open one's experiment whose `tag` has this value, latest first."""
    return tracking.matching(tracking.active_run_id(), f"tags.`{tag}` = '{value}'")
