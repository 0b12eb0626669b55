"""Ontologies that are mutated: a checked graph, or a refusal in a line."""

import csv
import io
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from lvm.bank.tables import name_text
from lvm.chains.ingest import lane_mapping, listed
from lvm.chains.ontologies import read_concepts, read_edges, read_ontology
from lvm.system.settings import read_chain_rules
from tests.chains.ontology_files import kingdoms, write_edges, write_obo, write_wordnet
from tests.faults.conftest import Tally
from tests.faults.fuzzing import (
    ODD,
    ODD_TEXTS,
    fuzz,
    is_name,
    mutated_bytes,
    mutated_lines,
    read_or_refused,
)

pytestmark = pytest.mark.faults

RULES = read_chain_rules()
PARENTS, KNOWN = kingdoms()
SMALL = dict(list(KNOWN.items())[:12])
ABOVE = {name: parent for name, parent in PARENTS.items() if name in SMALL and parent in SMALL}


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def assert_hierarchy(graph: Any) -> None:
    """Assert that a graph has no cycle, and that every concept has a name, a text, a lane."""
    assert networkx.is_directed_acyclic_graph(graph) and graph.number_of_edges() > 0
    for node, data in graph.nodes(data=True):
        assert is_name(node) and is_name(data["name"]) and is_name(data["lane"])
        assert isinstance(data["text"], str) and data["name"] and data["text"]


OBO_LINES = [
    "[Term]",
    "[Typedef]",
    "is_a: X:animal",
    "is_a: X:red_horse ! up",
    "id: X:animal",
    "id:",
]
OBO_LINES += ["name:", "name: a", 'def: "a', 'def: "a" [x] {y="z"}', "is_a:", ": x", "xref: a {b"]
OBO_LINES += [
    "relationship: part_of X:animal",
    "is_obsolete: true",
    "alt_id: X:dog",
    "name: \x1b[2J",
]
OBO_LINES += [
    'synonym: "a" EXACT []',
    "namespace: \u2028",
    "namespace: a",
    "replaced_by: X:dog",
    "!",
]


def test_mutated_obo(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "kingdoms.obo"
    good = write_obo(path, ABOVE, SMALL).read_text()

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        graph = read_or_refused(lambda: read_ontology(path), str(path))
        if graph is not None:
            assert_hierarchy(graph)
            text = raw.decode()
            assert all(name in text for name in graph)

    texts = mutated_lines(good, OBO_LINES).map(encoded)
    inputs = st.one_of(texts, texts, mutated_bytes(good.encode()))
    fuzz(tally, "OBO", 900, inputs, check)


EDGE_LINES = [
    "horse,animal",
    "a,b",
    "a",
    ",",
    "a,b,c",
    '"',
    '"a,b',
    "007,7",
    "1,2",
    "1.0,2",
    "NA,b",
]
EDGE_LINES += ["parent,child", "a,a", "true,false", "\x1b[2J,b", " a,b", "a,nan", "weight"]


def test_mutated_edges(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "kingdoms.csv"
    good = write_edges(path, ABOVE, SMALL).read_text()

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        graph = read_or_refused(lambda: read_ontology(path), str(path))
        if graph is not None:
            assert_hierarchy(graph)
            lines = [one for one in raw.decode().splitlines() if one.strip()]
            rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
            rows = [row for row in rows if any(row.values())]  # as Excel writes an empty line
            assert set(graph.edges) == {(row["parent"], row["child"]) for row in rows}

    texts = mutated_lines(good, EDGE_LINES).map(encoded)
    inputs = st.one_of(texts, texts, mutated_bytes(good.encode()))
    fuzz(tally, "edge lists", 600, inputs, check)


def test_mutated_concepts(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "kingdoms.csv"
    write_edges(path, ABOVE, SMALL)
    beside = tmp_path / "kingdoms.nodes.csv"
    good = beside.read_text()

    def check(raw: bytes) -> None:
        beside.write_bytes(raw)
        nodes = read_or_refused(lambda: read_concepts(path), str(beside))
        if nodes is not None:
            assert all(
                type(name) is type(text) is type(lane) is str
                for name, (text, lane) in nodes.items()
            )

    texts = mutated_lines(good, EDGE_LINES).map(encoded)
    inputs = st.one_of(texts, mutated_bytes(good.encode()))
    fuzz(tally, "concepts beside edges", 400, inputs, check)


@st.composite
def odd_edges(draw: st.DrawFn) -> pd.DataFrame:
    """Return edges with odd values, types, columns."""
    columns: dict[str, list[Any]] = {
        "source": ["a", "b", "c"],
        "target": ["b", "c", "d"],
        "weight": [1.0, 0.5, 2.0],
    }
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(columns)))
        if draw(st.integers(0, 4)) == 0:
            columns[name] = [draw(st.sampled_from(ODD))] * 3
        else:
            columns[name][draw(st.integers(0, 2))] = draw(st.sampled_from(ODD))
    dropped = draw(st.sampled_from([None, None, None, *columns]))
    return pd.DataFrame(
        {
            name: pd.Series(values, dtype=object)
            for name, values in columns.items()
            if name != dropped
        }
    )


def test_odd_parquet_edges(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "edges.parquet"
    good = pd.DataFrame({"source": ["a"], "target": ["b"], "weight": [1.0]})

    def check(table: pd.DataFrame) -> None:
        try:
            table.to_parquet(path)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            table = good
            table.to_parquet(path)
        edges = read_or_refused(lambda: read_edges(path, "source", "target"), str(path))
        if edges is not None:
            assert list(edges.columns) == ["source", "target", "weight"] and len(edges) == len(
                table
            )
            told = pq.read_table(path).to_pylist()
            for name in ("source", "target"):
                assert edges[name].tolist() == [name_text(row[name]) for row in told]
            wanted = [float(row.get("weight", 1)) for row in told]
            assert edges["weight"].tolist() == wanted and min(wanted) >= 0

    fuzz(tally, "edges in parquet", 400, odd_edges(), check)


@pytest.mark.parametrize("name", ["data.noun", "index.noun"])
def test_mutated_wordnet(name: str, tmp_path: Path, tally: Tally) -> None:
    folder = write_wordnet(tmp_path / "wordnet", ABOVE, SMALL)
    raw = (folder / name).read_bytes()
    lines = mutated_lines(raw.decode(), ["", "x", "00000000 05 n 01 x 0 000 | y", "  1 x"])

    def check(changed: bytes) -> None:
        (folder / name).write_bytes(changed)
        graph = read_or_refused(lambda: read_ontology(folder), str(folder))
        if graph is not None:
            assert_hierarchy(graph)

    fuzz(tally, "WordNet", 350, st.one_of(mutated_bytes(raw), lines.map(encoded)), check)


def test_lanes_of_subtrees(tally: Tally) -> None:
    words = st.sampled_from([*ODD_TEXTS, "animal", "a=b", "=", "a=", "=b", "a=b=c", ","])
    texts = st.lists(words, max_size=5).map(",".join)

    def check(text: str) -> None:
        pairs = read_or_refused(lambda: lane_mapping(text), "lanes")
        if pairs is not None:
            parts = [part.strip() for part in text.split(",") if part.strip()]
            assert listed(text) == tuple(parts) and len(pairs) == len(parts)
            for part, (subtree, lane) in zip(parts, pairs, strict=True):
                assert lane and subtree and "=" not in lane
                assert "".join(part.split()) == "".join(f"{subtree}={lane}".split())

    fuzz(tally, "lanes of subtrees", 400, texts, check)
