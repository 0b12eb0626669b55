"""Ingestion of chains: the plan, the candidates of its source, gates, the bank."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvm.bank.files import file_sha256
from lvm.bank.store import Bank, FloatArray, open_bank
from lvm.bank.tables import TABLES, kind_of
from lvm.chains.anchored import AnchorPlan, anchored_candidates
from lvm.chains.concepts import Candidates
from lvm.chains.cpesh import Mined, mine
from lvm.chains.gates import CoherenceRule, Gated, coherence_rule, pass_gates
from lvm.chains.ontologies import WORDNET_FILES, edge_files, ontology_kind
from lvm.chains.walks import (
    GraphWalk,
    HierarchyWalk,
    edge_candidates,
    neighbour_candidates,
    ontology_candidates,
)
from lvm.chains.writing import ChainBank, check_records, read_report, write_chains
from lvm.corpus.encoders import Encoder, load_encoder
from lvm.corpus.ingest import existing_bank, holds_vectors
from lvm.system.errors import one_line_errors
from lvm.system.thresholds import ChainRules, read_chain_rules

KINDS = ("ontology", "anchored", "graph")


@dataclass(frozen=True)
class ChainPlan:
    """What to ingest: `source` is ontology:<file>, anchored:<bank> or graph:<edges or bank>.

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
        """Whether the source is a graph given by its edges."""
        return self.kind == "graph" and kind_of(self.place) in TABLES


def holds_chains(source: str) -> bool:
    """Whether a source names chains: ontology:..., anchored:..., graph:..."""
    return source.partition(":")[0] in KINDS


@one_line_errors
def check_plan(plan: ChainPlan) -> None:
    """Raise ValueError where an option is missing, or is one that the source does not read."""
    kind = plan.kind
    if not plan.place:
        raise ValueError(f"source {plan.source!r}: must be {kind}:<path>")
    if kind == "anchored" and (plan.queries is None or plan.base is None):
        raise ValueError(
            f"source {plan.source}: needs queries, the per_query.parquet of an eval run with "
            "split=val, beside base, the bank that these queries were asked of"
        )
    for option, read_by in (("queries", "anchored"), ("anchor", "anchored"), ("root", "ontology")):
        if getattr(plan, option) is not None and kind != read_by:
            raise ValueError(f"{option}: is read by source={read_by}:... alone; leave it away")
    if plan.pool is not None and not plan.reads_edges:
        raise ValueError("pool: is read by source=graph:<edge file> alone; leave it away")


def listed(text: str | None) -> tuple[str, ...]:
    """Read names between commas."""
    return () if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@one_line_errors
def lane_mapping(text: str | None) -> tuple[tuple[str, str], ...]:
    """Read <subtree>=<lane> pairs between commas."""
    pairs = [part.rpartition("=") for part in listed(text)]
    wrong = [part for part in pairs if not (part[0] and part[2])]
    if wrong:
        raise ValueError(
            f"lanes {text!r}: for an ontology it must be <subtree>=<lane>,..., or none for the "
            "source's own lanes"
        )
    return tuple((subtree.strip(), lane.strip()) for subtree, _, lane in pairs)


def created_by(plan: ChainPlan, base: Bank | None, rules: ChainRules) -> str:
    """What decides the contents: the settings, the thresholds, digests of all that is read."""
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
    """Files of a source that is no bank; ValueError where there are none."""
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
    """Return the chains of the source before any gate, with the encoder where texts need one.

    Raises ValueError on a source that cannot be read, another encoder than that of the base.
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
    """The bank whose rows become chains; None where the source is text."""
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


PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class ChainReport:
    """What an ingestion of chains did; `gates` are name, dropped, reason in their order."""

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
    """Make the bank of `plan`; reuse a bank there that was made in the same way.

    Raises ValueError on bad input, where the gates leave no chain, where fewer chains than
    `min_attach` have a CPESH record; then nothing is written.
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
    """What the bank's folder keeps of its making, in JSON's types."""
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
