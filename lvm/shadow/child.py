"""The work of the process that measures one candidate.

Shapes: Q queries.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lvm.bank.archive import map_array
from lvm.bank.store import open_bank
from lvm.models.weights import load_model
from lvm.retrieval.rerank import LanePrediction
from lvm.shadow.measuring import Questions, measure
from lvm.shadow.store import write_measurement
from lvm.windows.queries import ContextQueries, Queries, as_objects

MODEL, CORRECTION, GROUPS = "model", "row_correction.npy", "representative.npy"
QUERIES, REMOVED = "queries.npz", "removed.npz"
VAL, VAL_REMOVED, LANES = "val.npz", "val_removed.npz", "lanes.npz"
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], None]
JOB, ERROR = "job.json", "error.txt"
LANE_ARRAYS = ("code_N", "log_p_QL", "val_log_p_QL")
QUERY_ARRAYS = ("query_Q", "target_row_Q", "first_row_Q", "sequence_start_Q")


def run(folder: Path) -> None:
    """Measure what the job in `folder` describes."""
    what = json.loads((folder / JOB).read_text())
    bank = open_bank(what["bank"])
    if bank.sha256 != what["bank_sha256"]:
        raise ValueError(f"bank {bank.path}: was replaced while the replay ran")
    correction = folder / MODEL / CORRECTION
    found = measure(
        load_model(folder / MODEL),
        bank,
        np.load(folder / GROUPS, allow_pickle=False),
        Questions(
            _read_queries(folder / QUERIES),
            _read_queries(folder / REMOVED),
            _read_foretold(folder),
        ),
        np.array(map_array(correction)) if correction.is_file() else None,
    )
    write_measurement(Path(what["result"]), what["key"], found)


def told_in(folder: Path) -> ExceptHook:
    """Return an `excepthook` that writes what ended the process to the job's folder, in a line.

    Where that disk refuses even the line, the exit code is the number of its error.
    """

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        line = " ".join(f"{kind.__name__}: {error}".split())
        try:
            (folder / ERROR).write_text(line[:500])
        except OSError as refused:
            os._exit(refused.errno or 1)

    return tell


def write_queries(path: Path, queries: Queries) -> None:
    """Write queries of either kind for the process to read."""
    arrays: dict[str, Any] = {name: getattr(queries, name) for name in QUERY_ARRAYS}
    if isinstance(queries, ContextQueries):
        arrays["num_rows_Q"] = queries.num_rows()
        arrays["context_row"] = np.concatenate([np.zeros(0, np.int64), *queries.context_row_Q])
    np.savez(path, ctx=queries.ctx, **arrays)


def write_foretold(folder: Path, foretold: LanePrediction) -> None:
    """Write the lanes that contexts promise for the process to read."""
    write_queries(folder / VAL, foretold.val)
    write_queries(folder / VAL_REMOVED, foretold.val_removed)
    arrays = {name: getattr(foretold, name) for name in LANE_ARRAYS}
    np.savez(folder / LANES, **arrays)


def _read_foretold(folder: Path) -> LanePrediction | None:
    if not (folder / LANES).is_file():
        return None
    with np.load(folder / LANES, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in LANE_ARRAYS}
    val, removed = (_read_queries(folder / name) for name in (VAL, VAL_REMOVED))
    return LanePrediction(val=val, val_removed=removed, **arrays)


def _read_queries(path: Path) -> Queries:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in QUERY_ARRAYS} | {"ctx": int(stored["ctx"])}
        if "num_rows_Q" not in stored:
            return Queries(**arrays)
        bounds = np.cumsum(stored["num_rows_Q"])[:-1]
        contexts = np.split(stored["context_row"], bounds)
        return ContextQueries(**arrays, context_row_Q=as_objects(contexts))
