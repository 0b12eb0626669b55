"""Ingestion of chains from the source to the bank: what is written, reused, refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.chains import ingest
from lvm.chains.ingest import ChainPlan, ingest_chains
from lvm.corpus.encoders import load_encoder
from lvm.system.settings import read_chain_rules
from tests.chains.ontology_files import kingdoms, write_edges, write_obo, write_wordnet

pytestmark = pytest.mark.slow

RULES = read_chain_rules()


@pytest.fixture(scope="module")
def obo(tmp_path_factory) -> Path:
    return write_obo(tmp_path_factory.mktemp("obo") / "kingdoms.obo", *kingdoms())


def graph_plan(pool: Bank, bank: Path, **options) -> ChainPlan:
    return ChainPlan(f"graph:{pool.path}", "wordllama", str(bank), **options)


@pytest.fixture(scope="module")
def walked(tmp_path_factory, tiny_bank: Bank) -> tuple[ChainPlan, Bank]:
    plan = graph_plan(tiny_bank, tmp_path_factory.mktemp("walked") / "bank", max_chains=60)
    ingest_chains(plan)
    return plan, open_bank(plan.bank, verify=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def test_a_chain_is_one_sequence_of_one_document(walked, tiny_bank: Bank):
    plan, bank = walked
    table = bank.document_table()
    assert len(table) == len(bank.sequences) == 60
    assert table["num_rows"].between(8, 14).all()
    assert bank.sequences[7].startswith("tiny") or "/000007" in bank.sequences[7]
    assert bank.lane_N is not None and bank.lanes == tiny_bank.lanes
    for first, count in zip(table["first_row"], table["num_rows"], strict=True):
        assert len(set(bank.lane_N[first : first + count])) == 1
    texts, own = bank.texts(), tiny_bank.texts()
    row_of = {text: row for row, text in enumerate(own)}
    copied = tiny_bank.vectors[[row_of[text] for text in texts]]
    np.testing.assert_array_equal(bank.vectors, copied)
    assert "split" not in pd.read_parquet(bank.path / "rows.parquet")


def test_cpesh_names_rows_of_the_bank(walked):
    bank = walked[1]
    records = pd.read_parquet(bank.path / "cpesh.parquet")
    assert len(records) >= 0.95 * 60 and records["sequence"].is_unique
    unit, texts = bank.unit(slice(None)), bank.texts()
    for record in records.to_dict("records"):
        own = [record[f"{name}_row"] for name in ("concept", "probe", "expected")]
        assert {bank.sequences[bank.sequence_N[row]] for row in own} == {record["sequence"]}
        assert (
            own[1] == own[2] - 1
            and own[0] == np.flatnonzero(bank.sequence_N == bank.sequence_N[own[2]]).min()
        )
        for name in ("soft", "hard"):
            rows = record[f"{name}_rows"]
            np.testing.assert_allclose(
                unit[rows] @ unit[own[2]], record[f"{name}_scores"], atol=1e-5
            )
            assert list(texts[rows]) == list(record[name])
            assert bank.sequence_N[own[2]] not in set(bank.sequence_N[rows])


def test_the_same_inputs_reuse_the_bank_with_its_counts(walked):
    plan, bank = walked
    before = contents(bank.path)
    again = ingest_chains(plan)
    assert again.reused and again.sha256 == bank.sha256 and again.chains == 60
    assert [gate["name"] for gate in again.gates][-1] == "max_chains"
    assert contents(bank.path) == before
    with pytest.raises(ValueError, match="holds something else .not seed=1"):
        ingest_chains(dataclasses.replace(plan, seed=1))
    with pytest.raises(ValueError, match="holds something else .not gates="):
        ingest_chains(plan, dataclasses.replace(RULES, min_length=9))


def without(key: str) -> Callable[[Path], None]:
    """Leave a key out of chains.json; `cpesh.rule` is the key rule inside cpesh."""

    def spoil(folder: Path) -> None:
        report = json.loads((folder / "chains.json").read_text())
        *outer, name = key.split(".")
        del (report[outer[0]] if outer else report)[name]
        (folder / "chains.json").write_text(json.dumps(report))

    return spoil


def shorten_records(folder: Path) -> None:
    pd.read_parquet(folder / "cpesh.parquet")[:-1].to_parquet(folder / "cpesh.parquet")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without("lanes"), "chains.json: lanes missing or not as written"),
        (without("cpesh.rule"), "chains.json: cpesh missing or not as written"),
        (lambda folder: (folder / "chains.json").unlink(), "chains.json: missing or not JSON"),
        (lambda folder: (folder / "chains.json").write_text("[]"), "chains.json: must be an obj"),
        (lambda folder: (folder / "cpesh.parquet").unlink(), "cpesh.parquet: missing or not parq"),
        (lambda folder: (folder / "cpesh.parquet").write_text("x"), "cpesh.parquet: missing or no"),
        (shorten_records, r"cpesh.parquet: has \d+ records, chains.json counts \d+"),
    ],
)
def test_a_bank_with_spoilt_side_files_is_not_reused(walked, tmp_path, spoil, reason):
    plan, bank = walked
    shutil.copytree(bank.path, tmp_path / "bank")
    spoil(tmp_path / "bank")
    with pytest.raises(ValueError, match=reason) as refused:
        ingest_chains(dataclasses.replace(plan, bank=str(tmp_path / "bank")))
    assert "\n" not in str(refused.value) and "delete the bank, ingest it again" in str(
        refused.value
    )


def test_two_ingestions_are_equal_to_the_byte(walked, tmp_path):
    plan, bank = walked
    ingest_chains(dataclasses.replace(plan, bank=str(tmp_path / "again")))
    assert contents(tmp_path / "again") == contents(bank.path)
    other = ingest_chains(dataclasses.replace(plan, bank=str(tmp_path / "other"), seed=1))
    assert other.sha256 != bank.sha256


@pytest.mark.parametrize("kind", ["wordnet", "obo", "edges"])
def test_an_ontology_is_encoded(kind, tmp_path):
    write = {"wordnet": write_wordnet, "obo": write_obo, "edges": write_edges}[kind]
    names = {"wordnet": "database", "obo": "kingdoms.obo", "edges": "kingdoms.csv"}
    path = write(tmp_path / names[kind], *kingdoms())
    plan = ChainPlan(f"ontology:{path}", "wordllama", str(tmp_path / "bank"))
    report = ingest_chains(plan)
    bank = open_bank(plan.bank)
    assert bank.encoder == "wordllama" and report.chains == len(bank.sequences) >= 5
    prefix = "wordnet:" if kind == "wordnet" else "kingdoms:"
    assert all(name.startswith(prefix) for name in bank.sequences)
    lanes = {"noun.animal", "noun.plant"} if kind == "wordnet" else {"lane_5", "lane_20"}
    assert set(bank.lanes) == lanes
    dropped = {gate["name"]: gate["dropped"] for gate in report.gates}
    assert dropped["lane"] > 0  # walks from `thing` cross the kingdoms
    assert report.candidates == report.chains + sum(dropped.values())


@pytest.fixture(scope="module")
def encoded_base(tmp_path_factory, obo: Path) -> Bank:
    """A bank of wordllama's with lanes of its own; its first sequence is pinned."""
    folder = tmp_path_factory.mktemp("base")
    plan = ChainPlan(f"ontology:{obo}", "wordllama", str(folder / "source"), root="animal")
    ingest_chains(plan)
    source = open_bank(plan.bank)
    names = ["pinned"] * 10 + ["book"] * 30
    rows = pd.DataFrame({"sequence": names, "lane": "Science", "text": source.texts()[:40]})
    rows["split"] = np.array(["train"] * 10 + [None] * 30, dtype=object)
    return write_bank(folder / "base", source.vectors[:40], rows, "wordllama", "test")


