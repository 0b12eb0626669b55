"""Which RUNNING runs belong to which process: stale runs are closed, launched runs are claimed."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
from mlflow.entities import Run, RunStatus, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags

from lvm.system.checkout import entry_points, project_root
from lvm.system.processes import has_ended
from lvm.tracking.store import is_sqlite

PROCESS, ERROR = "process", "error"
UNCLAIMED_SECONDS = 600.0
REASON = "its process ended without a word: killed, or out of memory"
RUNNING = RunStatus.to_string(RunStatus.RUNNING)


def close_stale_runs(experiment_ids: Sequence[str] | None = None) -> list[str]:
    """End as KILLED the RUNNING runs of these experiments (None: all) whose process is gone.

    Return their ids. A run carries its process as a tag. In a store on this machine, a run that
    `mlflow run` opened in this checkout and that no process claimed for ten minutes is stale, too.
    """
    client = MlflowClient()
    if experiment_ids is None:
        experiment_ids = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(list(experiment_ids), "attributes.status = 'RUNNING'")
    stale = [run.info.run_id for run in found if _is_stale(run)]
    return [run_id for run_id in stale if _close(client, run_id)]


def why_not_claimable(run: Run) -> str | None:
    """Return why a process must not claim the run named by MLFLOW_RUN_ID; None if it may.

    It may if `mlflow run` opened the run, no process has claimed it and it has not ended, unless
    it was closed as stale: building an environment may take longer than a run may stay unclaimed.
    """
    tags, status = run.data.tags, run.info.status
    if status != RUNNING and tags.get(ERROR) != REASON:
        return f"which has ended ({status})"
    if mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT not in tags:
        return "which `mlflow run` did not open"
    return "which another process has claimed" if PROCESS in tags else None


def _close(client: MlflowClient, run_id: str) -> bool:
    """End a run as KILLED; False if it was closed or claimed since it was listed."""
    if not _is_stale(client.get_run(run_id)):
        return False
    # In a batch: `set_tag` raises where another process adds the same tag at the same moment.
    client.log_batch(run_id, tags=[RunTag(ERROR, REASON)])
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
    return True


def _is_stale(run: Run) -> bool:
    if run.info.status != RUNNING:
        return False
    name = run.data.tags.get(PROCESS)
    if name is not None:
        return has_ended(name)
    is_launched = run.data.tags.get(mlflow_tags.MLFLOW_PROJECT_BACKEND) == "local"
    is_late = time.time() - run.info.start_time / 1000 > UNCLAIMED_SECONDS
    is_local = is_sqlite(mlflow.get_tracking_uri())
    return is_local and is_launched and is_late and _is_of_this_checkout(run.data.tags)


def _is_of_this_checkout(tags: Mapping[str, str]) -> bool:
    """Tell whether `mlflow run` ran this checkout; runs of other projects are left alone."""
    source = tags.get(mlflow_tags.MLFLOW_SOURCE_NAME, "")  # a path, or file://<repository>#<folder>
    place, _, folder = source.removeprefix("file://").partition("#")
    is_here = place != "" and Path(place, folder).resolve() == project_root()
    return is_here and tags.get(mlflow_tags.MLFLOW_PROJECT_ENTRY_POINT) in entry_points()
