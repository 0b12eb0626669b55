"""Runs that say RUNNING though their process is gone."""

import time
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.entities import RunStatus
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags

from lvm.processes import is_gone

PROCESS, SQLITE = "process", "sqlite:///"
UNCLAIMED_SECONDS = 600.0
REASON = "its process ended without a word: killed, or out of memory"


def close_abandoned(experiment_ids: Sequence[str] | None = None) -> list[str]:
    """End as KILLED the runs of these experiments (None: all) whose process is gone; return them.

    A run carries its process as a tag. One of `mlflow run` that no process has claimed for ten
    minutes is abandoned, too, where the store is a file of this machine.
    """
    client = MlflowClient()
    if experiment_ids is None:
        experiment_ids = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(list(experiment_ids), "attributes.status = 'RUNNING'")
    closed = [run.info.run_id for run in found if _is_abandoned(run)]
    for run_id in closed:
        client.set_tag(run_id, "error", REASON)
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
    return closed


def _is_abandoned(run: Any) -> bool:
    name = run.data.tags.get(PROCESS)
    if name is not None:
        return is_gone(name)
    is_local = mlflow.get_tracking_uri().startswith(SQLITE)
    is_launched = run.data.tags.get(mlflow_tags.MLFLOW_PROJECT_BACKEND) == "local"
    waited = time.time() - run.info.start_time / 1000
    return is_local and is_launched and waited > UNCLAIMED_SECONDS