def test_the_base_comes_first_unchanged(obo, encoded_base: Bank, tmp_path):
    lanes = "plant=Science"
    plan = ChainPlan(
        f"ontology:{obo}", "wordllama", str(tmp_path / "bank"), str(encoded_base.path), lanes=lanes
    )
    report = ingest_chains(plan)
    bank = open_bank(plan.bank)
    assert report.base_rows == 40 and bank.lanes == ("Science",)
    np.testing.assert_array_equal(bank.vectors[:40], encoded_base.vectors)
    own = pd.read_parquet(encoded_base.path / "rows.parquet")
    rows = pd.read_parquet(bank.path / "rows.parquet")
    shared = ["sequence", "lane", "text", "split"]
    pd.testing.assert_frame_equal(rows[shared][:40], own[shared], check_dtype=False)
    assert set(rows["split"][40:]) == {"train"}
    assert "/000002" in bank.sequences[2]  # numbered on from the base
    records = pd.read_parquet(bank.path / "cpesh.parquet")
    assert records["concept_row"].min() == 40


def test_a_base_of_other_vectors_or_lanes_is_refused(obo, encoded_base, tiny_bank, tmp_path):
    plan = ChainPlan(f"ontology:{obo}", "wordllama", str(tmp_path / "bank"))
    other = dataclasses.replace(plan, base=str(tiny_bank.path))
    with pytest.raises(ValueError, match="its vectors are of encoder synthetic .16 dims., those"):
        ingest_chains(other)
    with pytest.raises(ValueError, match="its vectors are of encoder wordllama"):
        ingest_chains(graph_plan(tiny_bank, tmp_path / "bank", base=str(encoded_base.path)))
    with pytest.raises(
        ValueError, match="lanes: lane_20, lane_5 of the source is not a lane of base"
    ):
        ingest_chains(dataclasses.replace(plan, base=str(encoded_base.path)))
    assert list(tmp_path.iterdir()) == []


def anchored_plan(tmp_path: Path, pool: Bank, base: Bank, targets: list[int]) -> ChainPlan:
    table = pd.DataFrame({"target_row": targets, "rank": 9.0, "split": "val"})
    table.to_parquet(tmp_path / "q.parquet")
    return ChainPlan(
        f"anchored:{pool.path}",
        "wordllama",
        str(tmp_path / "bank"),
        str(base.path),
        queries=str(tmp_path / "q.parquet"),
        coherence="0.0",
    )


