"""Texts as contexts: what is served for them is what is served for their sentences' vectors."""

import json
import re

import mlflow
import numpy as np
import pytest

from benchmarks.http import ask, http_server
from lvm.bank.bank import open_bank, write_bank
from lvm.corpus.encoders import TextEncoder, load_encoder
from lvm.tracking.registry import BASELINE_URI
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
