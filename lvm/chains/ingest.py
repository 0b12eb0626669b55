"""Ingestion of chains: read the source, apply the gates, write the bank with its CPESH records.

Shapes: b rows of one block, D vector dim, E rows of all chains.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lvm.bank.bank import Bank, FloatArray, open_bank, write_bank
from lvm.bank.files import file_sha256
from lvm.bank.tables import TABLES, kind_of
from lvm.chains.anchored import AnchorPlan, anchored_candidates
from lvm.chains.cpesh import Mined, mine
from lvm.chains.filters import CoherenceRule, Gated, coherence_rule, pass_gates
from lvm.chains.ontologies import WORDNET_FILES, edge_files, ontology_kind
from lvm.chains.walks import (
    Candidates,
    Chain,
    GraphWalk,
    HierarchyWalk,
    Pool,
    edge_candidates,
    flat_rows,
    neighbour_candidates,
    ontology_candidates,
)
from lvm.corpus.encoders import Encoder, load_encoder
from lvm.corpus.ingest import BATCH_ROWS, existing_bank, holds_vectors, row_names
from lvm.system.atomic import atomic_replace
from lvm.system.errors import one_line_errors
from lvm.system.settings import ChainRules, read_chain_rules

KINDS = ("ontology", "anchored", "graph")
PERCENTILES = (5, 25, 50, 75, 95)  # of coherences, in the report
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


@dataclass(frozen=True)
class ChainPlan:
    """Options of an ingestion of chains.

    source: ontology:<file>, anchored:<bank> or graph:<edges or bank>.
    lanes: names, or for an ontology <subtree>=<lane> pairs, comma-separated.
    root: names or identifiers of an ontology, comma-separated; None for all roots.
    coherence: auto, a cosine, a percentile p40, or both.
    """

    source: str
    encoder: str
    bank: str
    base: str | None = None
    pool: str | None = None
    lanes: str | None = None
    root: str | None = None
    walk: str = "both"
    queries: str | None = None
    anchor: float | None = None
    neighbours: int = 10
    coherence: str = "auto"
    max_chains: int | None = None
    seed: int = 0

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        return self.source.partition(":")[2]

    @property
    def reads_edges(self) -> bool:
        """Tell whether the source is a file of edges."""
        return self.kind == "graph" and kind_of(self.place) in TABLES


def holds_chains(source: str) -> bool:
    """Tell whether a source gives chains: ontology:..., anchored:..., graph:..."""
    return source.partition(":")[0] in KINDS


@one_line_errors
def check_plan(plan: ChainPlan) -> None:
    """Raise ValueError if an option is missing, or if the source does not read it."""
    kind = plan.kind
    if not plan.place:
        raise ValueError(f"source {plan.source!r}: must be {kind}:<path>")
    if kind == "anchored" and (plan.queries is None or plan.base is None):
        raise ValueError(
            f"source {plan.source}: needs queries, the per_query.parquet of an eval run with "
            "split=val, beside base, the bank of these queries"
        )
    for option, read_by in (("queries", "anchored"), ("anchor", "anchored"), ("root", "ontology")):
        if getattr(plan, option) is not None and kind != read_by:
            raise ValueError(f"{option}: is only read by source={read_by}:...; omit it")
    if plan.pool is not None and not plan.reads_edges:
        raise ValueError("pool: is only read by source=graph:<edge file>; omit it")


def listed(text: str | None) -> tuple[str, ...]:
    """Parse comma-separated names."""
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@one_line_errors
def lane_mapping(text: str | None) -> tuple[tuple[str, str], ...]:
    """Parse comma-separated <subtree>=<lane> pairs."""
    pairs = [part.rpartition("=") for part in listed(text)]
    wrong = [part for part in pairs if not (part[0] and part[2])]
    if wrong:
        raise ValueError(
            f"lanes {text!r}: for an ontology it must be <subtree>=<lane>,..., or none for the "
            "source's own lanes"
        )
    return tuple((subtree.strip(), lane.strip()) for subtree, _, lane in pairs)


def created_by(plan: ChainPlan, base: Bank | None, rules: ChainRules) -> str:
    """Return a text of all that decides the contents: settings, thresholds, hashes of inputs."""
    parts = [f"{key}={value}" for key, value in asdict(plan).items() if key != "bank"]
    if plan.kind != "ontology" and holds_vectors(plan.place):
        parts.append(f"sha256={open_bank(plan.place).sha256}")
    else:
        parts.append(f"sha256={_digest(_read_files(plan))}")
    if plan.pool is not None:
        parts.append(f"pool_sha256={open_bank(plan.pool).sha256}")
    if plan.queries is not None and Path(plan.queries).is_file():
        parts.append(f"queries_sha256={file_sha256(Path(plan.queries))}")
    if base is not None:
        parts.append(f"base_sha256={base.sha256}")
    thresholds = hashlib.sha256(repr(rules).encode()).hexdigest()[:12]
    return "; ".join([*parts, f"gates={thresholds}"])


def _read_files(plan: ChainPlan) -> list[Path]:
    """Return the files of a source that is not a bank; raise ValueError if there are none."""
    kind, place = plan.kind, Path(plan.place)
    if kind == "ontology" and ontology_kind(place) == "wordnet":
        names = [place / name for name in (*WORDNET_FILES, "lexnames")]
    elif kind == "ontology" or (plan.reads_edges and place.is_file()):
        names = edge_files(place)
    else:
        wanted = "an edge file or a bank folder" if kind == "graph" else "a bank folder"
        raise ValueError(f"source {kind}:{place}: no such source; give {wanted}")
    return [name for name in names if name.is_file()]


def _digest(paths: Sequence[Path]) -> str:
    hashes = " ".join(file_sha256(path) for path in paths)
    return hashlib.sha256(hashes.encode()).hexdigest()


def find_candidates(
    plan: ChainPlan, base: Bank | None, rules: ChainRules
) -> tuple[Candidates, Encoder | None]:
    """Return the chains of the source before the gates, and the encoder if they are texts.

    Raises ValueError for an unreadable source, or an encoder that is not that of the base.
    """
    pool, model = _open_pool(plan, base), None
    if pool is None:
        model = load_encoder(plan.encoder)
        if base is not None:
            _check_same(base, model.name, model.dim, f"encoder {plan.encoder}")
    if plan.kind == "ontology":
        roots, lanes = listed(plan.root), lane_mapping(plan.lanes)
        walk = HierarchyWalk(plan.walk, roots, lanes, plan.max_chains, plan.seed)
        return ontology_candidates(Path(plan.place), walk, rules), model
    names = listed(plan.lanes)
    graph = GraphWalk(names, plan.neighbours, plan.max_chains, plan.seed)
    if plan.reads_edges:
        return edge_candidates(Path(plan.place), pool, graph, rules), model
    assert pool is not None
    if plan.kind == "graph":
        return neighbour_candidates(pool, graph, rules), None
    assert base is not None and plan.queries is not None
    anchors = AnchorPlan(
        plan.queries, names, plan.anchor, plan.neighbours, plan.max_chains, plan.seed
    )
    return anchored_candidates(pool, base, anchors, rules), None


def _open_pool(plan: ChainPlan, base: Bank | None) -> Bank | None:
    """Return the bank whose rows become chains; None if the source is text."""
    is_bank = plan.kind != "ontology" and not plan.reads_edges
    where = plan.place if is_bank else plan.pool
    if where is None:
        return None
    pool = open_bank(where, verify=True)
    if base is not None:
        _check_same(base, pool.encoder, pool.dim, f"pool {where}")
    return pool


def _check_same(base: Bank, encoder: str, dim: int, what: str) -> None:
    if (base.encoder, base.dim) != (encoder, dim):
        raise ValueError(
            f"base {base.path}: its vectors are of encoder {base.encoder} ({base.dim} dims), those "
            f"of {what} of {encoder} ({dim} dims); take one encoder for both"
        )


@dataclass(frozen=True)
class ChainReport:
    """Report of an ingestion of chains; `gates` are dicts of name, dropped, reason, in order."""

    path: str
    source: str
    encoder: str
    created_by: str
    sha256: str
    base_rows: int
    rows: int
    dim: int
    candidates: int
    chains: int
    gates: list[dict[str, Any]]
    coherence: dict[str, Any]
    cpesh: dict[str, Any]
    lanes: dict[str, int]
    notes: list[str]
    reused: bool
    seconds: float


def ingest_chains(plan: ChainPlan, rules: ChainRules | None = None) -> ChainReport:
    """Write the bank of `plan`; reuse the bank at its path if it was made in the same way.

    Raises ValueError, and writes nothing, for bad input, if the gates leave no chain, or if fewer
    than `min_attach` of the chains have a CPESH record.
    """
    started = time.monotonic()
    rules = rules or read_chain_rules()
    check_plan(plan)
    rule = coherence_rule(plan.coherence, rules)
    base = None if plan.base is None else open_bank(plan.base, verify=True)
    made_by = created_by(plan, base, rules)
    path = Path(plan.bank)
    reused = path.exists()
    if reused:
        bank = existing_bank(path, made_by)
        found = read_report(path)
        check_records(path, found)
    else:
        candidates, model = find_candidates(plan, base, rules)
        gated = pass_gates(candidates, model, base, rule, rules, plan.max_chains)
        mined = mine(gated.chains, gated.pool, gated.adjacent_E, rules, plan.seed)
        notes = [*candidates.notes, *_base_notes(gated)]
        counted = {"candidates": len(candidates.chains), "notes": notes}
        found = counted | _found(gated, rule, mined)
        contents = ChainBank(candidates.kind, gated.chains, gated.pool, base, mined.records, found)
        bank = write_chains(path, contents, made_by)
    return ChainReport(
        path=str(path),
        source=plan.source,
        encoder=bank.encoder,
        created_by=bank.created_by,
        sha256=bank.sha256,
        base_rows=0 if base is None else base.num_rows,
        rows=bank.num_rows,
        dim=bank.dim,
        **found,
        reused=reused,
        seconds=time.monotonic() - started,
    )


def _found(gated: Gated, rule: CoherenceRule, mined: Mined) -> dict[str, Any]:
    """Return the part of the report that is stored in the bank's folder, as JSON values."""
    return {
        "chains": len(gated.chains),
        "gates": [asdict(gate) for gate in gated.dropped],
        "coherence": {
            "least": gated.least,
            **asdict(rule),
            "candidates": _percentiles(gated.coherence_C),
            "kept": _percentiles(gated.kept_C),
        },
        "cpesh": {
            **asdict(mined.bands),
            "records": len(mined.records),
            "rate": mined.rate,
            "absolute_rate": mined.absolute_rate,
        },
        "lanes": dict(sorted(Counter(chain.lane or "" for chain in gated.chains).items())),
    }


