"""The bank of a command with its windows."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm.bank.store import Bank, open_bank
from lvm.corpus.ingest import ingest
from lvm.tracking import datasets
from lvm.tracking.runs import Dataset
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Windows

DEFAULT_BANK = "data/bank"
DEFAULT_CTX = 1000
DEFAULT_SOURCE, DEFAULT_ENCODER = "python-docs", "wordllama"
BANK_HELP = "Bank folder or .npz file."


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


def read_bank(path: str) -> Bank:
    """Open the bank, its hashes recomputed; a missing default one is ingested before."""
    if path == DEFAULT_BANK and not Path(path).exists():
        notice = f"{path} is not there yet: ingesting {DEFAULT_SOURCE}"
        print(notice, file=sys.stderr, flush=True)
        ingest(DEFAULT_SOURCE, DEFAULT_ENCODER, path)
    return open_bank(path, verify=True)


def make_inputs(
    bank: Bank, ctx: int, windows_path: str | None, context: str, **plan: Any
) -> Inputs:
    """Open the windows of a bank, planned here where they are missing; log both as datasets."""
    return log_inputs(bank, ensure_windows(bank, ctx, windows_path, **plan), context)


def log_inputs(bank: Bank, windows: Windows, context: str) -> Inputs:
    """Log a bank with its windows, which have a folder, as datasets of the run."""
    inputs = Inputs(bank, windows, datasets.log_bank(bank, context))
    datasets.log_windows(windows, inputs.windows_path, context)
    return inputs
