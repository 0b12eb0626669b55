"""MLflow runs: where they are stored, how they begin, how they end."""

import logging
import os
import re
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
from filelock import FileLock
from mlflow.entities import Dataset, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags

from lvm.system.atomic import scratch_folder
from lvm.system.checkout import checkout_root, is_dirty, project_root
from lvm.system.errors import DATABASE_ERRORS
from lvm.system.processes import Stopped, process_identifier, stoppable, terminate_children
from lvm.tracking.run_list import saved_view
from lvm.tracking.stale_runs import PROCESS, SQLITE, close_abandoned

if TYPE_CHECKING:  # most runs draw nothing
    from matplotlib.figure import Figure

StoreError = MlflowException
STORE_ERRORS = (StoreError, *DATABASE_ERRORS)
ENTRY = "entry"
LOG_LEVELS = {
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,  # tracebacks of errors that it raises as well
}
# An epoch of a training can wait two minutes for a server that is away (0, 4, 8 ... 64 s between
# tries), nine for one that takes requests without an answer; MLflow's own patience is 20 minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "6", "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)
GENERATED_NAME = re.compile(r"[a-z]+-[a-z]+-\d+")


def configure(root: Path | None = None) -> str:
    """Set the tracking URI: MLFLOW_TRACKING_URI, else mlflow.db in `root` (the project); return it.

    A sqlite database is created under a file lock, in WAL mode, with its artifacts in `mlruns`
    beside it.
    """
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, value in {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", **PATIENCE}.items():
        os.environ.setdefault(name, value)
    own = f"{SQLITE}{(root or project_root()) / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or own
    if uri.startswith(SQLITE):
        _prepare_sqlite(uri)
    mlflow.set_tracking_uri(uri)
    return uri


def ui_command() -> str:
    """Return the shell command that shows the runs of this store."""
    return f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()}"


@contextmanager
def run(entry: str, parameters: Mapping[str, str]) -> Iterator[str]:
    """Open the launcher's run, or a new one where there is none; yield its id.

    Runs of the same experiment whose process is gone are closed first. `parameters` are logged
    where the launcher has not logged them. The run ends FINISHED; KILLED where a stop signal came;
    FAILED with the tag `error` after any exception, the traceback as the artifact `error.txt`.
    """
    configure()
    dirty = is_dirty()
    tags = {} if dirty is None else {mlflow_tags.MLFLOW_GIT_DIRTY: str(dirty).lower()}
    opened = mlflow.start_run(tags=tags | {PROCESS: process_identifier()}).info
    run_id = opened.run_id
    status = RunStatus.FAILED
    try:
        with stoppable():
            reap([opened.experiment_id])
            _describe_run(entry, parameters)
            yield run_id
        status = RunStatus.FINISHED
    except Stopped as stop:
        status = RunStatus.KILLED
        terminate_children()
        with suppress(*STORE_ERRORS):  # then the next start closes them
            _end_child_runs(run_id)
        mlflow.set_tag("error", f"stopped by {stop.signal_name}")
        raise
    except BaseException as error:
        mlflow.set_tag("error", " ".join(str(error).split()) or type(error).__name__)
        mlflow.log_text(traceback.format_exc(), "error.txt")
        raise
    finally:
        mlflow.end_run(RunStatus.to_string(status))


def reap(experiment_ids: Collection[str] | None = None) -> None:
    """Close the runs of these experiments (None: all) whose process is gone; print which.

    To stderr, as all that is no result: some commands print JSON alone.
    """
    for run_id in close_abandoned(None if experiment_ids is None else list(experiment_ids)):
        print(f"run {run_id} is closed: its process is gone", file=sys.stderr, flush=True)


def refuse_launched_run(reason: str) -> None:
    """Mark the launcher's run FAILED for `reason` where it has not been opened yet."""
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if run_id is not None:
        configure()
        MlflowClient().set_tag(run_id, "error", reason)
        MlflowClient().set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))


def launch(entry: str, parameters: Mapping[str, Any]) -> str:
    """Run an entry point of the project as a nested run, with this very python; return its id.

    Raises ValueError with the child's own reason where it fails, and outside of a checkout.
    """
    root = checkout_root()
    words = " ".join(f"-P {key}={value}" for key, value in parameters.items())
    print(f"\n== {entry} {words}", flush=True)
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    os.environ["PATH"] = os.pathsep.join(folders)
    try:
        submitted = mlflow.projects.run(
            str(root),
            entry,
            parameters=dict(parameters),
            env_manager="local",
            run_name=entry,
        )
    except mlflow.exceptions.ExecutionException:
        reasons = [r.data.tags.get("error", "see above") for r in child_runs(active_run_id())]
        raise ValueError(f"{entry} failed: {reasons[0]}") from None
    return str(submitted.run_id)


@contextmanager
def child_run(name: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Open a run nested under the open one, which is then logged to until the block ends."""
    with mlflow.start_run(run_name=name, nested=True, tags={PROCESS: process_identifier()}):
        mlflow.log_params(dict(parameters))
        yield


def log_config(config: Mapping[str, Any], decided_otherwise: Collection[str] = ()) -> None:
    """Log the resolved configuration as the artifact `config.json`.

    What stood as `auto` among the parameters is also logged as `resolved/<name>`, as is what was
    `decided_otherwise` than typed.
    """
    mlflow.log_dict(dict(config), "config.json")
    typed = mlflow.get_run(active_run_id()).data.params
    left_open = {k for k in config if typed.get(k) == "auto"} | set(decided_otherwise)
    decided = {k: v for k, v in config.items() if k in left_open and v not in (None, "auto")}
    mlflow.log_params({f"resolved/{k}": v for k, v in decided.items()})


def log_metrics(
    figures: Mapping[str, float],
    step: int | None = None,
    model_id: str | None = None,
    dataset: Dataset | None = None,
) -> None:
    """Log figures in one batch, with their model or dataset where there is one.

    Epochs count from 1: MLflow takes a figure without a step for one of every logged model.
    Characters that no metric name may have become underscores.
    """
    named = {NOT_IN_NAMES.sub("_", name): value for name, value in figures.items()}
    mlflow.log_metrics(named, step=step, model_id=model_id, dataset=dataset)


def name_run(words: str) -> None:
    """Put `words` behind the entry point in the run's name, unless its user has named it."""
    known = mlflow.get_run(active_run_id())
    if known.info.run_name == known.data.tags[ENTRY]:
        mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NAME, f"{known.info.run_name} {words}")


def describe_run(markdown: str) -> None:
    """Make `markdown` the description at the top of the run's page."""
    mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NOTE, markdown)


def set_tags(tags: Mapping[str, str]) -> None:
    """Set tags on the active run."""
    mlflow.set_tags(dict(tags))


def log_report(report: Mapping[str, Any], name: str = "report.json") -> None:
    """Log a report as a JSON artifact."""
    mlflow.log_dict(dict(report), name)


def log_text(text: str, name: str) -> None:
    """Log text as an artifact."""
    mlflow.log_text(text, name)


def log_table(table: pd.DataFrame, name: str) -> None:
    """Log a table as an artifact that the run's page shows as one."""
    mlflow.log_table(table, name)


def log_figure(figure: "Figure", name: str) -> None:
    """Log a matplotlib figure as an artifact."""
    mlflow.log_figure(figure, name)


def log_file(name: str, write: Callable[[Path], object]) -> None:
    """Log as an artifact the file that `write` makes at the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        mlflow.log_artifact(str(Path(folder) / name))


def add_shared(add: Callable[[], object]) -> None:
    """Do what runs that start together all do: add one dataset, or one tag of their experiment.

    A store refuses all but the first of those who add the same at one moment; then it is there.
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


def child_runs(run_id: str) -> list[Any]:
    """Return the runs nested under `run_id`, the latest first."""
    return matching(run_id, f"tags.`{mlflow_tags.MLFLOW_PARENT_RUN_ID}` = '{run_id}'")


def matching(run_id: str, query: str) -> list[Any]:
    """Return the runs of the experiment of `run_id` that a search finds, the latest first."""
    experiment = mlflow.get_run(run_id).info.experiment_id
    return list(MlflowClient().search_runs([experiment], query, order_by=["start_time DESC"]))


def _describe_run(entry: str, parameters: Mapping[str, str]) -> None:
    known = mlflow.get_run(active_run_id())
    if GENERATED_NAME.fullmatch(known.info.run_name or ""):
        mlflow.set_tag(mlflow_tags.MLFLOW_RUN_NAME, entry)
    mlflow.set_tag(ENTRY, entry)
    if "error" in known.data.tags:  # closed as abandoned, before this process claimed it
        mlflow.delete_tag("error")
    there = mlflow.get_experiment(known.info.experiment_id).tags
    missing = {k: v for k, v in saved_view().items() if k not in there}
    add_shared(lambda: mlflow.set_experiment_tags(missing))
    mlflow.log_params({k: v for k, v in parameters.items() if k not in known.data.params})


def _prepare_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix(SQLITE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            _create_sqlite(path)
        with closing(sqlite3.connect(path, timeout=20)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def _create_sqlite(path: Path) -> None:
    """Create a database whole or not at all; one that `mlflow run` made meanwhile stays."""
    with scratch_folder(path) as scratch:
        made = scratch / path.name
        made_store = SqlAlchemyStore(f"{SQLITE}{made}", str(path.parent.resolve() / "mlruns"))
        made_store.engine.dispose()
        try:
            os.link(made, path)
        except FileExistsError:
            return
        except OSError:  # a disk without hard links
            os.rename(made, path)


def _end_child_runs(run_id: str) -> None:
    for child in child_runs(run_id):
        if not RunStatus.is_terminated(RunStatus.from_string(child.info.status)):
            MlflowClient().set_terminated(child.info.run_id, RunStatus.to_string(RunStatus.KILLED))
