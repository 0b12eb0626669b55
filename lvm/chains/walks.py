"""Chains of concepts: walks over ontologies and weighted graphs, cut into pieces.

Shapes: N concepts of a pool or nodes, D vector dim, C chains, L concepts of one chain, E edges,
n rows of one lane, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from lvm.bank.bank import Bank, FloatArray, unit_rows
from lvm.bank.duplicates import duplicate_groups
from lvm.bank.row_table import Integers
from lvm.bank.shards import Vectors
from lvm.chains.ontologies import ontology_kind, read_concepts, read_edges, read_ontology
from lvm.system.progress import steps
from lvm.system.seeding import generator
from lvm.system.settings import ChainRules

if TYPE_CHECKING:  # the functions that walk import it: it takes long to load
    import networkx

WALKS = {"bfs": ("bfs",), "dfs": ("dfs",), "both": ("bfs", "dfs")}
FLAT_ROWS = 50_000  # a larger lane is searched through inverted lists
LISTS_PROBED = 16
ROWS_PER_LIST = 64  # to train the lists with; FAISS needs 39 at least and uses 256 at most
SEARCH_ROWS = 4096


class Chain(NamedTuple):
    """An ordered run of concepts, by their rows in the pool.

    Its sequence is named after `head`. `lane` is None if the chain takes the lane of its rows.
    """

    head: str
    rows: tuple[int, ...]
    lane: str | None = None


@dataclass(frozen=True, eq=False)
class Concepts:
    """N texts without vectors yet; `lane_N` holds lane names, "" for none."""

    text_N: list[str]
    lane_N: npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Pool:
    """N concepts with their vectors (N, D) as stored; no vector is zero.

    `lane_N` holds lane names, "" for none; `text_N` is None if the bank has no texts.
    """

    stored: Vectors
    lane_N: npt.NDArray[np.object_]
    text_N: npt.NDArray[np.object_] | None
    encoder: str

    def unit(self, rows: Integers | slice) -> FloatArray:
        """Return the vectors of `rows` (of any shape) as float32, length 1 along the last axis."""
        return unit_rows(self.stored, rows)


@dataclass(frozen=True)
class Candidates:
    """Chains before the gates, over texts or over the rows of a bank; `notes` are for the user.

    `answer_rows` are the targets of the base's queries: no chain may contain a twin of them.
    """

    kind: str
    chains: list[Chain]
    pool: Concepts | Pool
    notes: tuple[str, ...] = ()
    answer_rows: Integers | None = None


def bank_pool(bank: Bank) -> Pool:
    """Return the rows of a bank as a pool; its vectors stay on disk."""
    return Pool(bank.vectors, row_lane_names(bank), bank.texts(), bank.encoder)


def row_lane_names(bank: Bank) -> npt.NDArray[np.object_]:
    """Return the lane name of each row (N,), "" for a row without a lane."""
    if bank.lane_N is None:
        return np.full(bank.num_rows, "", dtype=object)
    return np.array([*bank.lanes, ""], dtype=object)[bank.lane_N]


def flat_rows(chains: Sequence[Chain]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of all chains, concatenated, and the offset of each chain (C,)."""
    length_C = np.array([len(chain.rows) for chain in chains], dtype=np.int64)
    rows = np.fromiter((row for chain in chains for row in chain.rows), np.int64, length_C.sum())
    return rows, np.concatenate([[0], np.cumsum(length_C)[:-1]]).astype(np.int64)


def pieces(order: Sequence[int], lengths: Iterator[int]) -> Iterator[tuple[int, ...]]:
    """Cut a walk into consecutive runs of the given lengths; the last run is the remainder."""
    start = 0
    while start < len(order):
        end = start + next(lengths)
        yield tuple(order[start:end])
        start = end


def drawn_lengths(low: int, high: int, random: np.random.Generator) -> Iterator[int]:
    """Yield lengths drawn uniformly from `low` to `high`, both included."""
    while True:
        yield from random.integers(low, high + 1, size=1024).tolist()


@dataclass(frozen=True)
class HierarchyWalk:
    """How the subtrees of an ontology are walked, and which.

    `roots` are names or identifiers; an empty tuple means all roots. `lanes` maps subtrees to
    lanes: a concept takes the lane of its nearest mapped ancestor. With `lanes` but no `roots`,
    only the mapped subtrees are walked.
    """

    walk: str = "both"
    roots: tuple[str, ...] = ()
    lanes: tuple[tuple[str, str], ...] = ()
    max_chains: int | None = None
    seed: int = 0


