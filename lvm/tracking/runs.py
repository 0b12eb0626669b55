"""MLflow runs: how one begins and ends, what is logged to it, what earlier runs logged."""

import hashlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import set_tags as set_tags  # for entry points, which do not import MLflow
from mlflow.entities import Dataset, Run, RunInfo, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags

from lvm.system.atomic import atomic_replace, jsonable, write_array, write_errors_name
from lvm.system.distributed import LAUNCHED
from lvm.system.errors import is_environment_error, one_line
from lvm.system.processes import Stopped, process_identifier, stoppable, terminate_children
from lvm.tracking.store import (
    ERROR,
    PROCESS,
    STORE_ERRORS,
    checkout_root,
    close_stale_runs,
    configure,
    is_dirty,
    link_to_moved,
    missing_folder,
    name_first_experiment,
    own_experiment,
    project_root,
    runs_page,
    saved_view,
    warn_of_moved_artifacts,
    why_not_claimable,
)

ENTRY = "entry"
SPENT = "time.json"  # seconds and matrix products of each part of the command
RUN_ID = "MLFLOW_RUN_ID"
EXPERIMENT_VARIABLES = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
FINISHED, FAILED, KILLED = (
    RunStatus.to_string(status)
    for status in (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.KILLED)
)
MAX_METRIC_NAME, MAX_METRIC_PART = 250, 100
NOT_IN_NAMES = re.compile(r"[^\w\-. :]")
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")


@contextmanager
def run(entry: str, parameters: Mapping[str, str]) -> Iterator[str]:
    """Open the run that `mlflow run` made for this process, or a new one; yield its id.

    A new one belongs to the experiment `lvm`, unless MLFLOW_EXPERIMENT_NAME or _ID names another.
    Stale runs of the same experiment are closed first. `parameters` are logged unless the launcher
    has logged them. The run ends FINISHED; KILLED on a stop signal; FAILED on any exception, with
    the tag `error` and the traceback as the artifact `error.txt`.
    """
    configure()
    release_unclaimable_run()
    dirty = is_dirty(project_root())
    tags = {} if dirty is None else {mlflow_tags.MLFLOW_GIT_DIRTY: str(dirty).lower()}
    tags |= {PROCESS: process_identifier()}
    name_first_experiment()
    opened = mlflow.start_run(experiment_id=_experiment_of_new_run(), tags=tags).info
    status = FAILED
    try:
        with stoppable():
            print_closed_runs([opened.experiment_id])
            _prepare(entry, parameters)
            yield opened.run_id
        status = FINISHED
    except Stopped as stop:
        status = KILLED
        terminate_children()
        with suppress(*STORE_ERRORS):  # the next run closes them
            _end_child_runs(opened.run_id)
        mlflow.set_tag(ERROR, f"stopped by {stop.signal_name}")
        raise
    except BaseException as error:
        mlflow.set_tag(ERROR, " ".join(str(error).split()) or type(error).__name__)
        mlflow.log_text(traceback.format_exc(), "error.txt")
        raise
    finally:
        mlflow.end_run(status)
        _print_link(opened)


def print_closed_runs(experiment_ids: Collection[str] | None = None) -> None:
    """Close the stale runs of these experiments (None: all); print which ones.

    This goes to stderr, since a command may print JSON on stdout.
    """
    for run_id in close_stale_runs(None if experiment_ids is None else list(experiment_ids)):
        print(f"run {run_id} is closed: its process is gone", file=sys.stderr, flush=True)


def release_unclaimable_run() -> None:
    """Unset MLFLOW_RUN_ID, with a warning, unless `mlflow run` opened that run for this process.

    The variable may be left over from another command, whose run must not change.
    """
    run_id = os.environ.get(RUN_ID)
    if run_id is None:
        return
    try:
        reason = why_not_claimable(mlflow.get_run(run_id))
    except MlflowException as error:
        if is_environment_error(error):
            raise
        reason = "which this store does not have"
    if reason is not None:
        del os.environ[RUN_ID]
        print(
            f"warning: {RUN_ID} names run {run_id}, {reason}; this command leaves it alone and "
            "opens a run of its own",
            file=sys.stderr,
            flush=True,
        )


