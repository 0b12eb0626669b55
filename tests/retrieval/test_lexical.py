"""The words of a context as a second stage: BM25 by its formula, banks whose answer is known."""

import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation.evaluate import evaluate_reranking, evaluate_together
from lvm.models.baselines import MovingAverage
from lvm.report.evaluation import reranking_table
from lvm.retrieval.lexical import (
    DECAY,
    RECENT_ROWS,
    WordIndex,
    build_word_index,
    ensure_word_index,
    recent_words,
)
from lvm.retrieval.rerank import (
    HYBRID,
    LANE,
    LEXICAL,
    Reranker,
    check_rerank,
    fit_reranker,
    is_gain,
    possible_reranks,
)
from lvm.windows.export import plan_windows
from lvm.windows.planning import context_queries

CTX, DIM, NUM_SEQUENCES, NUM_DOCUMENTS, DOCUMENT_ROWS = 40, 16, 8, 12, 20
SEQUENCE_ROWS = NUM_DOCUMENTS * DOCUMENT_ROWS


def drawn_bank(path: Path, texts: list[str] | None, keep: float = 0.0) -> Bank:
    """Write a bank whose vectors tell the sequence of a row, and with `keep` the row before it."""
    random = np.random.default_rng(0)
    row = np.arange(NUM_SEQUENCES * SEQUENCE_ROWS)
    centres = random.standard_normal((NUM_SEQUENCES, DIM))
    vectors = 0.3 * random.standard_normal((len(row), DIM))
    for place in range(1, len(row)):
        vectors[place] += keep * vectors[place - 1]
    vectors += centres[row // SEQUENCE_ROWS]
    rows = pd.DataFrame(
        {
            "sequence": [f"s{one}" for one in row // SEQUENCE_ROWS],
            "document": [f"d{one // DOCUMENT_ROWS}" for one in row % SEQUENCE_ROWS],
        }
    )
    return write_bank(path, vectors, rows if texts is None else rows.assign(text=texts))


def telling_texts() -> list[str]:
    """Return texts in which each row repeats one word of the row before it."""
    return [f"what follows word{row - 1} is word{row}" for row in range(8 * SEQUENCE_ROWS)]


@pytest.fixture
def telling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bank:
    monkeypatch.chdir(tmp_path)
    return drawn_bank(tmp_path / "bank", telling_texts())


def test_words_that_tell_the_answer_win(telling: Bank):
    windows = plan_windows(telling, CTX)
    queries, model = windows.queries["test"], MovingAverage(DIM, 0.5)
    (own,) = evaluate_together({"ema": model}, telling, windows, queries)
    report, ranks = evaluate_reranking(model, telling, windows, queries, own, LEXICAL)
    assert own.report["hit_at_5"] < 0.2 and report["plain"]["on_list"] > 0.8
    for kind, order in (("plain", "rank"), ("corrected", "rank_corrected")):
        found = report[kind]
        assert found["gamma"] > 0 == found["beta"]
        assert found["hit_at_5_difference"]["low"] > 0.5, "tens of points"
        again = (ranks[f"{order}_reranked"].to_numpy() <= 5).mean()
        assert again == pytest.approx(found["hit_at_5"]) and again > 0.8
    assert "by words" in reranking_table(report, own.report, leaky=False)


def test_words_that_are_noise_get_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    correction = np.tile(np.float32([1, 0]), (NUM_SEQUENCES * SEQUENCE_ROWS, 1))
    for seed in range(3):
        words = np.random.default_rng(seed).integers(0, 300, (len(correction), 8))
        texts = [" ".join(f"word{one}" for one in row) for row in words]
        bank = drawn_bank(tmp_path / f"bank{seed}", texts, keep=0.9)
        found = fit_reranker(MovingAverage(DIM, 0.1), bank, plan_windows(bank, CTX), correction)
        assert found is not None and list(found.weights) == [LEXICAL]
        assert [one.gamma for one in found.weights[LEXICAL].values()] == [0, 0]


def test_a_bank_without_texts_is_refused_in_one_line(tmp_path: Path):
    bank = drawn_bank(tmp_path / "bank", None)
    windows = plan_windows(bank, CTX)
    for rerank in (LEXICAL, HYBRID):
        with pytest.raises(ValueError, match="^(rerank: )?bank .* has no (texts|lanes); [^\n]*$"):
            check_rerank(rerank, bank, windows)
    assert possible_reranks(bank, windows) == []
    correction = np.tile(np.float32([1, 0]), (bank.num_rows, 1))
    assert fit_reranker(MovingAverage(DIM), bank, windows, correction) is None


def test_texts_without_a_word_are_none(tmp_path: Path):
    bank = drawn_bank(tmp_path / "bank", ["..."] * NUM_SEQUENCES * SEQUENCE_ROWS)
    with pytest.raises(ValueError, match="has no texts"):
        build_word_index(bank)


def test_scores_are_those_of_the_formula(tmp_path: Path):
    """BM25 as Lucene computes it: k1 1.5, b 0.75, the idf always positive."""
    texts = ["red fox jumps", "red red hen", "blue hen sleeps long today", "fox fox fox hen"]
    bank = write_bank(tmp_path / "bank", np.eye(4, 4) + 0.1, {"text": texts})
    index = build_word_index(bank)
    recent = index.after_texts(["a red fox", "the hen"])
    weight = {"red": DECAY, "fox": DECAY, "hen": 1.0}
    words = [text.split() for text in texts]
    mean = np.mean([len(one) for one in words])
    expected = []
    for own in words:
        score = 0.0
        for word, times in weight.items():
            num = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - num + 0.5) / (num + 0.5))
            frequency = own.count(word)
            length = 1.5 * (1 - 0.75 + 0.75 * len(own) / mean)
            score += times * idf * frequency / (frequency + length)
        expected.append(score)
    row_QC = np.array([[3, -1, 0, 1, 2]])
    found = index.scores([recent], row_QC)[0]
    np.testing.assert_allclose(found[[2, 3, 4, 0]], expected, rtol=1e-5)
    assert found[1] == 0


