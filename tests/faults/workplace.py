"""A working folder that commands are run in again and again, what they leave in it."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.tracking import MlflowClient

from lvm.tracking import runs
from lvm.tracking.registry import Registry
from tests.faults.commands import Command

registry = Registry()

# A training that was killed after it had registered its model leaves one version more.
CHANGING = frozenset(
    "seconds train/seconds latency_ms measured_at origin run shadow_run model_id version".split()
)


@dataclass(frozen=True)
class Workplace:
    """A folder with its own store, the snapshot that it can be put back to.

    It stays at its place, for a store knows the paths of its artifacts.
    """

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "work"

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def start(self, *words: str) -> Command:
        """Start an entry point."""
        return Command(self.folder, self.uri, self.root / "logs", *words, OMP_NUM_THREADS="1")

    def finish(self, *words: str) -> None:
        """Run an entry point to its good end."""
        ended = self.start(*words).ended(600)
        assert ended.code == 0, ended

    def keep(self) -> None:
        """Make what is there now the snapshot."""
        shutil.copytree(self.folder, self.root / "snapshot", symlinks=True)

    def restore(self) -> None:
        """Put the folder back to the snapshot."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.root / "snapshot", self.folder, symlinks=True)

    def open_store(self) -> MlflowClient:
        """Make this process use the store, whose file is another one after each `restore`."""
        os.environ["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
        os.environ["MLFLOW_TRACKING_URI"] = self.uri
        runs.configure()
        return MlflowClient()

    def check(self) -> None:
        """Check what holds after every command that ended well: no open run, a valid alias."""
        found = self.open_store().search_runs(["0"])
        assert {run.info.status for run in found} <= {"FINISHED", "KILLED", "FAILED"}
        assert "FINISHED" in {run.info.status for run in found}
        for version in registry.aliases().values():
            registry.check_version(version)

    def latest(self, entry: str) -> mlflow.entities.Run:
        """Return the latest finished run of an entry point."""
        query = f"tags.entry = '{entry}' and attributes.status = 'FINISHED'"
        client = self.open_store()
        return client.search_runs(["0"], query, order_by=["start_time DESC"], max_results=1)[0]

    def artifact(self, entry: str, name: str) -> bytes:
        """Return an artifact of the latest finished run of an entry point."""
        return (Path(self.latest(entry).info.artifact_uri) / name).read_bytes()

    def report(self, entry: str) -> Any:
        """Return the report of that run without what no two runs share."""
        return steady(json.loads(self.artifact(entry, "report.json")))


def steady(value: Any) -> Any:
    """Return a report without what no two runs share: times, ids, where a figure is from."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in CHANGING}
    return [steady(one) for one in value] if isinstance(value, list) else value


def files_sha256(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }
