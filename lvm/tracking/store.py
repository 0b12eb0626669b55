"""The checkout and the store of its runs: URI, database, artifacts, run list, stale runs.

A stale run is RUNNING although its process has ended.
"""

import base64
import errno
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlflow
import yaml
from filelock import FileLock
from mlflow.entities import Experiment, LifecycleStage, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from mlflow.utils import mlflow_tags
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from sqlalchemy import URL, create_engine, make_url

from lvm.system.atomic import scratch_folder
from lvm.system.errors import DATABASE_ERRORS
from lvm.system.processes import has_ended

STORE_ERRORS = (MlflowException, *DATABASE_ERRORS)
URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASE, ARTIFACTS = "mlflow.db", "mlruns"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
LOG_LEVELS = {
    "mlflow": logging.WARNING,
    "alembic": logging.WARNING,
    "mlflow.store.db.utils": logging.CRITICAL,  # logs tracebacks of errors that it raises as well
}
# With these retries an epoch of a training waits two minutes for a server that is down (0, 4, 8
# ... 64 s between retries) and nine for one that accepts requests without answering; MLflow's own
# defaults wait 20 minutes. MLflow prints the links to a run on stdout, where a command may print
# JSON; `lvm.tracking.runs.run` prints them on stderr.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "6",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",  # a sample in 10 s takes 15 ms of one core
}
# MLflow's pages (3.17) save a view as a tag of the experiment, read by their own script.
SAVED_VIEW = "mlflow.sharedViewState."
VIEW = "lvm"
EXPERIMENT = "lvm"
FIRST_ID, FIRST_NAME = "0", "Default"  # the experiment that MLflow makes in every store
# Column -> pixels, from left to right: a window of 1280 pixels shows all but the last.
FIXED = {"attributes.`Run Name`": 200, "runDateAndNestInfo": 100}
CHOSEN = {
    "tags.`model`": 105,
    "tags.`ctx`": 60,
    "tags.`phase`": 70,
    "tags.`recipe`": 65,
    "tags.`leaky`": 60,
    "metrics.`best/hit_at_5`": 90,
    "metrics.`test/hit_at_5`": 90,
    "metrics.`shadow/hit_at_5`": 105,
    "tags.`bank`": 110,
}
# The chart of the chart view that stands above those that MLflow makes of every metric.
FIRST_CHART = {
    "type": "LINE",
    "uuid": "lvm-first-chart",
    "metricSectionId": "lvm-first-section",
    "metricKey": "val/hit_at_5",
    "selectedMetricKeys": ["val/hit_at_5"],
    "displayName": "val Hit@5 by epoch",
    "isGenerated": False,
    "deleted": False,
}
FIRST_SECTION = {"uuid": "lvm-first-section", "name": "val", "display": True, "isReordered": True}
PROCESS, ERROR = "process", "error"
UNCLAIMED_SECONDS = 600.0
REASON = "its process ended without a word: killed, or out of memory"
RUNNING = RunStatus.to_string(RunStatus.RUNNING)


