"""The data of a run: its bank and windows, logged as datasets under their own hashes."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient

from lvm.bank.bank import Bank, open_bank
from lvm.corpus.ingest import ingest
from lvm.corpus.reading import SourceOptions, row_limit
from lvm.system.progress import part
from lvm.tracking.runs import active_run_id, add_shared
from lvm.windows.export import ensure_windows, longest_context
from lvm.windows.planning import Windows

DEFAULT_BANK = "data/bank"
DEFAULT_CTX = 1000
DEFAULT_SOURCE, DEFAULT_ENCODER = "python-docs", "wordllama"
DIGEST_LENGTH = 36  # characters that MLflow takes


@dataclass(frozen=True)
class Inputs:
    """A bank with its windows, both logged as datasets of the run."""

    bank: Bank
    windows: Windows
    dataset: Dataset

    @property
    def windows_path(self) -> Path:
        """Return the folder of the windows."""
        assert self.windows.folder is not None
        return self.windows.folder


@part("read bank")
def read_bank(path: str) -> Bank:
    """Open the bank and recompute its hashes; ingest the default bank first if it is missing."""
    if path == DEFAULT_BANK and not Path(path).exists():
        notice = f"{path} is not there yet: ingesting {DEFAULT_SOURCE}"
        print(notice, file=sys.stderr, flush=True)
        rows = SourceOptions(max_rows=row_limit(None, DEFAULT_SOURCE))
        ingest(DEFAULT_SOURCE, DEFAULT_ENCODER, path, rows)
    return open_bank(path, verify=True)


def default_ctx(bank: Bank, most: int = DEFAULT_CTX) -> int:
    """Return the context length where none is given: `most`, or the longest that the bank has."""
    return min(most, longest_context(bank))


def make_inputs(
    bank: Bank, ctx: int, windows_path: str | None, context: str, **plan: Any
) -> Inputs:
    """Open the windows of a bank, planned now if they are missing; log both as datasets."""
    return log_inputs(bank, ensure_windows(bank, ctx, windows_path, **plan), context)


def log_inputs(bank: Bank, windows: Windows, context: str) -> Inputs:
    """Log a bank with its windows, which must have a folder, as datasets of the run."""
    inputs = Inputs(bank, windows, log_bank(bank, context))
    log_windows(windows, inputs.windows_path, context)
    return inputs


def log_bank(bank: Bank, context: str) -> Dataset:
    """Log the bank as a dataset under its own sha256; return the dataset, to log metrics with."""
    mlflow.set_tags({"bank": bank.path.name, "bank_sha256": bank.sha256})
    profile = {"rows": bank.num_rows, "dim": bank.dim, "encoder": bank.encoder}
    return _log_dataset("bank", bank.path, bank.sha256, profile, context)


def log_windows(windows: Windows, path: Path, context: str) -> Dataset:
    """Log the windows as a dataset under their own sha256; tag the run with ctx and leakiness."""
    tags = {"windows_sha256": windows.sha256, "leaky": str(windows.leaky).lower()}
    mlflow.set_tags(tags | {"ctx": windows.ctx})
    profile = {"ctx": windows.ctx, "overlap": windows.overlap, "split": windows.split}
    profile |= {"bank_sha256": windows.bank_sha256}
    return _log_dataset("windows", path, windows.sha256, profile, context)


def log_input(run_id: str, entry: DatasetInput) -> None:
    """Log a dataset as an input of a run, while other runs may be logging the same dataset."""
    add_shared(lambda: MlflowClient().log_inputs(run_id, datasets=[entry]))


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
    log_input(active_run_id(), DatasetInput(dataset, tags))
    return dataset
