"""The plan of an ingestion of chains, checked as far as it can be before any work."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lvm.bank.files import file_sha256
from lvm.bank.store import Bank, open_bank
from lvm.chains.edges import SUFFIXES, edge_files
from lvm.chains.ontologies import ontology_kind
from lvm.chains.wordnet import NEEDED
from lvm.corpus.ingest import holds_vectors
from lvm.system.errors import one_line_errors
from lvm.system.thresholds import ChainRules

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
        return self.kind == "graph" and Path(self.place).suffix in SUFFIXES


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
        names = [place / name for name in (*NEEDED, "lexnames")]
    elif kind == "ontology":
        names = edge_files(place)
    elif plan.reads_edges and place.is_file():
        names = edge_files(place)
    else:
        wanted = "an edge file or a bank folder" if kind == "graph" else "a bank folder"
        raise ValueError(f"source {kind}:{place}: no such source; give {wanted}")
    return [name for name in names if name.is_file()]


def _digest(paths: Sequence[Path]) -> str:
    hashes = " ".join(file_sha256(path) for path in paths)
    return hashlib.sha256(hashes.encode()).hexdigest()
