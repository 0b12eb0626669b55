"""Datasets of runs: banks with windows, under hashes of their own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient

from lvm.bank.store import Bank
from lvm.tracking import runs as tracking
from lvm.windows.planning import Windows

DIGEST_LENGTH = 36


def log_bank(bank: Bank, context: str) -> Dataset:
    """Log the bank as a dataset under its own sha256; return the dataset, to go with metrics."""
    mlflow.set_tags({"bank": bank.path.name, "bank_sha256": bank.sha256})
    profile = {"rows": bank.num_rows, "dim": bank.dim, "sha256": bank.sha256}
    return _log_dataset(
        "bank", bank.path, bank.sha256, profile | {"encoder": bank.encoder}, context
    )


def log_windows(windows: Windows, path: Path, context: str) -> Dataset:
    """Log the windows as a dataset under their own sha256; tag the run leaky where they are."""
    tags = {"windows_sha256": windows.sha256, "leaky": str(windows.leaky).lower()}
    mlflow.set_tags(tags | {"ctx": windows.ctx})
    profile = {"ctx": windows.ctx, "overlap": windows.overlap, "split": windows.split}
    profile |= {"bank_sha256": windows.bank_sha256}
    return _log_dataset("windows", path, windows.sha256, profile, context)


def log_input(run_id: str, entry: DatasetInput) -> None:
    """Log a dataset as what a run reads, while other runs may be logging the same one."""
    tracking.add_shared(lambda: MlflowClient().log_inputs(run_id, datasets=[entry]))


def _log_dataset(
    name: str, path: Path, sha256: str, profile: Mapping[str, Any], context: str
) -> Dataset:
    dataset = Dataset(
        name=f"{name}:{path.name}",
        digest=sha256[:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": str(path.resolve())}),
        profile=json.dumps({**profile, "sha256": sha256}),
    )
    tags = [InputTag("mlflow.data.context", context)]
    log_input(tracking.active_run_id(), DatasetInput(dataset, tags))
    return dataset