def project_root() -> Path:
    """Return the folder of the MLproject file; the working folder if lvm is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "MLproject").is_file() else Path.cwd()


def checkout_root() -> Path:
    """Return the folder of the MLproject file; raises ValueError if there is none."""
    root = project_root()
    if not (root / "MLproject").is_file():
        raise ValueError(
            f"MLproject: is not in {root}, and without it no entry point can launch others; run "
            "this in a checkout of lvm, or the entry points one after another"
        )
    return root


def entry_points() -> set[str]:
    """Return the names of the entry points in the MLproject file; empty outside a checkout."""
    project = Path(__file__).resolve().parents[2] / "MLproject"
    return set(yaml.safe_load(project.read_text())["entry_points"]) if project.is_file() else set()


def is_dirty(folder: Path) -> bool | None:
    """Tell whether a git repository has uncommitted changes; None outside of one."""
    command = ["git", "-C", str(folder), "status", "--porcelain"]
    try:
        status = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return bool(status.stdout) if status.returncode == 0 else None


def configure(root: Path | None = None) -> str:
    """Set the tracking URI: MLFLOW_TRACKING_URI, else mlflow.db in `root` (the project); return it.

    A SQLite database is created under a file lock, in WAL mode, with its artifacts in `mlruns`
    beside it; a relative path in its URI becomes absolute. Raises ValueError on a SQLite URI that
    cannot be opened.
    """
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    own = URL.create("sqlite", database=str((root or project_root()) / DATABASE))
    uri = os.environ.get(URI_VARIABLE) or _text(own)
    path = database_file(uri)
    if path is not None:
        url = make_url(uri).set(database=str(path))
        _prepare_sqlite(url, path)
        uri = _text(url)
    elif uri.startswith("sqlite:///file:"):
        uri = _text(make_url(uri))
    mlflow.set_tracking_uri(uri)
    return uri


def database_file(uri: str) -> Path | None:
    """Return the absolute path of the database file that SQLAlchemy opens for a SQLite URI.

    None for other stores, for a database in memory and for a URI of SQLite's own (`file:`).
    Raises ValueError where `~` stands for the home folder, which neither MLflow nor SQLAlchemy
    expands; sqlalchemy.exc.ArgumentError where `uri` is no URL.
    """
    if not is_sqlite(uri):
        return None
    url = make_url(uri)
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        return None
    path = Path(url.database)
    if path.parts[0].startswith("~"):
        raise ValueError(
            f"{URI_VARIABLE}: '~' is not expanded in {uri}; give the whole path, such as "
            f"sqlite:///{Path.home()}/{path.name}"
        )
    return path.absolute()


def is_sqlite(uri: str) -> bool:
    """Tell whether the store is a database on this machine."""
    return uri.startswith("sqlite")


def ui_command() -> str:
    """Return the shell command that shows the runs of this store."""
    return f"mlflow ui --backend-store-uri {shlex.quote(mlflow.get_tracking_uri())}"


def runs_page(experiment_id: str = FIRST_ID) -> str:
    """Return the path of the run list with lvm's columns."""
    view = f"workflowType=machine_learning&viewStateShareKey={VIEW}"
    return f"/#/experiments/{experiment_id}/runs?{view}"


def name_first_experiment() -> None:
    """Rename the experiment Default, which MLflow makes first, in the project's own store."""
    if database_file(mlflow.get_tracking_uri()) != project_root() / DATABASE:
        return
    client = MlflowClient()
    is_default = client.get_experiment(FIRST_ID).name == FIRST_NAME
    if is_default and client.get_experiment_by_name(EXPERIMENT) is None:
        client.rename_experiment(FIRST_ID, EXPERIMENT)


def own_experiment() -> str:
    """Return the id of the experiment `lvm`, which is made if it is missing.

    Raises ValueError if it was deleted.
    """
    found = MlflowClient().get_experiment_by_name(EXPERIMENT)
    if found is None:
        return str(MlflowClient().create_experiment(EXPERIMENT))
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise ValueError(
            f"experiment {EXPERIMENT}: was deleted; restore it, or name another one in "
            "MLFLOW_EXPERIMENT_NAME"
        )
    return str(found.experiment_id)


def warn_of_moved_artifacts(experiment: Experiment) -> None:
    """Print a warning if the experiment's artifacts lie elsewhere because its store was moved.

    MLflow records their folder as an absolute path, and makes it again where it is gone.
    """
    location = experiment.artifact_location
    if not is_local_uri(location, is_tracking_or_registry_uri=False):
        return
    folder = Path(local_file_uri_to_path(location))
    if not folder.exists():
        cure = link_to_moved(folder)
        if cure is None and folder.parents[1].exists():  # a fresh store has no folder yet
            return
        state = f"which does not exist{cure or ''}"
    else:
        database = database_file(mlflow.get_tracking_uri())
        own = None if database is None else database.parent / ARTIFACTS / folder.name
        if own is None or ARTIFACTS not in folder.parts or not own.exists() or own.samefile(folder):
            return
        here, there = shlex.quote(str(own)), shlex.quote(str(folder))
        state = (
            f"but {own} exists, too, as after moving a store: join the two, "
            f"cp -a {there}/. {here} && rm -r {there} && ln -s {here} {there}"
        )
    print(
        f"warning: the artifacts of experiment {experiment.experiment_id} belong in {folder}, "
        f"{state}; new artifacts are written there",
        file=sys.stderr,
        flush=True,
    )