def test_pages_widen_the_base(tmp_path, tiny_bank):
    noise = 0.05 * np.random.default_rng(1).standard_normal((400, 16))
    rows = pd.read_parquet(tiny_bank.path / "rows.parquet")[:400]
    rows["text"] = [f"Near to {row}." for row in range(400)]
    vectors = tiny_bank.unit(slice(0, 400)) + noise
    base = write_bank(tmp_path / "base", vectors, rows, "synthetic", "test")
    report = ingest_chains(anchored_plan(tmp_path, tiny_bank, base, list(range(0, 400, 2))))
    bank = open_bank(report.path)
    assert report.chains > 20 and bank.num_rows > base.num_rows == report.base_rows
    assert report.coherence["absolute"] == 0.0
    table = bank.document_table()
    first = table["first_row"][table["first_row"] >= 400].tolist()
    pages = zip(first, bank.texts()[first], strict=True)
    own = tiny_bank.texts().tolist()
    for row, text in list(pages)[:5]:
        at = own.index(text)
        assert bank.texts()[row : row + 14].tolist() == own[at : at + 14]


def test_pages_of_the_base_itself_are_dropped_whole(tmp_path, tiny_bank):
    plan = anchored_plan(tmp_path, tiny_bank, tiny_bank, [10, 200])
    with pytest.raises(ValueError, match=r"chains: none of \d+ of .* is left .dropped: .*answers"):
        ingest_chains(plan)
    assert not (tmp_path / "bank").exists()


def test_a_page_that_stands_in_the_base_is_dropped(tmp_path, tiny_bank):
    # The queries ask for other rows than those that the page holds: only the base gate can see it.
    rows = pd.DataFrame({"sequence": "s", "lane": "lane-0", "text": tiny_bank.texts()[:241]})
    rows.loc[240, ["sequence", "text"]] = ["asked", "asked for"]
    vectors = tiny_bank.unit(slice(0, 241))
    vectors[240] = vectors[110] + 0.08 * np.sign(np.sin(np.arange(16) * 3.0))
    base = write_bank(tmp_path / "base", vectors, rows, "synthetic", "test")
    plan = dataclasses.replace(anchored_plan(tmp_path, tiny_bank, base, [240]), neighbours=1)
    with pytest.raises(ValueError, match="is left .dropped: base 1"):
        ingest_chains(plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"coherence": "1.0"}, "is left .dropped: .*coherence"),
        ({"lanes": "animal=A,red horse=B", "root": "red horse"}, "none of 0 of kingdoms is left"),
        ({"lanes": "Science"}, "lanes 'Science': for an ontology it must be <subtree>=<lane>"),
        ({"root": "whale"}, "root 'whale': is no concept"),
        ({"coherence": "high"}, "coherence 'high': must be auto"),
        ({"queries": "q.parquet"}, "queries: is only read by source=anchored:...; omit it"),
        ({"pool": "x"}, "pool: is only read by source=graph:<edge file>; omit it"),
        ({"source": "ontology:"}, "source 'ontology:': must be ontology:<path>"),
        ({"source": "ontology:nowhere.obo"}, "ontology nowhere.obo: no such ontology"),
        ({"source": "graph:nowhere", "root": None}, "source graph:nowhere: no such source"),
        ({"source": "graph:nowhere.csv"}, "source graph:nowhere.csv: no such source; give an edge"),
        ({"source": "anchored:nowhere"}, "needs queries, the per_query.parquet"),
        ({"base": "nowhere"}, "bank nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_no_bank(change, reason, obo, tmp_path):
    plan = ChainPlan(f"ontology:{obo}", "wordllama", str(tmp_path / "bank"))
    with pytest.raises(ValueError, match=reason) as refused:
        ingest_chains(dataclasses.replace(plan, **change))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_too_few_cpesh_records_stop_the_ingestion(obo, tmp_path):
    plan = ChainPlan(f"ontology:{obo}", "wordllama", str(tmp_path / "bank"), max_chains=1)
    with pytest.raises(ValueError, match="CPESH: 0.0% of 1 chains .*95% must"):
        ingest_chains(plan)
    assert list(tmp_path.iterdir()) == []


def test_a_concept_without_a_known_token_drops_its_chains(obo, tmp_path, monkeypatch):
    encoder = load_encoder("wordllama")
    encode = encoder.encode

    def forgetful(texts: list[str]) -> np.ndarray:
        known = [not text.startswith("horse:") for text in texts]
        return encode(texts) * np.array(known, dtype=np.float32)[:, None]

    monkeypatch.setattr(encoder, "encode", forgetful)
    monkeypatch.setattr(ingest, "load_encoder", lambda name: encoder)
    plan = ChainPlan(f"ontology:{obo}", "wordllama", str(tmp_path / "bank"))
    dropped = {gate["name"]: gate["dropped"] for gate in ingest_chains(plan).gates}
    assert dropped["zero vectors"] > 0
    assert not any(text.startswith("horse:") for text in open_bank(plan.bank).texts())
