"""Stored measurements, addressed by everything that they depend on.

Shapes: N bank rows, Q queries.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lvm.shadow.measuring import COLUMNS, MEASUREMENT, READ_BACK, Measurement
from lvm.system.atomic import atomic_replace, write_errors_name
from lvm.system.cores import machine
from lvm.windows.queries import ContextQueries, Queries

STORE = Path("data/replays")
META = b"lvm"
FACTS = ("num_non_finite", "latency_ms", "seconds", "at")


def measurement_key(parts: Mapping[str, str]) -> str:
    """Return the address (sha256) of what depends on `parts` alone, the way of measuring included.

    `parts` name the digests of the model, its row correction, the bank, the duplicate groups, the
    queries with the model's own contexts, the queries with the contexts that are removed, the lanes
    that contexts promise. Torch and
    the machine belong to it: they change the times, and the last bits of scores.
    """
    way = {"measurement": str(MEASUREMENT), "torch": torch.__version__, "machine": machine()}
    contents = json.dumps({**parts, **way}, sort_keys=True)
    return hashlib.sha256(contents.encode()).hexdigest()


def queries_sha256(queries: Queries) -> str:
    """Return the identity of queries: numbers, targets, contexts, all in order."""
    arrays = [queries.query_Q, queries.target_row_Q, queries.first_row_Q, queries.sequence_start_Q]
    if isinstance(queries, ContextQueries):
        arrays += [queries.num_rows(), np.concatenate([np.zeros(0), *queries.context_row_Q])]
    return arrays_sha256(*arrays, np.array([queries.ctx]))


def arrays_sha256(*arrays: np.ndarray) -> str:
    """Return a hash of the values of arrays with their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def measurement_path(store: Path, key: str) -> Path:
    """Return the file of the store at which the measurement `key` lies, or would."""
    return store / key[:2] / f"{key}.parquet"


def write_measurement(path: Path, key: str, found: Measurement) -> None:
    """Write a measurement as one parquet file; a reader sees all of it or none."""
    columns = {name: np.zeros(0) for name in COLUMNS}
    if found.ranks is not None:
        columns = {name: found.ranks[name].to_numpy() for name in COLUMNS}
    meta = {name: getattr(found, name) for name in FACTS} | {"key": key}
    meta["sha256"] = _contents_sha256(columns, meta)
    table = pa.table(columns).replace_schema_metadata({META: json.dumps(meta).encode()})
    with write_errors_name(path), atomic_replace(path) as made:
        pq.write_table(table, made, compression="zstd")


def read_measurement(path: Path, key: str) -> Measurement | None:
    """Return the measurement `key`; None where there is none, or where it is damaged."""
    try:
        table = pq.read_table(path)
        meta = json.loads(table.schema.metadata[META])
        columns = {name: table[name].to_numpy() for name in COLUMNS}
        recorded = meta.pop("sha256")
        if meta["key"] != key or recorded != _contents_sha256(columns, meta):
            return None
        facts = {name: meta[name] for name in FACTS}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    ranks = None if facts["num_non_finite"] else table.select(COLUMNS).to_pandas()
    return Measurement(ranks=ranks, **facts, origin=READ_BACK)


def _contents_sha256(columns: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    settings = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256((settings + arrays_sha256(*columns.values())).encode()).hexdigest()
