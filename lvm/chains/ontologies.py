"""Ontologies as graphs from the broader concept to the narrower ones.

A node has `name`, `text`, `lane` ("" where the source names none). Where the graph is `weighted`,
the narrower concepts of a concept stand in the order of falling weight.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lvm.chains.edges import SUFFIXES, read_concepts, read_edges
from lvm.system.errors import CONTROL, one_line_errors

if TYPE_CHECKING:  # loaded by the reader that needs it: most commands read no ontology
    import networkx

_DEFINITION = re.compile(r'^"((?:[^"\\]|\\.)*)"')  # OBO: def: "text" [references]


def ontology_kind(path: Path) -> str:
    """Return obo, edges or wordnet; raises ValueError where `path` is none of them."""
    if path.is_dir() and (path / "data.noun").is_file():
        return "wordnet"
    if path.is_file() and path.suffix == ".obo":
        return "obo"
    if path.is_file() and path.suffix in SUFFIXES:
        return "edges"
    raise ValueError(
        f"ontology {path}: no such ontology; give an .obo file, an edge list "
        f"({', '.join(SUFFIXES)} with parent, child) or the folder of a WordNet database"
    )


@one_line_errors
def read_ontology(path: Path) -> networkx.DiGraph:
    """Read an ontology; raises ValueError where it is none or has a cycle.

    The graph's `notes` say what was left out.
    """
    kind = ontology_kind(path)
    if kind == "wordnet":
        from lvm.chains.wordnet import read_wordnet

        graph = read_wordnet(path)
    else:
        graph = _read_obo(path) if kind == "obo" else _read_edge_list(path)
    _check_names(graph, path)
    _check_acyclic(graph, path)
    return graph


def _read_obo(path: Path) -> networkx.DiGraph:
    """The is_a relations of an OBO file; terms that are named but not defined are left out."""
    import networkx
    import obonet

    try:
        terms = obonet.read_obo(path)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ValueError(
            f"{path}: not a readable OBO file ({reason}); each "
            "line of a [Term] must be `tag: value`, each term must have an id"
        ) from error
    graph = networkx.DiGraph(weighted=False)
    unnamed = 0
    for node, data in terms.nodes(data=True):
        if not data.get("name"):
            unnamed += 1
            continue
        name = str(data["name"])
        graph.add_node(
            str(node),
            name=name,
            text=concept_text(name, _definition(data.get("def"))),
            lane=str(data.get("namespace") or terms.graph.get("default-namespace", [""])[0]),
        )
    is_a = [(a, b) for a, b, relation in terms.edges(keys=True) if relation == "is_a"]
    graph.add_edges_from((b, a) for a, b in is_a if a in graph and b in graph)
    if not graph.number_of_edges():
        raise ValueError(f"{path}: no [Term] with an is_a in it; this is no ontology to walk")
    if unnamed:
        graph.graph["notes"] = (f"{unnamed:,} terms without a name: left out",)
    return graph


def _read_edge_list(path: Path) -> networkx.DiGraph:
    import networkx

    edges = read_edges(path, "parent", "child")
    graph = networkx.DiGraph(weighted=edges["weight"].nunique() > 1)
    edges = edges.sort_values("weight", ascending=False, kind="stable")
    parents, children = (edges[name].astype(str) for name in ("parent", "child"))
    graph.add_edges_from(zip(parents, children, strict=True))
    nodes = read_concepts(path)
    known = {} if nodes is None else {node: (text, lane) for node, text, lane in nodes.values}
    for name in graph:
        text, lane = known.get(name, ("", ""))
        graph.nodes[name].update(name=name, text=text or name, lane=lane)
    return graph


def concept_text(name: str, definition: str) -> str:
    """Write a concept as its name with its definition."""
    return f"{name}: {definition}" if definition else name


def _definition(line: str | None) -> str:
    found = _DEFINITION.match(line or "")
    return re.sub(r"\\(.)", r"\1", found[1]) if found else ""


def _check_names(graph: networkx.DiGraph, path: Path) -> None:
    for node, data in graph.nodes(data=True):
        for name in (node, data["name"], data["lane"]):
            if CONTROL.search(name):
                raise ValueError(f"ontology {path}: {name!r} holds control characters; rename it")


def _check_acyclic(graph: networkx.DiGraph, path: Path) -> None:
    import networkx

    try:
        cycle = networkx.find_cycle(graph)
    except networkx.NetworkXNoCycle:
        return
    steps = [edge[0] for edge in cycle]
    shown = " > ".join([*steps[:8], *(["..."] if len(steps) > 8 else []), steps[0]])
    raise ValueError(f"ontology {path}: has the cycle {shown}; take one of its edges away")
