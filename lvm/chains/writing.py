"""Writing of gated chains: a bank, its base first, with the CPESH records in its folder.

Shapes: b rows of one block, D vector dim, E rows of all chains.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.store import Bank, open_bank, write_bank
from lvm.chains.concepts import Chain, Pool, flat_rows
from lvm.corpus.ingest import BATCH_ROWS, row_names
from lvm.system.atomic import atomic_replace

CPESH, REPORT = "cpesh.parquet", "chains.json"
TRAIN = "train"
REPORT_KEYS = {
    "candidates": int,
    "chains": int,
    "gates": list,
    "coherence": dict,
    "cpesh": dict,
    "lanes": dict,
    "notes": list,
}
COHERENCE_KEYS = {"least", "absolute", "percentile", "candidates", "kept"}
CPESH_KEYS = {"rule", "soft_low", "soft_high", "hard_high", "records", "rate", "absolute_rate"}
GATE_KEYS = {"name", "dropped", "reason"}
AGAIN = "delete the bank, ingest it again"


@dataclass(frozen=True, eq=False)
class ChainBank:
    """What is written: chains over a pool, their base, their CPESH records, the report.

    `kind` begins the names of the sequences; row numbers in `records` count the rows of all chains.
    """

    kind: str
    chains: Sequence[Chain]
    pool: Pool
    base: Bank | None
    records: pd.DataFrame
    report: dict[str, Any]


def write_chains(path: Path, contents: ChainBank, created_by: str) -> Bank:
    """Write the bank with CPESH and the report in its folder, which appears whole or not at all.

    The rows of the base come first, unchanged; then each chain as a sequence of one document. The
    two files are no part of the bank's identity: `sha256` is that of vectors and rows.
    """
    base, chains, pool = contents.base, contents.chains, contents.pool
    rows = chain_rows(contents)
    num_base = 0 if base is None else base.num_rows
    if base is not None:
        rows = pd.concat([base_rows(base), rows], ignore_index=True)
    dtype = pool.stored.dtype.name if base is None else base.vectors.dtype.name
    with atomic_replace(path) as folder:
        vectors = _blocks(chains, pool, base)
        bases = () if base is None else (base.sha256, *base.bases)
        write_bank(folder, vectors, rows, pool.encoder, created_by, dtype=dtype, bases=bases)
        names = rows["sequence"].to_numpy()[num_base:]
        numbered_records(contents.records, names, num_base).to_parquet(folder / CPESH, index=False)
        (folder / REPORT).write_text(json.dumps(contents.report, indent=1) + "\n", "utf-8")
    return open_bank(path)


def read_report(path: Path) -> dict[str, Any]:
    """Read what the ingestion of this bank found; raises ValueError where it is not all there."""
    where = path / REPORT
    try:
        found = json.loads(where.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: missing or not JSON; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: must be an object; {AGAIN}")
    wrong = set(found) ^ set(REPORT_KEYS)
    wrong |= {key for key, kind in REPORT_KEYS.items() if not isinstance(found.get(key), kind)}
    if not wrong:
        parts = [("coherence", found["coherence"], COHERENCE_KEYS)]
        parts += [("cpesh", found["cpesh"], CPESH_KEYS)]
        parts += [("gates", gate, GATE_KEYS) for gate in found["gates"]]
        wrong = {name for name, part, keys in parts if set(part) != keys}
    if wrong:
        raise ValueError(f"{where}: {', '.join(sorted(wrong))} missing or not as written; {AGAIN}")
    return dict(found)


def check_records(path: Path, report: dict[str, Any]) -> None:
    """Raise ValueError unless the bank's folder has as many CPESH records as its report counts."""
    where, counted = path / CPESH, report["cpesh"]["records"]
    try:
        found = pq.read_metadata(where).num_rows
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{where}: missing or not parquet; {AGAIN}") from error
    if found != counted:
        raise ValueError(f"{where}: has {found} records, {REPORT} counts {counted}; {AGAIN}")


def chain_rows(contents: ChainBank) -> pd.DataFrame:
    """Return the row table of the chains; with a base, they are pinned to train.

    Chains are numbered on from the sequences of the base, so that a base of chains can be widened.
    """
    chains, pool, base = contents.chains, contents.pool, contents.base
    flat, _ = flat_rows(chains)
    first = 0 if base is None else len(base.sequences)
    numbered = enumerate(chains, start=first)
    names = [f"{contents.kind}:{chain.head}/{number:06d}" for number, chain in numbered]
    lengths = [len(chain.rows) for chain in chains]
    rows = pd.DataFrame({"sequence": np.repeat(np.array(names, dtype=object), lengths)})
    rows["document"] = "chain"
    lanes = np.array([chain.lane or None for chain in chains], dtype=object)
    if any(lanes):
        rows["lane"] = np.repeat(lanes, lengths)
    if pool.text_N is not None:
        rows["text"] = pool.text_N[flat]
    if base is not None:
        rows["split"] = TRAIN
    return rows


def base_rows(base: Bank) -> pd.DataFrame:
    """Return the row table of the base with its own splits, null where it pins none."""
    rows = row_names(base)
    if "split" not in rows:
        rows["split"] = np.full(len(rows), None, dtype=object)
    return rows


def numbered_records(records: pd.DataFrame, sequence_E: np.ndarray, first_row: int) -> pd.DataFrame:
    """Turn row numbers among the chains into those of the bank; name the chain's sequence."""
    numbered = records.copy()
    numbered.insert(0, "sequence", sequence_E[records["expected_row"].to_numpy()])
    for name in ("concept_row", "probe_row", "expected_row"):
        numbered[name] += first_row
    for name in ("soft_rows", "hard_rows"):
        numbered[name] = [[row + first_row for row in rows] for rows in records[name]]
    return numbered


def _blocks(chains: Sequence[Chain], pool: Pool, base: Bank | None) -> Iterator[np.ndarray]:
    if base is not None:
        for start in range(0, base.num_rows, BATCH_ROWS):
            yield np.asarray(base.vectors[start : start + BATCH_ROWS])
    flat, _ = flat_rows(chains)
    for start in range(0, len(flat), BATCH_ROWS):
        yield np.asarray(pool.stored[flat[start : start + BATCH_ROWS]])
