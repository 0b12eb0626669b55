"""Every source of chains on small files of its own; what is wrong in them is named."""

from pathlib import Path

import networkx
import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.chains import anchored, walks
from lvm.chains.anchored import AnchorPlan, anchored_candidates
from lvm.chains.filters import lane_gate
from lvm.chains.ontologies import read_ontology
from lvm.chains.walks import (
    GraphWalk,
    HierarchyWalk,
    bank_pool,
    edge_candidates,
    neighbour_candidates,
    ontology_candidates,
)
from lvm.system.settings import read_chain_rules
from tests.chains.ontology_files import kingdoms, write_edges, write_obo, write_wordnet

RULES = read_chain_rules()
WRITERS = {"wordnet": write_wordnet, "obo": write_obo, "edges": write_edges}
NAMES = {"wordnet": "wordnet", "obo": "kingdoms.obo", "edges": "kingdoms.csv"}


@pytest.fixture(scope="module")
def ontologies(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ontologies")
    return {kind: write(folder / NAMES[kind], *kingdoms()) for kind, write in WRITERS.items()}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_ontology_is_read_whole(kind, ontologies):
    graph = read_ontology(ontologies[kind])
    parents, known = kingdoms()
    names = {
        str(data["name"]).split(".")[0].replace(" ", "_"): n for n, data in graph.nodes.items()
    }
    assert set(names) == set(known)
    assert set(graph.edges) == {(names[above], names[one]) for one, above in parents.items()}
    text = graph.nodes[names["red_horse"]]["text"]
    assert text.replace("_", " ").startswith("red horse: a creature that runs on the farm")
    assert "SELF" not in text and "a use" not in text
    lane = "noun.animal" if kind == "wordnet" else "lane_5"
    assert graph.nodes[names["red_horse"]]["lane"] == lane


EDGES = [("1001", "1002"), ("1001", "caf\u00e9"), ("caf\u00e9", "1003")]
TEXTS = {"1001": '"cut" grass', "1002": '"a lone mark', "1003": '5" nails', "caf\u00e9": "\u540d"}
OPENED = {(above, one) for above, one in EDGES}


def delimited(separator: str, quote: bool) -> tuple[str, str]:
    """Return the tables of EDGES and TEXTS."""
    texts = {name: text.replace('"', '""') if quote else text for name, text in TEXTS.items()}
    mark = '"' if quote else ""
    nodes = [f"{name}{separator}{mark}{text}{mark}" for name, text in texts.items()]
    edges = [separator.join(edge) for edge in EDGES]
    heads = (f"parent{separator}child", f"node{separator}text")
    return "\n".join([heads[0], *edges, ""]), "\n".join([heads[1], *nodes, ""])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("names", "separator", "quote"),
    [
        (("a.tsv", "a.nodes.tsv"), "\t", False),
        (("A.TSV", "A.nodes.TSV"), "\t", False),
        (("A.CSV", "A.nodes.csv"), ";", True),
        (("a.csv", "a.nodes.csv"), ",", True),
    ],
)
def test_edge_lists_are_read_however_they_were_written(
    tmp_path: Path, names: tuple[str, str], separator: str, quote: bool, encoding: str
):
    for name, table in zip(names, delimited(separator, quote), strict=True):
        decomposed = table.replace("\u00e9", "e\u0301")
        (tmp_path / name).write_text(decomposed, encoding=encoding, newline="\r\n")
    graph = read_ontology(tmp_path / names[0])
    assert set(graph.edges) == OPENED
    assert {node: data["text"] for node, data in graph.nodes.items()} == TEXTS