def _base_notes(gated: Gated) -> list[str]:
    if not gated.in_base:
        return []
    return [
        f"{gated.in_base:,} distinct rows of the chains stand in the base, too: an export asks no "
        "query whose answer is among them"
    ]


def _percentiles(value_C: FloatArray) -> dict[str, float]:
    values = np.percentile(value_C, PERCENTILES).tolist() if len(value_C) else []
    return {f"p{p}": value for p, value in zip(PERCENTILES, values, strict=False)}


@dataclass(frozen=True, eq=False)
class ChainBank:
    """Contents of a bank of chains: chains over a pool, their base, CPESH records, the report.

    `kind` is the prefix of sequence names; row numbers in `records` count the rows of all chains.
    """

    kind: str
    chains: Sequence[Chain]
    pool: Pool
    base: Bank | None
    records: pd.DataFrame
    report: dict[str, Any]


def write_chains(path: Path, contents: ChainBank, created_by: str) -> Bank:
    """Write the bank, its CPESH records and its report into one folder, atomically.

    The rows of the base come first, unchanged; then each chain is a sequence of one document. The
    records and the report are not part of the bank's `sha256`, which covers vectors and rows.
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
    """Read the report stored in the bank's folder; raises ValueError if it is incomplete."""
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
    """Raise ValueError unless the folder has as many CPESH records as its report says."""
    where, counted = path / CPESH, report["cpesh"]["records"]
    try:
        found = pq.read_metadata(where).num_rows
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{where}: missing or not parquet; {AGAIN}") from error
    if found != counted:
        raise ValueError(f"{where}: has {found} records, {REPORT} counts {counted}; {AGAIN}")


def chain_rows(contents: ChainBank) -> pd.DataFrame:
    """Return the row table of the chains; with a base, they are pinned to train.

    Numbering continues after the sequences of the base, so that a bank of chains can be a base.
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
    """Return the row table of the base with its pinned splits, null for rows without one."""
    rows = row_names(base)
    if "split" not in rows:
        rows["split"] = np.full(len(rows), None, dtype=object)
    return rows


def numbered_records(records: pd.DataFrame, sequence_E: np.ndarray, first_row: int) -> pd.DataFrame:
    """Turn row numbers among the chains into rows of the bank; add the column `sequence`."""
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