def ontology_candidates(path: Path, plan: HierarchyWalk, rules: ChainRules) -> Candidates:
    """Return chains from walks over the subtrees of an ontology, in an order drawn by seed.

    Every concept with narrower concepts is the head of a subtree. Raises ValueError for an
    unknown root.
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
    for number, head in enumerate(steps(heads, "walk", "subtrees")):
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
    """Return the node with this identifier or with this name, if the name is unique.

    Raises ValueError for an unknown or an ambiguous name.
    """
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
    """Give each concept the lane of its nearest mapped ancestor; of equals, the first listed."""
    import networkx

    distance: dict[str, int] = {}
    for node in graph:
        graph.nodes[node]["lane"] = ""
    for root, lane in mapped:
        for node, far in networkx.single_source_shortest_path_length(graph, root).items():
            if far < distance.get(node, len(graph)):
                distance[node] = far
                graph.nodes[node]["lane"] = lane


def _below(graph: networkx.DiGraph, root: str) -> Iterator[str]:
    import networkx

    yield root
    for _, node in networkx.bfs_edges(graph, root):
        yield node


def _walk(
    graph: networkx.DiGraph, head: str, kind: str, random: np.random.Generator
) -> Iterator[str]:
    """Yield the head, then its descendants: siblings by descending weight, or shuffled."""
    import networkx

    def shuffled(children: Iterable[str]) -> list[str]:
        known = list(children)
        return [known[at] for at in random.permutation(len(known))]

    walk = networkx.bfs_edges if kind == "bfs" else networkx.dfs_edges
    yield head
    for _, node in walk(graph, head, sort_neighbors=None if graph.graph["weighted"] else shuffled):
        yield node


@dataclass(frozen=True)
class GraphWalk:
    """How a graph is walked; `lanes` are names of the lanes to walk, empty for all."""

    lanes: tuple[str, ...] = ()
    neighbours: int = 10
    max_chains: int | None = None
    seed: int = 0


def edge_candidates(
    path: Path, pool: Bank | None, plan: GraphWalk, rules: ChainRules
) -> Candidates:
    """Return chains from walks over a file of edges with columns `source`, `target`, `weight`.

    With a pool, nodes are its row numbers. Without one, nodes are names; their texts are read from
    the file beside the edges (edges.nodes.csv), or are the names themselves.
    """
    edges = read_edges(path, "source", "target")
    concepts: Concepts | Pool
    if pool is None:
        source_E, target_E, concepts = _named_nodes(path, edges)
        heads = _short_heads(concepts.text_N)
    else:
        source_E, target_E = (_row_numbers(path, edges, one, pool) for one in ("source", "target"))
        concepts = bank_pool(pool)
        heads = row_heads(pool)
    num_nodes = len(concepts.lane_N)
    # Of parallel edges, keep the heaviest.
    frame = pd.DataFrame({"a": source_E, "b": target_E, "weight": edges["weight"].to_numpy()})
    frame = frame.sort_values("weight", ascending=False, kind="stable").drop_duplicates(["a", "b"])
    shape = (num_nodes, num_nodes)
    graph = sparse.coo_matrix((frame["weight"], (frame["a"], frame["b"])), shape=shape).tocsr()
    chains = weighted_walks(graph, _lane_codes(concepts.lane_N, plan.lanes), heads, plan, rules)
    return Candidates(path.stem, chains, concepts)


def neighbour_candidates(pool: Bank, plan: GraphWalk, rules: ChainRules) -> Candidates:
    """Return chains from walks over the k-nearest-neighbour graph of a bank, lane by lane.

    Nodes are the bank's distinct rows (duplicate groups at `rules.twin`), weights are cosines.
    """
    concepts = bank_pool(pool)
    lane_N = _lane_codes(concepts.lane_N, plan.lanes)
    group_N = duplicate_groups(pool, rules.twin)
    lane_N[group_N != np.arange(pool.num_rows)] = -1
    parts = []
    lanes = sorted(set(lane_N.tolist()) - {-1})
    for lane in steps(lanes, "nearest neighbours", "lanes"):
        row_n = np.flatnonzero(lane_N == lane)
        score_nk, found_nk = _neighbours(concepts, row_n, plan.neighbours, plan.seed)
        from_E = np.repeat(row_n, found_nk.shape[1])
        kept_E = (found_nk.ravel() >= 0) & (row_n[found_nk.ravel()] != from_E)
        kept_E &= score_nk.ravel() > 0
        ends = from_E[kept_E], row_n[found_nk.ravel()[kept_E]]
        parts.append((score_nk.ravel()[kept_E], *ends))
    weight_E, from_E, to_E = (np.concatenate([part[i] for part in parts]) for i in range(3))
    graph = sparse.csr_matrix((weight_E, (from_E, to_E)), shape=(pool.num_rows,) * 2)
    chains = weighted_walks(graph, lane_N, row_heads(pool), plan, rules)
    twins = int((group_N != np.arange(pool.num_rows)).sum())
    notes = (f"{twins:,} rows are twins of earlier rows: not walked",) if twins else ()
    return Candidates(pool.path.name, chains, concepts, notes)


def weighted_walks(
    graph: sparse.csr_matrix,
    lane_N: npt.NDArray[np.int64],
    head_N: npt.NDArray[np.object_],
    plan: GraphWalk,
    rules: ChainRules,
) -> list[Chain]:
    """Walk from each node to the heaviest unvisited neighbour of the same lane.

    A walk ends at a length drawn by seed (`min_length` to `max_length`), or when no such neighbour
    is left. Nodes with lane -1 are not walked. The order of the start nodes is drawn by seed.
    """
    row_E = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    order_E = np.lexsort((graph.indices, -graph.data, row_E))  # a row's edges by descending weight
    target_E = graph.indices[order_E].tolist()
    starts, lanes = graph.indptr.tolist(), lane_N.tolist()
    random = generator(plan.seed, "graph walks")
    nodes = np.flatnonzero((lane_N >= 0) & (np.diff(graph.indptr) > 0))
    nodes = random.permutation(nodes)
    if plan.max_chains is not None:
        nodes = nodes[: rules.candidates_per_chain * plan.max_chains]
    lengths = drawn_lengths(rules.min_length, rules.max_length, random)
    chains = []
    for node in steps(nodes.tolist(), "walk", "starts"):
        walk, met, lane = [node], {node}, lanes[node]
        length = next(lengths)
        while len(walk) < length:
            edges = range(starts[walk[-1]], starts[walk[-1] + 1])
            free = (target_E[edge] for edge in edges)
            following = next((to for to in free if to not in met and lanes[to] == lane), None)
            if following is None:
                break
            walk.append(following)
            met.add(following)
        chains.append(Chain(str(head_N[node]), tuple(walk)))
    return chains


def row_heads(bank: Bank) -> npt.NDArray[np.object_]:
    """Return "<sequence>:<row>" for each row of a bank (N,), the names of its chains."""
    named_N = np.array(bank.sequences, dtype=object)[bank.sequence_N]
    return named_N + np.array([f":{row}" for row in range(bank.num_rows)], dtype=object)


def known_lanes(wanted: tuple[str, ...], there: list[str], where: str) -> None:
    """Raise ValueError if a wanted lane is not one of `there`, the lanes of `where`."""
    unknown = [lane for lane in wanted if lane not in there]
    if unknown:
        known = ", ".join(there) or "none at all"
        raise ValueError(
            f"lanes: {', '.join(unknown)} is not a lane of {where}; its lanes are {known}"
        )


def _lane_codes(name_N: npt.NDArray[np.object_], wanted: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return an integer for each node's lane, -1 if it is not wanted; no lane is a lane too."""
    code_N, names = pd.factorize(name_N, sort=True)
    known_lanes(wanted, [name for name in names if name], "the source")
    chosen = np.array([not wanted or name in wanted for name in names])
    return np.where(chosen[code_N], code_N, -1).astype(np.int64)