@pytest.mark.parametrize("kind", [np.int32, np.float64, "string", "category", object])
def test_numbers_as_names_are_one_name_in_both_tables(tmp_path: Path, kind):
    edges = pd.DataFrame({"parent": [1, 1, 2], "child": [2, 3, 4]}).astype(kind)
    edges.to_parquet(tmp_path / "a.parquet")
    nodes = pd.DataFrame({"node": [1.0, 2.0, 3.0], "text": ["one", None, "three"]})
    nodes.to_parquet(tmp_path / "a.nodes.parquet")
    graph = read_ontology(tmp_path / "a.parquet")
    assert set(graph.edges) == {("1", "2"), ("1", "3"), ("2", "4")}
    texts = {node: data["text"] for node, data in graph.nodes.items()}
    assert texts == {"1": "one", "2": "2", "3": "three", "4": "4"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_obo_file_is_read_with_any_mark_and_suffix(tmp_path: Path, ontologies, encoding: str):
    path = tmp_path / "KINGDOMS.OBO"
    path.write_text(ontologies["obo"].read_text(), encoding=encoding, newline="\r\n")
    graph, expected = read_ontology(path), read_ontology(ontologies["obo"])
    assert dict(graph.nodes.items()) == dict(expected.nodes.items())
    assert list(graph.edges) == list(expected.edges)


def test_walks_stay_in_their_subtree_in_their_order(ontologies):
    path = ontologies["edges"]
    graph = read_ontology(path)
    nodes = list(graph)
    for walk in ("bfs", "dfs"):
        found = ontology_candidates(path, HierarchyWalk(walk, ("animal",)), RULES)
        assert {chain.head for chain in found.chains} == {"animal", "horse", "dog", "bird"}
        for chain in found.chains:
            below = {chain.head, *networkx.descendants(graph, chain.head)}
            assert {nodes[row] for row in chain.rows} <= below
        first = next(c for c in found.chains if c.head == "animal" and nodes[c.rows[0]] == "animal")
        groups = {nodes[row] for row in first.rows[1:4]} & {"horse", "dog", "bird"}
        assert len(groups) == (3 if walk == "bfs" else 1)


def test_both_walks_give_what_each_gives_alone(ontologies):
    counts = {}
    for walk in ("bfs", "dfs", "both"):
        found = ontology_candidates(ontologies["obo"], HierarchyWalk(walk), RULES)
        counts[walk] = len(found.chains)
    assert min(counts["bfs"], counts["dfs"]) > 8
    assert counts["both"] > max(counts["bfs"], counts["dfs"])


def test_the_same_seed_gives_the_same_walks(ontologies):
    def walks(seed: int) -> list:
        return ontology_candidates(ontologies["obo"], HierarchyWalk(seed=seed), RULES).chains

    assert walks(0) == walks(0) != walks(1)


def test_max_chains_bounds_the_walks(ontologies):
    found = ontology_candidates(ontologies["obo"], HierarchyWalk(max_chains=2), RULES)
    assert len(found.chains) == 2 * RULES.candidates_per_chain


def test_subtrees_are_mapped_to_lanes_the_nearest_first(ontologies):
    plan = HierarchyWalk(lanes=(("animal", "Science"), ("X:horse", "Art")))
    found = ontology_candidates(ontologies["obo"], plan, RULES)
    assert {chain.head for chain in found.chains} == {"animal", "horse", "dog", "bird"}
    lanes = dict(zip(found.pool.text_N, found.pool.lane_N, strict=True))
    by_name = {text.partition(":")[0]: lane for text, lane in lanes.items()}
    assert (by_name["red dog"], by_name["red horse"], by_name["tree"]) == ("Science", "Art", "")


def test_children_come_by_falling_weight(tmp_path):
    path = tmp_path / "weighted.tsv"
    lines = [f"top\tn{number}\t{number}" for number in (3, 9, 1, 7)]
    path.write_text("\n".join(["parent\tchild\tweight", *lines]))
    (chain,) = ontology_candidates(path, HierarchyWalk("bfs"), RULES).chains
    texts = ontology_candidates(path, HierarchyWalk("bfs"), RULES).pool.text_N
    assert [texts[row] for row in chain.rows] == ["top", "n9", "n7", "n3", "n1"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("cycle.csv", "parent,child\na,b\nb,c\nc,a\n", "has the cycle a > b > c > a"),
        ("self.csv", "parent,child\na,a\n", "has the cycle a > a"),
        ("columns.csv", "from,to\na,b\n", "no column parent, child; an edge list has"),
        ("empty.csv", "", "is empty; its first line must name the columns"),
        ("none.csv", "parent,child\n", "holds no edge"),
        ("unnamed.csv", "parent,child\na,b\n,c\n", "parent is empty in edge 1"),
        ("weight.csv", "parent,child,weight\na,b,1\nb,c,-2\n", "weight '-2' in edge 1"),
        ("word.csv", "parent,child,weight\na,b,much\n", "weight 'much' in edge 0"),
        ("bad.parquet", "no parquet", "not a readable parquet file"),
        ("bad.obo", "[Term]\nid: X:1\nthis is no tag\n", "not a readable OBO file"),
        ("noid.obo", "[Term]\nname: x\n", "not a readable OBO file"),
        ("empty.obo", "format-version: 1.2\n", r"no \[Term\] with an is_a"),
        ("ontology.txt", "x", "no such ontology; give an .obo file"),
    ],
)
def test_a_wrong_ontology_is_refused_in_one_line(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        read_ontology(path)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_a_cycle_in_an_obo_file_is_named(tmp_path):
    terms = "[Term]\nid: X:1\nname: one\nis_a: X:2\n\n[Term]\nid: X:2\nname: two\nis_a: X:1\n"
    (tmp_path / "cycle.obo").write_text(f"ontology: c\n\n{terms}")
    with pytest.raises(ValueError, match="cycle X:[12] > X:[12] > X:[12]"):
        read_ontology(tmp_path / "cycle.obo")


def test_a_damaged_wordnet_is_refused(tmp_path, ontologies):
    folder = write_wordnet(tmp_path / "wordnet", *kingdoms())
    (folder / "index.noun").write_text("thing n 0 0\n")
    with pytest.raises(ValueError, match="not a readable WordNet database"):
        read_ontology(folder)
    (folder / "index.noun").unlink()
    with pytest.raises(ValueError, match="not a readable WordNet database"):
        read_ontology(folder)


def test_the_lexnames_of_a_wordnet_are_its_own_where_it_has_them(tmp_path):
    folder = write_wordnet(tmp_path / "wordnet", *kingdoms())
    names = [f"{number:02d}\town.{number}\t1\n" for number in range(45)]
    (folder / "lexnames").write_text("".join(names))
    assert read_ontology(folder).nodes["red_horse.n.01"]["lane"] == "own.5"


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (
            HierarchyWalk(roots=("whale",)),
            "root 'whale': is no concept of .*; its roots are X:thing",
        ),
        (HierarchyWalk(lanes=(("whale", "Art"),)), "lanes 'whale': is no concept of"),
    ],
)
def test_an_unknown_root_is_refused(plan, reason, ontologies):
    with pytest.raises(ValueError, match=reason):
        ontology_candidates(ontologies["obo"], plan, RULES)


