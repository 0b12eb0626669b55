"""The baseline behind `mlflow models serve`: what is answered over HTTP, what is refused."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks.http import ask, http_server, json_body, packed_body
from lvm.models.baselines import MovingAverage
from lvm.models.predict import predict_contexts
from lvm.retrieval.rerank import fit_reranker
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import plan_windows
from tests.served import baseline_of
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

DIM = 16
CONTEXT_BTD = np.random.default_rng(0).standard_normal((2, 30, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("http") / "bank")


@pytest.fixture(scope="module")
def address(empty_store, bank):
    """A server of the baseline, with pickle switched off."""
    windows, model = plan_windows(bank, 50), MovingAverage(DIM)
    no_correction = np.tile(np.array([1, 0], np.float32), (bank.num_rows, 1))
    reranker = fit_reranker(model, bank, windows, no_correction)
    log = bank.path.parent / "server.log"
    with baseline_of(bank, empty_store, reranker):
        with http_server(BASELINE_URI, log) as address:
            yield address


@pytest.mark.parametrize("body_of", [json_body, packed_body])
@pytest.mark.parametrize("time", [1, 30])
def test_contexts_of_any_length_are_answered_with_vectors(address, body_of, time):
    status, answer = ask(address, body_of(CONTEXT_BTD[:, -time:]))
    assert status == 200
    unit_BTD = CONTEXT_BTD / np.linalg.norm(CONTEXT_BTD, axis=-1, keepdims=True)
    expected_BD = predict_contexts(MovingAverage(DIM), unit_BTD[:, -time:])
    assert np.allclose(json.loads(answer)["predictions"], expected_BD, atol=1e-6)


@pytest.mark.parametrize("body_of", [json_body, packed_body])
@pytest.mark.parametrize("rerank", ["none", "lane"])
def test_passages_come_with_text_and_origin(address, bank, body_of, rerank):
    status, answer = ask(address, body_of(CONTEXT_BTD, k=3, rerank=rerank))
    assert status == 200
    found = json.loads(answer)["predictions"]
    assert np.shape(found["vectors"]) == (2, DIM)
    for row_K, score_K, passages in zip(
        found["rows"], found["scores"], found["passages"], strict=True
    ):
        assert [one["row"] for one in passages] == row_K and score_K == sorted(score_K)[::-1]
        assert [one["text"] for one in passages] == [f"Sentence number {row}." for row in row_K]
        lanes = [bank.lanes[code] for code in bank.lane_N[row_K]]
        assert [one["lane"] for one in passages] == lanes
        assert {"score", "document", "sequence"} <= passages[0].keys()


def test_both_ways_are_the_same_answer(address):
    answers = [ask(address, body_of(CONTEXT_BTD, k=3)) for body_of in (json_body, packed_body)]
    assert answers[0] == answers[1]


def send(address: str, body: bytes) -> dict:
    status, answer = ask(address, body)
    assert status == 200, answer
    return json.loads(answer)["predictions"]


def test_eight_sessions_at_once_are_answered_as_whole_contexts(address):
    contexts = np.random.default_rng(1).standard_normal((8, 1, 30, DIM)).astype(np.float32)

    def converse(number: int) -> list[dict]:
        parts = [contexts[number][:, begin : begin + 3] for begin in range(0, 30, 3)]
        return [send(address, json_body(part, k=3, session=f"s{number}")) for part in parts]

    with ThreadPoolExecutor(8) as pool:
        conversations = list(pool.map(converse, range(8)))
    for context_1TD, found in zip(contexts, conversations, strict=True):
        whole = send(address, packed_body(context_1TD, k=3))
        assert found[-1].pop("context_rows") == 30 and found[0]["context_rows"] == 3
        assert found[-1]["rows"] == whole["rows"]
        assert np.allclose(found[-1]["vectors"], whole["vectors"], rtol=0, atol=4e-6)


def test_a_session_goes_on_after_what_it_may_not_send(address):
    own = {"session": "one"}
    assert send(address, json_body(CONTEXT_BTD[:1], **own))["context_rows"] == 30
    refused = {
        "is not (batch, time, 16)": json_body(CONTEXT_BTD[:1, :2, 1:], **own),
        "session: takes one context": json_body(CONTEXT_BTD, **own),
        "session: 'one' has 30 rows on this server, not 40": json_body(
            CONTEXT_BTD[:1], position=40, **own
        ),
    }
    for reason, body in refused.items():
        status, answer = ask(address, body)
        message = json.loads(answer)["message"]
        assert status == 400 and reason in message and len(message.splitlines()) == 1
    found = send(address, packed_body(CONTEXT_BTD[1:, :2], **own))
    both = np.concatenate([CONTEXT_BTD[:1], CONTEXT_BTD[1:, :2]], axis=1)
    assert found["context_rows"] == 32
    assert np.allclose(found["vectors"], send(address, json_body(both)), rtol=0, atol=4e-6)


def changed(value: float) -> np.ndarray:
    context_BTD = CONTEXT_BTD.copy()
    context_BTD[0, 3] = value
    return context_BTD


def packed_text(text: str) -> bytes:
    body = json.loads(packed_body(CONTEXT_BTD))
    body["params"]["packed"] = text
    return json.dumps(body).encode()


OWN = {
    "another D": (json_body(CONTEXT_BTD[..., 1:]), "shape (2, 30, 15) is not (batch, time, 16)"),
    "no batch": (json_body(CONTEXT_BTD[0]), "shape (30, 16) is not (batch, time, 16)"),
    "empty batch": (b'{"inputs": []}', "is not (batch, time, 16)"),
    "empty context": (json_body(CONTEXT_BTD[:, :0]), "is not (batch, time, 16)"),
    "strings": (b'{"inputs": [[["a", "b"]]]}', "could not convert string to float"),
    "a text beside a bank of no known encoder": (
        b'{"inputs": ["A sentence of five words."]}',
        "text: ",
    ),
    "NaN": (json_body(changed(np.nan)), "hold NaN or infinite"),
    "packed NaN": (packed_body(changed(np.nan)), "hold NaN or infinite"),
    "zero vector": (json_body(changed(0)), "hold a zero vector"),
    "packed in a model that does not read it": (
        json_body(np.zeros((2, 1, DIM))),
        "hold a zero vector",
    ),
    "k below 0": (json_body(CONTEXT_BTD, k=-1), "k: -1 is outside 0 ... 1,000"),
    "huge k": (json_body(CONTEXT_BTD, k=10**9), "k: 1000000000 is outside 0 ... 1,000"),
    "unknown order": (json_body(CONTEXT_BTD, k=2, rerank="x"), "rerank: unknown 'x'"),
    "order of nothing": (json_body(CONTEXT_BTD, rerank="lane"), "give k too"),
    "no base64": (packed_text("a*b"), "packed: is no base64 text"),
    "half a vector": (
        packed_text(base64.b64encode(bytes(100)).decode()),
        "packed: 100 bytes are not float32 values for 2 x time x 16, a multiple of 128 bytes",
    ),
    "too long": (packed_text("A" * (90 * 2**20)), "packed: is longer than 64 MiB"),
    "inputs beside packed": (
        json_body(CONTEXT_BTD, packed="AAAA"),
        "as inputs give zeros, (batch, 1, dim)",
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_what_cannot_be_answered_is_refused_in_one_line(address, case):
    body, reason = OWN[case]
    status, answer = ask(address, body)
    refused = json.loads(answer)
    assert status == 400 and refused["error_code"] == "INVALID_PARAMETER_VALUE"
    assert reason in refused["message"] and len(refused["message"].splitlines()) == 1
    assert "Traceback" not in answer.decode() and len(answer) < 400


SCHEMA = {
    "ragged lists": (
        json.dumps({"inputs": [CONTEXT_BTD[0].tolist(), CONTEXT_BTD[1, 1:].tolist()]}).encode(),
        "inhomogeneous shape",
    ),
    "k that is a word": (json_body(CONTEXT_BTD, k="three"), "Invalid parameters found"),
    "no inputs": (b"{}", "exactly one of the input fields"),
    "no JSON": (b"{", "valid JSON"),
}


@pytest.mark.parametrize("case", SCHEMA)
def test_what_breaks_the_signature_is_refused_by_mlflow(address, case):
    body, reason = SCHEMA[case]
    status, answer = ask(address, body)
    assert status == 400 and reason in json.loads(answer)["message"]
    assert "Traceback" not in answer.decode()


def test_unknown_parameters_are_left_aside_by_mlflow(address):
    assert ask(address, json_body(CONTEXT_BTD, K=3)) == ask(address, json_body(CONTEXT_BTD))
