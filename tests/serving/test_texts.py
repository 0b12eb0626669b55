"""Texts as contexts: what is served for them is what is served for their sentences' vectors."""

import json
import re

import mlflow
import numpy as np
import pytest

from benchmarks.http import ask, http_server
from lvm.bank.bank import open_bank, write_bank
from lvm.corpus.encoders import TextEncoder, load_encoder
from lvm.models.baselines import MovingAverage
from lvm.models.facts import facts_of
from lvm.retrieval.rerank import LEXICAL, Reranker, Weights
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import plan_windows
from tests.served import baseline_of, text_bank

TEXT = "The routine adds the elements. The axis may be negative! No error is raised here."
SENTENCES = ["The routine adds the elements.", "The axis may be negative!"]
SENTENCES += ["No error is raised here."]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return text_bank(tmp_path_factory.mktemp("texts") / "bank")


@pytest.fixture(scope="module")
def served(bank, empty_store):
    with baseline_of(bank, empty_store):
        yield mlflow.pyfunc.load_model(BASELINE_URI)


@pytest.fixture(scope="module")
def by_words(bank, served):
    """The same model logged with an order by words."""
    weights = dict.fromkeys(("plain", "corrected"), Weights(0.05, gamma=0.5))
    facts = facts_of("ema", "none", bank, plan_windows(bank, 50))
    reranker = Reranker(None, {LEXICAL: weights})
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(MovingAverage(bank.dim), facts, reranker=reranker)
    return mlflow.pyfunc.load_model(f"models:/{model_id}")


def test_texts_are_ordered_by_their_words_as_queries_of_the_bank_are(by_words, bank):
    texts = bank.texts()
    stage = by_words.unwrap_python_model().reranker.stage(LEXICAL, bank)
    queries = plan_windows(bank, 50).queries["test"].head(8)
    num_moved = 0
    for place, target in enumerate(queries.target_row_Q):
        sentences = texts[queries.first_row_Q[place] : target].tolist()
        whole = by_words.predict([sentences], params={"k": 200})
        found = by_words.predict([sentences], params={"k": 5, "rerank": "lexical"})
        row_1C = whole["rows"]
        clues = stage.after_queries(queries.take(slice(place, place + 1)), bank)
        term_1C = stage.terms(row_1C, clues)["gamma"]
        expected = whole["scores"] + np.float32(0.025) * term_1C
        order = np.argsort(-expected[0], kind="stable")[:5]
        assert found["rows"][0].tolist() == row_1C[0][order].tolist()
        assert np.allclose(found["scores"][0], expected[0][order])
        num_moved += found["rows"][0].tolist() != row_1C[0][:5].tolist()
    assert num_moved > 2


@pytest.mark.parametrize(
    ("given", "more", "reason"),
    [
        (None, {}, "rerank: lexical reads texts, which neither vectors nor sessions have"),
        ([TEXT], {"session": "one"}, "rerank: lexical reads texts, which neither vectors nor"),
        ([TEXT], {"rerank": "hybrid"}, "the model was logged without lanes; ask with rerank=none"),
    ],
)
def test_an_order_by_words_needs_texts(by_words, vector_BTD, given, more, reason):
    given = vector_BTD if given is None else given
    with pytest.raises(ValueError, match=reason):
        by_words.predict(given, params={"k": 2, "rerank": "lexical"} | more)


@pytest.fixture(scope="module")
def vector_BTD(bank):
    return load_encoder("wordllama").encode(SENTENCES)[None]


@pytest.mark.parametrize("given", [TEXT, [TEXT], [SENTENCES], np.array([TEXT])])
def test_a_text_is_answered_as_the_vectors_of_its_sentences(served, vector_BTD, given):
    assert np.array_equal(served.predict(given), served.predict(vector_BTD))


def test_texts_of_several_lengths_come_together(served):
    given = [TEXT, SENTENCES[:1], "One sentence of five words."]
    found = served.predict(given, params={"k": 2})
    for number, one in enumerate(given):
        alone = served.predict([one], params={"k": 2})
        assert found["passages"][number] == alone["passages"][0]
        assert np.array_equal(found["vectors"][number], alone["vectors"][0])
    assert found["rows"].shape == found["scores"].shape == (3, 2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([""], "text: holds no sentence of three words or more"),
        (["Too short."], "text: holds no sentence of three words or more"),
        ([[["a"]]], "could not convert string to float"),
        ([[]], "is not (batch, time, 256)"),
        ([], "is not (batch, time, 256)"),
    ],
)
def test_a_text_without_a_sentence_is_refused(served, given, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        served.predict(given)


def test_texts_need_the_banks_encoder(bank, tmp_path):
    unnamed = tmp_path / "unnamed"
    write_bank(unnamed, bank.vectors)
    with pytest.raises(ValueError, match="does not record what made its vectors; give vectors"):
        TextEncoder(unnamed, open_bank(unnamed).encoder, bank.dim)


@pytest.mark.slow
def test_a_text_is_answered_over_http(served, bank, vector_BTD):
    with http_server(BASELINE_URI, bank.path.parent / "server.log") as address:
        body = json.dumps({"inputs": [TEXT], "params": {"k": 3}}).encode()
        status, answer = ask(address, body)
        assert status == 200
        found = json.loads(answer)["predictions"]
        expected = served.predict(vector_BTD, params={"k": 3})
        assert found["passages"] == expected["passages"]
        status, answer = ask(address, b'{"inputs": ["Too short."]}')
        assert status == 400
        refused = json.loads(answer)["message"]
        assert refused.endswith("text: holds no sentence of three words or more")