def edge_file(path: Path, edges: list[tuple]) -> Path:
    pd.DataFrame(edges, columns=["source", "target", "weight"]).to_csv(path, index=False)
    return path


def test_a_graph_walk_takes_the_heaviest_new_neighbour_of_its_lane(tmp_path):
    edges = [("a", "b", 1), ("a", "c", 5), ("c", "a", 9), ("c", "x", 8), ("c", "d", 2)]
    path = edge_file(tmp_path / "edges.csv", [*edges, ("d", "b", 1), ("a", "c", 4)])
    nodes = [f"{name},text of {name},{'far' if name == 'x' else 'near'}" for name in "abcdx"]
    (tmp_path / "edges.nodes.csv").write_text("\n".join(["node,text,lane", *nodes]))
    found = edge_candidates(path, None, GraphWalk(), RULES)
    walks = {"".join(found.pool.text_N[row][-1] for row in one.rows) for one in found.chains}
    assert walks == {"acdb", "cab", "db"}  # c > x leaves the lane, c > a is heavier than c > d


def test_a_graph_walk_is_at_most_14_long_with_every_node_once(tmp_path):
    ring = [(f"n{one}", f"n{(one + 1) % 40}", 1.0) for one in range(40)]
    small = [(f"s{one}", f"s{(one + 1) % 3}", 1.0) for one in range(3)]
    found = edge_candidates(edge_file(tmp_path / "e.csv", ring + small), None, GraphWalk(), RULES)
    lengths = [len(one.rows) for one in found.chains]
    assert set(lengths) <= {3, *range(8, 15)} and lengths.count(3) == 3
    assert all(len(set(one.rows)) == len(one.rows) for one in found.chains)


