"""Fixtures shared by all tests."""

import gc
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from lvm.bank.bank import Bank
from tests.synthetic import make_bank

os.environ["DO_NOT_TRACK"] = "true"  # MLflow reports its use otherwise; tests need no network
os.environ["HF_HUB_OFFLINE"] = "1"  # an unknown encoder is looked for on the hub otherwise
gc.disable()  # until all test files are imported: what they import stays


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later search for garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep torch to one thread: the tests' matrices are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of 6 sequences x 12 documents x 20 rows, 16 dims, 3 lanes, 12 pairs of twins."""
    return make_bank(tmp_path_factory.mktemp("tiny") / "bank")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A created, unused sqlite store: creating one takes MLflow seconds, copying it none."""
    root = tmp_path_factory.mktemp("store")
    from lvm.tracking import runs  # here: MLflow takes seconds that most tests need not spend

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        runs.configure(root)
    return root / "mlflow.db"


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fresh sqlite store, which MLFLOW_TRACKING_URI names."""
    folder = tmp_path / "store"
    copy_store(empty_store, folder, monkeypatch)
    return folder


def copy_store(database: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Copy a store's database into `folder`, which gets its new artifacts; make it the store."""
    from lvm.tracking import runs

    folder.mkdir()
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    shutil.copy(database, folder / "mlflow.db")
    with sqlite3.connect(folder / "mlflow.db") as connection:
        place = str(folder / "mlruns" / "0")
        connection.execute("UPDATE experiments SET artifact_location = ?", [place])
    connection.close()
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        patch.delenv(name, raising=False)
    runs.configure()