def refuse_launched_run(reason: str) -> None:
    """Mark the run of `mlflow run` FAILED for `reason` unless this process has opened it."""
    if RUN_ID not in os.environ:
        return
    with suppress(ValueError, *STORE_ERRORS):  # the command prints its reason anyway
        configure()
        release_unclaimable_run()
        run_id = os.environ.pop(RUN_ID, None)
        if run_id is not None:
            MlflowClient().set_tag(run_id, ERROR, reason)
            MlflowClient().set_terminated(run_id, FAILED)


def launch(entry: str, parameters: Mapping[str, Any]) -> str:
    """Run an entry point of the project as a nested run, with this Python; return its id.

    Raises ValueError outside of a checkout, and with the reason of the child if it fails.
    """
    root = checkout_root()
    words = " ".join(f"-P {key}={value}" for key, value in parameters.items())
    print(f"\n== {entry} {words}", flush=True)
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    os.environ["PATH"] = os.pathsep.join(folders)
    os.environ.pop(LAUNCHED, None)  # the started command is none of torchrun's ranks
    try:
        submitted = mlflow.projects.run(
            str(root),
            entry,
            parameters=dict(parameters),
            experiment_id=_active_experiment_id(),
            env_manager="local",
            run_name=entry,
        )
    except mlflow.exceptions.ExecutionException:
        reasons = [r.data.tags.get(ERROR, "see above") for r in child_runs(active_run_id())]
        raise ValueError(f"{entry} failed: {reasons[0]}") from None
    return str(submitted.run_id)


@contextmanager
def child_run(name: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Open a nested run; everything in the block is logged to it.

    It ends FINISHED; KILLED on a stop signal; FAILED on any exception, a ValueError with its words
    in the tag `error`.
    """
    with mlflow.start_run(
        run_name=name,
        experiment_id=_active_experiment_id(),
        nested=True,
        tags={PROCESS: process_identifier()},
    ):
        mlflow.log_params(dict(parameters))
        try:
            yield
        except Stopped:
            mlflow.end_run(KILLED)
            raise
        except ValueError as error:
            mlflow.set_tag(ERROR, one_line(str(error)))
            raise


def log_config(config: Mapping[str, Any], decided: Collection[str] = ()) -> None:
    """Log the resolved configuration as the artifact `config.json`.

    Parameters that are `auto` are also logged as `resolved/<name>`, as are the names in `decided`,
    which the command set to other values than were given.
    """
    mlflow.log_dict(dict(config), "config.json")
    given = mlflow.get_run(active_run_id()).data.params
    names = {name for name in config if given.get(name) == "auto"} | set(decided)
    resolved = {k: v for k, v in config.items() if k in names and v not in (None, "auto")}
    mlflow.log_params({f"resolved/{name}": value for name, value in resolved.items()})


def log_metrics(
    metrics: Mapping[str, float],
    step: int | None = None,
    model_id: str | None = None,
    dataset: Dataset | None = None,
) -> None:
    """Log metrics under their `metric_name` in one batch, with their model or dataset.

    Epochs count from 1: MLflow links a metric of step 0 to every logged model of the run.
    """
    named = {metric_name(name): value for name, value in metrics.items()}
    mlflow.log_metrics(named, step=step, model_id=model_id, dataset=dataset)


def metric_name(name: str) -> str:
    """Return a name that MLflow accepts; different names stay different.

    MLflow accepts letters and digits of any script. In a part (between slashes) with other
    characters, or one that MLflow refuses in a path, each other character becomes an underscore and
    the first 8 hex digits of the part's sha256 are appended: `lanes/C#/hit_at_5` becomes
    `lanes/C_-54d28a11/hit_at_5`.
    """
    legal = "/".join(_legal_part(part) for part in name.split("/"))
    return legal if len(legal) <= MAX_METRIC_NAME else _with_hash(legal, MAX_METRIC_NAME - 9)


def _legal_part(part: str) -> str:
    legal = NOT_IN_NAMES.sub("_", part)
    if legal == part and len(part) <= MAX_METRIC_PART and part not in ("", ".", ".."):
        return part
    return _with_hash(part, MAX_METRIC_PART)


def _with_hash(name: str, length: int) -> str:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{NOT_IN_NAMES.sub('_', name)[:length] or '_'}-{digest[:8]}"


def log_artifact(content: Any, name: str) -> None:
    """Log an artifact in the format that its name says.

    Text, a mapping (.json), a matplotlib figure, a table (.parquet; .json for the table view of
    the run's page) or an array (.npy).
    """
    if isinstance(content, str):
        mlflow.log_text(content, name)
    elif isinstance(content, Mapping):
        mlflow.log_dict(dict(content), name)
    elif isinstance(content, pd.DataFrame) and name.endswith(".parquet"):
        _log_file(name, content.to_parquet)
    elif isinstance(content, pd.DataFrame):
        mlflow.log_table(content, name)
    elif isinstance(content, np.ndarray):
        _log_file(name, lambda path: write_array(path, content))
    else:
        mlflow.log_figure(content, name)


def publish_report(report: Mapping[str, Any], path: str | None) -> None:
    """Log the report as `report.json`; also write it to `path`, atomically, unless None."""
    contents = jsonable(report)
    mlflow.log_dict(contents, "report.json")
    if path is None:
        return
    target = Path(path)
    with write_errors_name(target), atomic_replace(target) as made:
        made.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n")
    print(f"report written to {target}")


def name_run(words: str) -> None:
    """Append `words` to the entry point in the run's name, unless the user named the run."""
    known = mlflow.get_run(active_run_id())
    if known.info.run_name == known.data.tags[ENTRY]:
        mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NAME, f"{known.info.run_name} {words}")


def describe_run(markdown: str) -> None:
    """Make `markdown` the description at the top of the run's page."""
    mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NOTE, markdown)


class WarningLog:
    """Prints each warning of a training once; the run's tag `warnings` holds all current ones."""

    def __init__(self, permanent: list[str]) -> None:
        self.permanent = permanent
        self._printed: set[str] = set()

    def update(self, warnings: list[str]) -> list[str]:
        """Print new warnings once; return all current warnings, the permanent ones first."""
        current = [*self.permanent, *warnings]
        for warning in current:
            if warning not in self._printed:
                print(f"warning: {warning}", flush=True)
        self._printed |= set(current)
        mlflow.set_tag("warnings", "; ".join(current) or "none")
        return current


def add_shared(add: Callable[[], object]) -> None:
    """Call `add`, which adds a dataset or a tag of an experiment; retry once if the store refuses.

    If several runs add the same thing at once, a store refuses all but the first.
    """
    try:
        add()
    except STORE_ERRORS:
        add()


def active_run_id() -> str:
    """Return the id of the open run."""
    active = mlflow.active_run()
    assert active is not None, "no run is open"
    return str(active.info.run_id)


def active_runs_page() -> str:
    """Return the path of the run list that has the open run."""
    return runs_page(_active_experiment_id())


def child_runs(run_id: str) -> list[Run]:
    """Return the runs nested under `run_id`, the latest first."""
    return matching(run_id, f"tags.`{mlflow_tags.MLFLOW_PARENT_RUN_ID}` = '{run_id}'")


def matching(run_id: str, query: str) -> list[Run]:
    """Return the runs that a search finds in the experiment of `run_id`, the latest first."""
    experiment = mlflow.get_run(run_id).info.experiment_id
    return list(MlflowClient().search_runs([experiment], query, order_by=["start_time DESC"]))


def find_finished(tag: str, value: str) -> list[str]:
    """Return the finished runs whose `tag` has this value, the latest first; not the open run."""
    return [run.info.run_id for run in _tagged(tag, value) if run.info.status == FINISHED]


def find_finished_children(
    tag: str, value: str, entry: str, whole: Collection[str] = ()
) -> list[str]:
    """Return the finished runs of `entry` whose parent's `tag` has this value.

    Runs in `whole` count as finished. Those of the latest parent come first, whatever the status
    of that parent.
    """
    children = [child for run in _tagged(tag, value) for child in child_runs(run.info.run_id)]
    found = [child for child in children if child.data.tags.get(ENTRY) == entry]
    return [
        child.info.run_id
        for child in found
        if child.info.status == FINISHED or child.info.run_id in whole
    ]