def _neighbours(pool: Pool, row_n: Integers, k: int, seed: int) -> tuple[FloatArray, Integers]:
    """Return cosines and positions in `row_n` of each row's k + 1 nearest, itself included."""
    num_rows, dim = len(row_n), pool.stored.shape[1]
    blocks = [row_n[start : start + SEARCH_ROWS] for start in range(0, num_rows, SEARCH_ROWS)]
    if num_rows <= FLAT_ROWS:
        index = faiss.IndexFlatIP(dim)
    else:
        lists = int(4 * num_rows**0.5)
        index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        sample = generator(seed, "inverted lists").permutation(num_rows)[: ROWS_PER_LIST * lists]
        index.train(pool.unit(row_n[np.sort(sample)]))
        index.nprobe = LISTS_PROBED
    for block in blocks:
        index.add(pool.unit(block))
    parts = [index.search(pool.unit(block), min(k + 1, num_rows)) for block in blocks]
    return np.concatenate([score for score, _ in parts]), np.concatenate([at for _, at in parts])


def _named_nodes(path: Path, edges: pd.DataFrame) -> tuple[Integers, Integers, Concepts]:
    ends = pd.concat([edges["source"], edges["target"]])
    code_N, names = pd.factorize(ends)
    known = read_concepts(path)
    found = [known.get(name, ("", "")) for name in names]
    texts = [text or str(name) for (text, _), name in zip(found, names, strict=True)]
    lane_N = np.array([lane for _, lane in found], dtype=object)
    return code_N[: len(edges)], code_N[len(edges) :], Concepts(texts, lane_N)


def _short_heads(texts: list[str]) -> npt.NDArray[np.object_]:
    return np.array([text.partition(":")[0][:40].strip() or "walk" for text in texts], dtype=object)


def _row_numbers(path: Path, edges: pd.DataFrame, column: str, pool: Bank) -> Integers:
    number_E = pd.to_numeric(edges[column], errors="coerce").to_numpy(dtype=np.float64)
    wrong_E = ~((number_E >= 0) & (number_E < pool.num_rows) & (number_E % 1 == 0))
    if wrong_E.any():
        edge = int(wrong_E.argmax())
        raise ValueError(
            f"{path}: {column} '{edges[column].iloc[edge]}' in edge {edge} is not a row of pool "
            f"{pool.path}; give row numbers from 0 to {pool.num_rows - 1}"
        )
    return number_E.astype(np.int64)