def missing_folder(location: str) -> Path | None:
    """Return the folder of an artifact location if it is on this machine and does not exist."""
    if not is_local_uri(location, is_tracking_or_registry_uri=False):
        return None
    folder = Path(local_file_uri_to_path(location))
    return None if folder.exists() else folder


def link_to_moved(folder: Path) -> str | None:
    """Return the end of a sentence that says where a missing artifact folder was moved to.

    It was moved with its database if the same folder of `mlruns` exists beside that; the sentence
    gives the command that makes the old path lead there. None if it is not there.
    """
    database = database_file(mlflow.get_tracking_uri())
    if database is None or ARTIFACTS not in folder.parts:
        return None
    depth = folder.parts.index(ARTIFACTS)
    old, new = Path(*folder.parts[: depth + 1]), database.parent / ARTIFACTS
    if not (new / folder.relative_to(old)).exists():
        return None
    for part in folder.relative_to(old).parts:  # the first that is missing
        if not old.exists():
            break
        old, new = old / part, new / part
    parent, target, link = (shlex.quote(str(path)) for path in (old.parent, new, old))
    return (
        f"; its store was moved to {database.parent}: link the old path to the new one, "
        f"mkdir -p {parent} && ln -s {target} {link}"
    )


def saved_view() -> dict[str, str]:
    """Return the tag by which an experiment offers the view `lvm` of its runs: columns, charts."""
    widths = FIXED | CHOSEN
    state = {
        "selectedColumns": list(CHOSEN),
        "columnOrder": list(widths),
        "columnWidths": widths,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "compareRunCharts": [FIRST_CHART],
        "compareRunSections": [FIRST_SECTION],
        "isAccordionReordered": True,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
    return {SAVED_VIEW + VIEW: json.dumps(view)}


def _prepare_sqlite(url: URL, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _create_sqlite(path)
            engine = create_engine(url)
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            engine.dispose()
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        why = f"the database {path} needs a folder that can be written ({error.strerror})"
        raise ValueError(f"{URI_VARIABLE}: {why}; give another one") from error
    except (TypeError, ValueError) as error:  # of a parameter such as timeout
        raise ValueError(f"{URI_VARIABLE}: {_text(url)} cannot be opened: {error}") from error


def _create_sqlite(path: Path) -> None:
    """Create a database whole or not at all; one that `mlflow run` made meanwhile stays."""
    with scratch_folder(path) as scratch:
        made = scratch / path.name
        url = _text(URL.create("sqlite", database=str(made)))
        made_store = SqlAlchemyStore(url, _artifact_root(path.parent))
        made_store.rename_experiment(FIRST_ID, EXPERIMENT)
        made_store.engine.dispose()
        try:
            os.link(made, path)
        except FileExistsError:
            return
        except OSError:  # a disk without hard links
            os.rename(made, path)


def _artifact_root(folder: Path) -> str:
    """Return where a new store writes artifacts, as a URI if MLflow would decode a `%` in it."""
    root = folder.resolve() / ARTIFACTS
    return root.as_uri() if "%" in str(root) else str(root)


def _text(url: URL) -> str:
    """Return a URI as text; with its driver named where a character of the path is escaped.

    For `sqlite:///` MLflow creates the parent folder of the path as it is escaped in the URI.
    """
    text = url.render_as_string(hide_password=False)
    if "%" not in text.partition("?")[0]:
        return text
    return url.set(drivername="sqlite+pysqlite").render_as_string(hide_password=False)


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