def entry_of(run_id: str) -> str | None:
    """Return the entry point of a run, None if it has none; ValueError if there is no such run."""
    try:
        run = mlflow.get_run(run_id)
    except MlflowException as error:
        if is_environment_error(error):
            raise
        raise ValueError(f"run {run_id}: there is no such run") from None
    return run.data.tags.get(ENTRY)


def read_text(run_id: str, name: str) -> str:
    """Return a text artifact of a run; raises ValueError if it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        return _download(run_id, name, folder).read_text()


def read_json(run_id: str, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON artifact of a run; raises ValueError if it is missing."""
    return dict(json.loads(read_text(run_id, name)))


def read_frame(run_id: str, name: str) -> pd.DataFrame:
    """Return a parquet artifact of a run; raises ValueError if it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        return pd.read_parquet(_download(run_id, name, folder))


def read_array(run_id: str, name: str) -> np.ndarray:
    """Return a .npy artifact of a run; raises ValueError if it is missing."""
    with tempfile.TemporaryDirectory() as folder:
        return np.asarray(np.load(_download(run_id, name, folder), allow_pickle=False))


def _download(run_id: str, name: str, folder: str) -> Path:
    try:
        found = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{name}", dst_path=folder)
    except (MlflowException, OSError) as error:
        if is_environment_error(error):
            raise
        raise ValueError(
            f"run {run_id}: there is no such run with an artifact {name}{_looked_in(run_id, name)}"
        ) from None
    return Path(found)


def _looked_in(run_id: str, name: str) -> str:
    """Return the end of a sentence that says in which folder of this machine a file is missing."""
    try:
        location = mlflow.get_run(run_id).info.artifact_uri
    except MlflowException:
        return ""
    missing = missing_folder(location) or missing_folder(f"{location}/{name}")
    return "" if missing is None else f"; looked in {missing}{link_to_moved(missing) or ''}"


def count_decisions(queries_sha256: str) -> int:
    """Return how many runs of this experiment have decided on these queries; not dry runs."""
    found = _tagged("queries_sha256", queries_sha256)
    return sum("decision" in one.data.tags for one in found)


def _tagged(tag: str, value: str) -> list[Run]:
    return matching(active_run_id(), f"tags.`{tag}` = '{value}'")


def _experiment_of_new_run() -> str | None:
    """Return the id of the experiment `lvm`; None where the run or its experiment is given."""
    is_given = any(os.environ.get(name) for name in (RUN_ID, *EXPERIMENT_VARIABLES))
    return None if is_given else own_experiment()


def _active_experiment_id() -> str:
    return str(mlflow.get_run(active_run_id()).info.experiment_id)


def _prepare(entry: str, parameters: Mapping[str, str]) -> None:
    """Name the open run by its entry point, log its parameters, check its experiment."""
    known = mlflow.get_run(active_run_id())
    if GENERATED_NAME.fullmatch(known.info.run_name or ""):
        mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NAME, entry)
    mlflow.set_tag(ENTRY, entry)
    if ERROR in known.data.tags:  # closed as stale before this process claimed it
        mlflow.delete_tag(ERROR)
    experiment = mlflow.get_experiment(known.info.experiment_id)
    warn_of_moved_artifacts(experiment)
    missing = {k: v for k, v in saved_view().items() if k not in experiment.tags}
    add_shared(lambda: mlflow.set_experiment_tags(missing))
    mlflow.log_params({k: v for k, v in parameters.items() if k not in known.data.params})


def _log_file(name: str, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        mlflow.log_artifact(str(Path(folder) / name))


def _end_child_runs(run_id: str) -> None:
    for child in child_runs(run_id):
        if not RunStatus.is_terminated(RunStatus.from_string(child.info.status)):
            MlflowClient().set_terminated(child.info.run_id, KILLED)


def _print_link(opened: RunInfo) -> None:
    """Print where a tracking server shows the run, on stderr; MLflow prints it on stdout."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("http"):
        page = f"{uri.rstrip('/')}/#/experiments/{opened.experiment_id}/runs/{opened.run_id}"
        print(f"run {opened.run_id}: {page}", file=sys.stderr, flush=True)
