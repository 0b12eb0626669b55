"""Assigned lanes on banks whose right lanes are known.

Shapes: M documents, D vector dim, L lanes.
"""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.bank.row_table import TMD_LANES, UNASSIGNED
from lvm.corpus.encoders import Encoder, load_encoder
from lvm.corpus.ingest import row_names
from lvm.evaluation.lane_assignment import (
    DOMAINS_FILE,
    KMEANS,
    PROTOTYPES,
    assign_lanes,
    bank_encoder,
    cluster_lanes,
    document_means,
    lane_agreement,
    prototype_lanes,
    read_domains,
    with_lanes,
)
from lvm.report.lanes import assignment_table
from lvm.system.seeding import generator
from lvm.system.settings import read_lane_rules
from lvm.windows.export import plan_windows

pytestmark = pytest.mark.slow

RULES = read_lane_rules()
LANES = ("Economics", "Law", "Medicine", "Software")
DOCUMENTS, ROWS = 12, 5
ENDINGS = (
    "river table summer garden yellow window kitchen feather button candle pencil lantern".split()
)
# None of these stands in domains.yaml.
SENTENCES = {
    "Economics": "Higher wages shift the supply curve, so firms raise the price of goods.",
    "Law": "The appellate court dismissed the appeal of the convicted defendant.",
    "Medicine": "The nurse gave the patient penicillin against the bacterial infection.",
    "Software": "The method parses a string argument and returns an iterator over the file object.",
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("wordllama")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Bank:
    """One sequence a lane, whose rows scatter around the prototype of the lane."""
    domains, random = read_domains(), generator(0, "planted lanes")
    blocks, rows = [], []
    for lane in LANES:
        centre_D = encoder.encode(domains[lane]).mean(axis=0)
        centre_D /= np.linalg.norm(centre_D)
        shape = (DOCUMENTS * ROWS, encoder.dim)
        blocks.append(centre_D + 0.05 * random.standard_normal(shape))
        rows += [(lane.lower(), f"d{row // ROWS}", lane) for row in range(DOCUMENTS * ROWS)]
    table = pd.DataFrame(rows, columns=["sequence", "document", "lane"])
    path = tmp_path_factory.mktemp("planted") / "bank"
    return write_bank(path, np.concatenate(blocks), table, "wordllama", "test")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Bank:
    """One sequence of real text a lane, whose 12 documents differ in their last word."""
    rows = [
        (lane, ending, lane, f"{text} {ending}")
        for lane, text in SENTENCES.items()
        for ending in ENDINGS
    ]
    table = pd.DataFrame(rows, columns=["sequence", "document", "lane", "text"])
    path = tmp_path_factory.mktemp("told") / "bank"
    return write_bank(path, encoder.encode(list(table["text"])), table, "wordllama", "test")


@pytest.mark.parametrize("name", ["planted", "told"])
def test_prototypes_recover_the_right_lanes(name: str, request: pytest.FixtureRequest) -> None:
    bank = request.getfixturevalue(name)
    found = assign_lanes(bank, plan_windows(bank, 4), RULES, PROTOTYPES)
    assert found.bank.lanes == TMD_LANES and found.facts["encoder"] == "wordllama"
    agreement = lane_agreement(bank, found.bank)
    assert agreement is not None and agreement.adjusted_rand == agreement.nmi == 1.0
    assert agreement.same_name_accuracy == agreement.best_match_of_labelled == 1.0
    assert agreement.best_match == {lane: lane for lane in LANES}


def test_a_document_between_two_prototypes_is_unassigned(
    planted: Bank, encoder: Encoder, tmp_path: Path
) -> None:
    law_D, software_D = (
        planted.unit(slice(lane * 60, lane * 60 + 60)).mean(axis=0) for lane in (1, 3)
    )
    rows = pd.DataFrame({"sequence": ["a", "b", "c"], "document": ["0", "1", "2"]})
    vectors_ND = np.stack([law_D, law_D + software_D, software_D])
    bank = write_bank(tmp_path / "between", vectors_ND, rows, "wordllama", "test")
    found = prototype_lanes(bank, encoder, read_domains(), RULES)
    assert found.bank.lane_N is not None and found.facts["unassigned_rows"] == 1
    assert found.bank.lane_N.tolist() == [
        TMD_LANES.index("Law"),
        UNASSIGNED,
        TMD_LANES.index("Software"),
    ]
    no_margin = dataclasses.replace(RULES, assign_margin=0.0)
    assert (prototype_lanes(bank, encoder, read_domains(), no_margin).bank.lane_N >= 0).all()


def test_a_document_far_from_all_prototypes_is_unassigned(planted: Bank, encoder: Encoder) -> None:
    strict = dataclasses.replace(RULES, assign_score=1.0)
    found = prototype_lanes(planted, encoder, read_domains(), strict)
    assert found.facts["unassigned_rows"] == planted.num_rows
    assert lane_agreement(planted, found.bank) is None


def test_clusters_are_the_planted_lanes_the_same_by_seed(planted: Bank) -> None:
    windows = plan_windows(planted, 4)
    found = assign_lanes(planted, windows, RULES, KMEANS)
    assert found.facts["clusters"] == 4 and found.facts["unassigned_rows"] == 0
    assert found.bank.lanes == tuple(f"cluster-0{code}" for code in range(4))
    agreement = lane_agreement(planted, found.bank)
    assert agreement is not None and agreement.adjusted_rand == pytest.approx(1.0)
    assert agreement.same_name_accuracy is None
    again = assign_lanes(planted, windows, RULES, KMEANS)
    assert np.array_equal(found.bank.lane_N, again.bank.lane_N)


def test_clusters_are_fitted_on_train_rows_alone(planted: Bank) -> None:
    """Vectors of other rows may be anything: the train rows keep their clusters."""
    windows = plan_windows(planted, 4)
    train_row = windows.train_rows()
    other_ND = np.array(planted.vectors)
    is_other_N = np.ones(planted.num_rows, bool)
    is_other_N[train_row] = False
    other_ND[is_other_N] = np.roll(other_ND[is_other_N], 7, axis=1)
    spoilt = dataclasses.replace(planted, vectors=other_ND)
    first, second = (cluster_lanes(one, windows, 4).bank.lane_N for one in (planted, spoilt))
    assert first is not None and second is not None
    assert np.array_equal(first[train_row], second[train_row])
    assert not np.array_equal(first, second)


def test_clusters_are_named_by_their_own_words(told: Bank) -> None:
    found = assign_lanes(told, plan_windows(told, 4), RULES, KMEANS)
    assert found.bank.lane_N is not None
    for place, text in enumerate(SENTENCES.values()):
        name = found.bank.lanes[found.bank.lane_N[place * DOCUMENTS]]
        number, *words = name.split()
        assert number.startswith("cluster-0") and len(words) == 2
        assert all(word in text.lower() for word in words)


def test_more_clusters_than_documents_are_refused(told: Bank) -> None:
    with pytest.raises(ValueError, match="documents with train rows .* make no 400 clusters"):
        cluster_lanes(told, plan_windows(told, 4), 400)


def test_document_means_leave_rows_out(planted: Bank) -> None:
    mean_MD = document_means(planted)
    assert mean_MD.shape == (len(LANES) * DOCUMENTS, planted.dim)
    expected_D = planted.unit(slice(0, ROWS)).mean(axis=0)
    np.testing.assert_allclose(mean_MD[0], expected_D / np.linalg.norm(expected_D), atol=1e-6)
    first_N = np.arange(planted.num_rows) == 0
    alone_MD = document_means(planted, first_N)
    np.testing.assert_allclose(alone_MD[0], planted.unit(slice(0, 1))[0], atol=1e-6)
    assert not alone_MD[1:].any()


def test_an_unknown_lane_is_an_error_never_lane_zero(told: Bank) -> None:
    lane_M = ["Law", None, "Alchemy"] + ["Law"] * (len(told.documents) - 3)
    with pytest.raises(ValueError, match="lanes: Alchemy unknown; a lane is one of Economics, Law"):
        with_lanes(told, lane_M, LANES)
    lane_M[2] = None
    assert with_lanes(told, lane_M, LANES).lane_N[:3].tolist() == [1, UNASSIGNED, UNASSIGNED]


def test_an_unknown_method_and_missing_labels_are_refused(told: Bank) -> None:
    windows = plan_windows(told, 4)
    with pytest.raises(
        ValueError, match="'topics' is unknown; use one of bank, prototypes, kmeans"
    ):
        assign_lanes(told, windows, RULES, "topics")
    plain = dataclasses.replace(told, lane_N=None, lanes=())
    with pytest.raises(ValueError, match="no labels of its own; use lanes=prototypes"):
        assign_lanes(plain, windows, RULES)
    assert assign_lanes(plain, windows, RULES, KMEANS).facts["clusters"] == 16
    assert assign_lanes(told, windows, RULES).bank is told


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("Alchemy: [gold]", "'Alchemy' is not a lane; the lanes are Science, Mathematics"),
        ("Law: []", "Law must have a list of one or more sentences"),
        ("Law: [1]", "Law must have a list of one or more sentences"),
        ("[Law]", "must name domains"),
        ("Law: [", "not a readable YAML file"),
    ],
)
def test_a_wrong_domains_file_is_refused(tmp_path: Path, contents: str, message: str) -> None:
    path = tmp_path / "domains.yaml"
    path.write_text(contents)
    with pytest.raises(ValueError) as caught:
        read_domains(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_domain_is_described_by_several_sentences() -> None:
    domains = read_domains(DOMAINS_FILE)
    assert tuple(domains) == TMD_LANES
    assert min(len(set(sentences)) for sentences in domains.values()) >= 4


def test_the_encoder_is_the_banks_own(told: Bank, planted: Bank, tiny_bank: Bank) -> None:
    assert bank_encoder(told).name == "wordllama"
    with pytest.raises(ValueError, match="'wordllama': gives 256 dims, bank .* has 16"):
        bank_encoder(tiny_bank, "wordllama")
    unknown = dataclasses.replace(told, encoder="unknown")
    with pytest.raises(ValueError, match="does not record what made its vectors"):
        bank_encoder(unknown)
    turned = dataclasses.replace(told, vectors=np.roll(told.vectors, 1, axis=1))
    with pytest.raises(ValueError, match="gives texts of bank .* other vectors"):
        bank_encoder(turned)
    assert planted.texts() is None and bank_encoder(planted).dim == 256


def with_texts(bank: Bank, texts: list[str | None], path: Path, turn: int) -> Bank:
    """Write the bank with other texts, its vectors turned by so many dims."""
    rows = row_names(bank).assign(text=texts)
    return write_bank(path, np.roll(bank.vectors, turn, axis=1), rows, "wordllama", "test")


def test_rows_without_a_text_do_not_stop_the_check_of_the_encoder(
    told: Bank, tmp_path: Path
) -> None:
    texts = told.texts()
    assert texts is not None
    some = [None if row % 7 == 0 else text for row, text in enumerate(texts)]
    assert bank_encoder(with_texts(told, some, tmp_path / "same", 0)).name == "wordllama"
    with pytest.raises(ValueError, match="gives texts of bank .* other vectors"):
        bank_encoder(with_texts(told, some, tmp_path / "other", 1))


@pytest.mark.parametrize(("blank", "checked"), [(0, 8), (45, 3), (48, 0)])
def test_the_assignment_says_how_many_texts_the_encoder_gave_again(
    told: Bank, tmp_path: Path, blank: int, checked: int
) -> None:
    texts = told.texts()
    assert texts is not None
    bank = with_texts(told, [" "] * blank + texts[blank:].tolist(), tmp_path / "bank", 0)
    found = assign_lanes(bank, plan_windows(bank, 4), RULES, PROTOTYPES)
    assert found.facts["checked_rows"] == checked
    unchecked = "No row has a text, so nothing shows that this encoder made the bank; make sure"
    assert (unchecked in assignment_table(found, None)) == (checked == 0)


def test_an_encoder_that_is_not_there_is_refused_in_one_line(
    told: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    hosted = dataclasses.replace(told, encoder="sentence-transformers/gtr-t5-base")
    with pytest.raises(ValueError) as caught:
        bank_encoder(hosted)
    assert "sentence-transformers/gtr-t5-base" in str(caught.value)
    assert "pip install -e .[encoders]" in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_is_asked_for_without_download(told: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def absent(name: str, **options: bool) -> None:
        asked.append((name, options))
        raise OSError("not in the cache")

    found = types.SimpleNamespace(SentenceTransformer=absent)
    monkeypatch.setitem(sys.modules, "sentence_transformers", found)
    with pytest.raises(ValueError, match="'some/model': is not on this machine; .* local folder"):
        bank_encoder(told, "some/model")
    assert asked == [("some/model", {"local_files_only": True})]