def test_edges_can_name_the_rows_of_a_pool(tmp_path, tiny_bank: Bank):
    path = tmp_path / "edges.parquet"
    edges = [(row, row + 2, 0.5) for row in range(0, 60, 2)]
    pd.DataFrame(edges, columns=["source", "target", "weight"]).to_parquet(path)
    found = edge_candidates(path, tiny_bank, GraphWalk(), RULES)
    assert all(np.all(np.diff(one.rows) == 2) for one in found.chains)
    assert found.chains[0].head.startswith("sequence-0:")
    wrong = edge_file(tmp_path / "wrong.csv", [(0, tiny_bank.num_rows, 1.0)])
    with pytest.raises(ValueError, match="target .*1440.* in edge 0 is not a row of pool"):
        edge_candidates(wrong, tiny_bank, GraphWalk(), RULES)


def test_the_neighbour_graph_of_a_bank_leads_to_nearest_rows_of_the_lane(tiny_bank: Bank):
    found = neighbour_candidates(tiny_bank, GraphWalk(neighbours=3), RULES)
    assert tiny_bank.lane_N is not None and "12 rows are twins" in found.notes[0]
    unit = tiny_bank.unit(slice(None))
    for one in found.chains[:50]:
        assert len(set(tiny_bank.lane_N[list(one.rows)])) == 1
        same = np.flatnonzero(tiny_bank.lane_N == tiny_bank.lane_N[one.rows[0]])
        score = unit[same] @ unit[one.rows[0]]
        score[(same == one.rows[0]) | (score > RULES.twin)] = -1
        assert one.rows[1] == same[score.argmax()]
    only = neighbour_candidates(tiny_bank, GraphWalk(lanes=("lane-1",)), RULES)
    assert {tiny_bank.lane_N[row] for one in only.chains for row in one.rows} == {1}


def test_an_unknown_lane_of_a_graph_is_refused(tiny_bank: Bank):
    with pytest.raises(
        ValueError, match="lanes: Art is not a lane of the source; its lanes are lane-0"
    ):
        neighbour_candidates(tiny_bank, GraphWalk(lanes=("Art",)), RULES)


@pytest.fixture
def base(tmp_path, tiny_bank: Bank) -> Bank:
    """Rows near those of the pool, but no twins of them."""
    noise = np.random.default_rng(1).standard_normal((100, tiny_bank.dim)) * 0.05
    rows = pd.DataFrame({"sequence": "base", "lane": ["weak"] * 50 + ["good"] * 50})
    vectors = tiny_bank.unit(slice(105, 205)) + noise
    return write_bank(tmp_path / "base", vectors, rows, "synthetic", "test")


def queries_file(path: Path, targets: list[int], ranks: list[float]) -> str:
    pd.DataFrame({"target_row": targets, "rank": ranks, "split": "val"}).to_parquet(path)
    return str(path)


def test_pages_stand_around_the_neighbours_of_missed_answers(tmp_path, tiny_bank: Bank, base: Bank):
    queries = queries_file(tmp_path / "q.parquet", [3, 20, 40, 80], [50.0, 1.0, 5.5, 90.0])
    plan = AnchorPlan(queries, ("weak",), anchor=0.9, neighbours=1)
    found = anchored_candidates(tiny_bank, base, plan, RULES)
    anchors = {int(one.head.partition(":")[2]): one for one in found.chains}
    assert set(anchors) == {105 + 3, 105 + 40}  # rank 1 is no failure, 80 is of another lane
    for anchor, one in anchors.items():
        assert anchor in one.rows and len(one.rows) == 14 and one.lane == "weak"
        assert len(set(tiny_bank.document_N[list(one.rows)])) == 1
        assert np.all(np.diff(one.rows) == 1)
    assert "2 missed answers, 2 with a neighbour of cosine 0.900 (given)" in found.notes[0]
    assert found.answer_rows is not None and found.answer_rows.tolist() == [3, 20, 40, 80]


def test_the_anchor_is_a_percentile_of_the_pool_unless_given(tmp_path, tiny_bank, base):
    queries = queries_file(tmp_path / "q.parquet", list(range(50)), [9.0] * 50)
    found = anchored_candidates(tiny_bank, base, AnchorPlan(queries), RULES)
    unit = tiny_bank.unit(slice(None))
    score = unit @ unit.T
    score[score >= RULES.twin] = -1
    assert f"{np.percentile(score.max(axis=1), 75):.3f} (percentile 75)" in found.notes[0]


@pytest.mark.parametrize(
    ("columns", "lanes", "reason"),
    [
        ({"target_row": [1], "split": ["val"]}, (), "no column rank"),
        (
            {"target_row": [1], "rank": [9.0], "split": None},
            (),
            "no column split; .*eval -P split=",
        ),
        (
            {"target_row": [1, 2], "rank": [9.0, 9.0], "split": ["val", "test"]},
            (),
            "1 of 2 queries are of split test, by which .*; give .* -e eval -P split=val",
        ),
        ({"target_row": [100], "rank": [9.0]}, (), "target_row 100 is not a row of base"),
        ({"target_row": ["x"], "rank": [9.0]}, (), "target_row must be a number"),
        (
            {"target_row": [1], "rank": [9.0], "sequence": ["other"]},
            (),
            "row 1 is of sequence 'other', in base .* of 'base'; give the bank",
        ),
        ({"target_row": [1], "rank": [1.0]}, (), "none has a rank above 5"),
        ({"target_row": [1], "rank": [9.0]}, ("good",), "none of lanes good has a rank above 5"),
        ({"target_row": [1], "rank": [9.0]}, ("Art",), "Art is not a lane of base"),
        (None, (), "missing or not parquet"),
    ],
)
def test_wrong_queries_are_refused(tmp_path, tiny_bank, base, columns, lanes, reason):
    if columns is not None:
        table = pd.DataFrame({"split": "val"} | columns, index=range(len(columns["target_row"])))
        table.dropna(axis=1).to_parquet(tmp_path / "q.parquet")
    plan = AnchorPlan(str(tmp_path / "q.parquet"), lanes)
    with pytest.raises(ValueError, match=reason) as refused:
        anchored_candidates(tiny_bank, open_bank(base.path), plan, RULES)
    assert "\n" not in str(refused.value)


def test_over_a_base_without_lanes_a_page_keeps_the_lane_of_its_rows(tmp_path, tiny_bank: Bank):
    rows = pd.DataFrame({"sequence": ["base"] * 2})
    vectors = tiny_bank.unit(slice(3, 5)) + 0.02 * np.cos(np.arange(16))
    plain = write_bank(tmp_path / "base", vectors, rows, "synthetic", "test")
    plan = AnchorPlan(queries_file(tmp_path / "q.parquet", [0, 1], [9.0, 9.0]), anchor=0.9)
    found = anchored_candidates(tiny_bank, plain, plan, RULES)
    kept, gate = lane_gate(found.chains, found.pool.lane_N)
    assert len(kept) and gate.dropped < len(found.chains)
    assert {one.lane for one in kept} <= set(tiny_bank.lanes)
    assert "has no lanes: a page keeps the lane of its rows" in found.notes[1]


@pytest.mark.parametrize("flat_rows", [10_000, 50])
def test_neighbours_are_searched_in_blocks(tiny_bank: Bank, monkeypatch, flat_rows):
    """Inverted lists are all probed here, so that they must find what an exhaustive search does."""
    monkeypatch.setattr(walks, "FLAT_ROWS", flat_rows)
    monkeypatch.setattr(walks, "LISTS_PROBED", 1000)
    monkeypatch.setattr(walks, "SEARCH_ROWS", 37)
    row_n = np.arange(0, tiny_bank.num_rows, 3)
    score_nk, found_nk = walks._neighbours(bank_pool(tiny_bank), row_n, 5, seed=0)
    unit_nD = tiny_bank.unit(row_n)
    expected_nk = -np.sort(-(unit_nD @ unit_nD.T), axis=1)[:, :6]
    np.testing.assert_allclose(score_nk, expected_nk, atol=1e-5)
    assert found_nk.shape == (len(row_n), 6)


def test_missed_answers_are_searched_in_blocks(tmp_path, tiny_bank, base, monkeypatch):
    queries = queries_file(tmp_path / "q.parquet", list(range(50)), [9.0] * 50)
    plan = AnchorPlan(queries, anchor=0.8)
    whole = anchored_candidates(tiny_bank, base, plan, RULES)
    read, unit = [], Bank.unit

    def counted(bank: Bank, rows):
        read.append(rows if isinstance(rows, slice) else len(rows))
        return unit(bank, rows)

    monkeypatch.setattr(Bank, "unit", counted)
    monkeypatch.setattr(anchored, "SEARCH_ROWS", 7)
    assert anchored_candidates(tiny_bank, base, plan, RULES).chains == whole.chains
    assert len(whole.chains) and read[1:] == [7] * 7 + [1]