def test_a_word_weighs_by_its_last_occurrence():
    words = recent_words([np.array([4, 7]), np.array([7]), np.array([2])])
    assert words.column_W.tolist() == [2, 4, 7]
    np.testing.assert_allclose(words.weight_W, [1, DECAY**2, DECAY], rtol=1e-6)
    assert recent_words([]).column_W.tolist() == []


def test_rows_and_their_texts_are_read_alike(telling: Bank):
    windows = plan_windows(telling, CTX)
    index, texts = ensure_word_index(telling), telling.texts()
    queries = windows.queries["test"].head(30)
    bounds = list(zip(queries.first_row_Q, queries.target_row_Q, strict=True))
    contexts = [np.arange(first, end) for first, end in bounds]
    recorded = context_queries(queries.target_row_Q, queries.sequence_start_Q, contexts)
    read = [index.after_texts(texts[rows].tolist()) for rows in contexts]
    for way in (index.after_queries(queries), index.after_queries(recorded)):
        for one, other in zip(way, read, strict=True):
            assert one.column_W.tolist() == other.column_W.tolist()
            assert one.weight_W.tolist() == other.weight_W.tolist()
            assert len(one.column_W) >= RECENT_ROWS


def test_an_index_is_mapped_pickled_as_its_path_and_built_again_when_damaged(telling: Bank):
    index = ensure_word_index(telling)
    assert index.path is not None and not index.score_NV.data.flags.writeable
    assert len(pickle.dumps(index)) < 1000
    same: WordIndex = pickle.loads(pickle.dumps(index))
    row_QC = np.arange(100)[None]
    recent = [index.after_texts(["word3 word50"])]
    expected = index.scores(recent, row_QC)
    assert np.array_equal(same.scores(recent, row_QC), expected) and expected.max() > 0
    damaged = index.path / "data.npy"
    held = bytearray(damaged.read_bytes())
    held[-1] ^= 1
    damaged.write_bytes(held)
    assert np.array_equal(ensure_word_index(telling).scores(recent, row_QC), expected)
    shutil.rmtree(index.path)
    assert np.array_equal(ensure_word_index(telling).scores(recent, row_QC), expected)


def test_a_disk_that_takes_no_index_costs_no_answer(telling: Bank, tmp_path: Path):
    (tmp_path / "file").write_text("")
    index = ensure_word_index(telling, tmp_path / "file")
    assert index.path is None
    again = pickle.loads(pickle.dumps(index))
    recent = [again.after_texts(["word3"])]
    assert again.scores(recent, np.array([[3, 4, 5]]))[0].tolist()[2] == 0


def test_the_orders_of_a_model_are_read_back(telling: Bank, tmp_path: Path):
    windows = plan_windows(telling, CTX)
    correction = np.tile(np.float32([1, 0]), (telling.num_rows, 1))
    found = fit_reranker(MovingAverage(DIM), telling, windows, correction)
    assert found is not None
    found.save(tmp_path / "stage.safetensors")
    again = Reranker.load(tmp_path / "stage.safetensors")
    assert again == found and again.weights[LEXICAL]["plain"].gamma > 0
    for rerank in (LANE, HYBRID):
        with pytest.raises(ValueError, match="logged without lanes; ask with rerank=none or lexic"):
            again.stage(rerank, telling)


def test_a_gain_is_shown_by_several_documents():
    before_Q, document_Q = np.full(40, 9.0), np.repeat(np.arange(8), 5)
    after_Q = np.where(np.arange(40) % 5 <= np.arange(40) // 5 % 2, 1.0, 9.0)
    assert is_gain(after_Q, before_Q, document_Q)
    assert not is_gain(before_Q, before_Q, document_Q)
    assert not is_gain(after_Q, before_Q, np.zeros(40, int)), "one document shows nothing"
    once_Q = np.where(np.arange(40) < 3, 1.0, 9.0)
    assert not is_gain(once_Q, before_Q, document_Q)
