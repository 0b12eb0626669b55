"""Runs that say RUNNING though their process is gone."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import RunStatus, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags

from lvm.system.checkout import entry_points, project_root
from lvm.system.processes import has_ended

PROCESS, SQLITE = "process", "sqlite:///"
UNCLAIMED_SECONDS = 600.0
REASON = "its process ended without a word: killed, or out of memory"


def close_abandoned(experiment_ids: Sequence[str] | None = None) -> list[str]:
    """End as KILLED the runs of these experiments (None: all) whose process is gone; return them.

    A run carries its process as a tag. One of `mlflow run` in this checkout that no process has
    claimed for ten minutes is abandoned, too, where the store is a file of this machine.
    """
    client = MlflowClient()
    if experiment_ids is None:
        experiment_ids = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(list(experiment_ids), "attributes.status = 'RUNNING'")
    listed = [run.info.run_id for run in found if _is_abandoned(run)]
    return [run_id for run_id in listed if _close(client, run_id)]


def _close(client: MlflowClient, run_id: str) -> bool:
    """End a run as KILLED; False where others have closed or claimed it since it was listed."""
    if not _is_abandoned(client.get_run(run_id)):
        return False
    # In a batch: `set_tag` raises where another process adds the same tag at the same moment.
    client.log_batch(run_id, tags=[RunTag("error", REASON)])
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
    return True


def _is_abandoned(run: Any) -> bool:
    if run.info.status != RunStatus.to_string(RunStatus.RUNNING):
        return False
    name = run.data.tags.get(PROCESS)
    if name is not None:
        return has_ended(name)
    is_local = mlflow.get_tracking_uri().startswith(SQLITE)
    is_launched = run.data.tags.get(mlflow_tags.MLFLOW_PROJECT_BACKEND) == "local"
    waited = time.time() - run.info.start_time / 1000
    is_late = waited > UNCLAIMED_SECONDS
    return is_local and is_launched and is_late and _is_of_this_checkout(run.data.tags)


def _is_of_this_checkout(tags: Mapping[str, str]) -> bool:
    """Tell whether `mlflow run` was given this checkout: other projects never claim their runs."""
    source = tags.get(mlflow_tags.MLFLOW_SOURCE_NAME, "")  # a path, or file://<repository>#<folder>
    place, _, folder = source.removeprefix("file://").partition("#")
    is_here = place != "" and Path(place, folder).resolve() == project_root()
    return is_here and tags.get(mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT) in entry_points()
