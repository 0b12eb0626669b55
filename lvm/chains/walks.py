"""Walks over an ontology: subtrees breadth first or depth first, cut into chains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lvm.chains.concepts import Candidates, Chain, Concepts, drawn_lengths, pieces
from lvm.chains.ontologies import ontology_kind, read_ontology
from lvm.system.seeding import generator
from lvm.system.thresholds import ChainRules

if TYPE_CHECKING:  # loaded by what walks
    import networkx

WALKS = {"bfs": ("bfs",), "dfs": ("dfs",), "both": ("bfs", "dfs")}


@dataclass(frozen=True)
class HierarchyWalk:
    """Which subtrees are walked, and how.

    `roots` are names or identifiers, none for all roots; `lanes` maps subtrees to lanes: with it
    a concept has the lane of the nearest mapped one above it, and without roots only the mapped
    subtrees are walked.
    """

    walk: str = "both"
    roots: tuple[str, ...] = ()
    lanes: tuple[tuple[str, str], ...] = ()
    max_chains: int | None = None
    seed: int = 0


def ontology_candidates(path: Path, plan: HierarchyWalk, rules: ChainRules) -> Candidates:
    """Return the walks over the subtrees of an ontology, in seeded order.

    Every concept with narrower ones is the head of a subtree. Raises ValueError on an unknown root.
    """
    graph = read_ontology(path)
    mapped = [(find_node(graph, name, "lanes", path), lane) for name, lane in plan.lanes]
    if mapped:
        _map_lanes(graph, mapped)
    roots = [find_node(graph, name, "root", path) for name in plan.roots]
    roots = roots or [node for node, _ in mapped] or [n for n in graph if graph.in_degree(n) == 0]
    row_of = {node: row for row, node in enumerate(graph)}
    order: dict[str, int] = {}
    for root in roots:
        for node in _below(graph, root):
            order.setdefault(node, row_of[node])
    chains: list[Chain] = []
    heads = [node for node in order if graph.out_degree(node)]
    for number, head in enumerate(tqdm(heads, desc="walk", unit=" subtrees", disable=None)):
        random = generator(plan.seed, f"walk {number}")
        lengths = drawn_lengths(rules.min_length, rules.max_length, random)
        name = str(graph.nodes[head]["name"])
        for kind in WALKS[plan.walk]:
            for _ in range(rules.subtree_walks):
                nodes = _walk(graph, head, kind, random)
                rows = [row_of[n] for n in islice(nodes, rules.subtree_pieces * rules.max_length)]
                chains += (Chain(name, piece) for piece in pieces(rows, lengths))
                if len(rows) < 2 * rules.max_length:  # another order would repeat the same rows
                    break
    shuffled = generator(plan.seed, "order of walks").permutation(len(chains))
    if plan.max_chains is not None:
        shuffled = shuffled[: rules.candidates_per_chain * plan.max_chains]
    lane_N = np.array([graph.nodes[node]["lane"] for node in graph], dtype=object)
    texts = [str(graph.nodes[node]["text"]) for node in graph]
    notes = graph.graph.get("notes", ())
    kind = "wordnet" if ontology_kind(path) == "wordnet" else path.stem
    return Candidates(kind, [chains[at] for at in shuffled], Concepts(texts, lane_N), notes)


def find_node(graph: networkx.DiGraph, name: str, option: str, path: Path) -> str:
    """Return the node of an identifier or of a name that only one node has."""
    if name in graph:
        return name
    named = [node for node, known in graph.nodes(data="name") if known == name]
    if len(named) == 1:
        return str(named[0])
    roots = [str(node) for node in graph if graph.in_degree(node) == 0]
    shown = ", ".join(roots[:5]) + (f" with {len(roots) - 5:,} more" if len(roots) > 5 else "")
    what = f"names {len(named)} concepts" if named else "is no concept"
    raise ValueError(f"{option} {name!r}: {what} of {path}; its roots are {shown}")


def _map_lanes(graph: networkx.DiGraph, mapped: Iterable[tuple[str, str]]) -> None:
    """Give each concept the lane of the nearest mapped one above it, the first listed of equals."""
    import networkx

    distance: dict[str, int] = {}
    for node in graph:
        graph.nodes[node]["lane"] = ""
    for root, lane in mapped:
        for node, steps in networkx.single_source_shortest_path_length(graph, root).items():
            if steps < distance.get(node, len(graph)):
                distance[node] = steps
                graph.nodes[node]["lane"] = lane


def _below(graph: networkx.DiGraph, root: str) -> Iterator[str]:
    import networkx

    yield root
    for _, node in networkx.bfs_edges(graph, root):
        yield node


def _walk(
    graph: networkx.DiGraph, head: str, kind: str, random: np.random.Generator
) -> Iterator[str]:
    """Yield the head with what lies below it: narrower concepts by falling weight, or shuffled."""
    import networkx

    def shuffled(children: Iterable[str]) -> list[str]:
        known = list(children)
        return [known[at] for at in random.permutation(len(known))]

    walk = networkx.bfs_edges if kind == "bfs" else networkx.dfs_edges
    yield head
    for _, node in walk(graph, head, sort_neighbors=None if graph.graph["weighted"] else shuffled):
        yield node
