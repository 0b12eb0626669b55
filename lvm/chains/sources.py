"""Sources of chains: an ontology, a graph, a pool bank near missed answers."""

from pathlib import Path

from lvm.bank.store import Bank, open_bank
from lvm.chains.anchored import AnchorPlan, anchored_candidates
from lvm.chains.concepts import Candidates
from lvm.chains.graphs import GraphWalk, edge_candidates, neighbour_candidates
from lvm.chains.plan import ChainPlan, lane_mapping, listed
from lvm.chains.walks import HierarchyWalk, ontology_candidates
from lvm.corpus.encoders import Encoder, load_encoder
from lvm.system.thresholds import ChainRules


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
