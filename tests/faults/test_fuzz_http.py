"""Requests to the served model that are mutated: the right vectors, or a plain refusal."""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from hypothesis import strategies as st
from mlflow.pyfunc import scoring_server
from starlette.testclient import TestClient

from benchmarks.http import ask, http_server, json_body, packed_body
from lvm.models.baselines import MovingAverage
from lvm.models.predict import predict_contexts
from lvm.tracking.registry import BASELINE_URI
from tests.faults.conftest import Tally
from tests.faults.fuzzing import ODD, fuzz, mutated_bytes, mutated_tree
from tests.served import baseline_of
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults

DIM = 16
CONTEXT_BTD = np.random.default_rng(0).standard_normal((1, 3, DIM)).round(3).astype(np.float32)
GOOD = json.loads(json_body(CONTEXT_BTD, k=2, rerank="none", keep_context=True))
PACKED = json.loads(packed_body(CONTEXT_BTD, k=2))
KINDS = ["application/json", "application/json; charset=utf-8", "text/csv", "text/plain"]
LONGEST = 20_000  # MLflow's own refusals show a print of the data; lvm's are one line


@pytest.fixture(scope="module")
def place(
    empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """A folder with a bank and a baseline of it, pickle switched off."""
    folder = tmp_path_factory.mktemp("http")
    bank = make_bank(folder / "bank", num_sequences=3)
    with baseline_of(bank, empty_store) as patch:
        yield patch


def expected(request: dict[str, Any]) -> np.ndarray:
    """Return the vectors that a request asks for, computed another way."""
    inputs = np.array(request["inputs"], np.float32).astype(np.float64)
    packed = (request.get("params") or {}).get("packed")
    if packed:
        assert not inputs.any() and inputs.shape[1] == 1
        raw = np.frombuffer(base64.b64decode(packed, validate=True), "<f4")
        inputs = raw.reshape(len(inputs), -1, DIM).astype(np.float64)
    assert inputs.ndim == 3 and inputs.shape[2] == DIM and np.isfinite(inputs).all()
    unit_BTD = inputs / np.linalg.norm(inputs, axis=-1, keepdims=True)
    return predict_contexts(MovingAverage(DIM), unit_BTD.astype(np.float32))


def assert_answered(status: int, body: bytes, sent: bytes) -> None:
    """Assert that an answer is the right one, or that it refuses and says why.

    MLflow adds a traceback to what it cannot parse, before lvm or the signature is asked.
    """
    assert len(body) < LONGEST + 3 * len(sent)
    if status != 200:
        assert status in (400, 415, 500), (status, body)
        if status == 400 and json.loads(body)["error_code"] == "INVALID_PARAMETER_VALUE":
            message = json.loads(body)["message"]
            assert message and "Traceback" not in message
        return
    request, predictions = json.loads(sent), json.loads(body)["predictions"]
    params = request.get("params") or {}
    k = int(params.get("k") or 0)
    vectors = predictions["vectors"] if k else predictions
    assert np.allclose(vectors, expected(request), atol=1e-5)
    if k:
        assert 0 < k <= 1000 and np.shape(predictions["rows"]) == (len(vectors), k)
        assert all(len(one) <= k for one in predictions["passages"])


def test_mutated_requests(place: pytest.MonkeyPatch, tally: Tally) -> None:
    place.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    app = scoring_server.init(mlflow.pyfunc.load_model(BASELINE_URI))
    client = TestClient(app, raise_server_exceptions=False)
    num_broken = 0

    def check(sent: tuple[bytes, str]) -> None:
        nonlocal num_broken
        raw, kind = sent
        answer = client.post("/invocations", content=raw, headers={"Content-Type": kind})
        num_broken += answer.status_code == 500
        assert_answered(answer.status_code, answer.content, raw)

    bodies = st.one_of(
        mutated_tree(GOOD, ODD).map(lambda tree: json.dumps(tree).encode()),
        mutated_tree({"inputs": GOOD["inputs"], "params": {"k": 1}}).map(
            lambda tree: json.dumps(tree).encode()
        ),
        mutated_tree(PACKED, ODD).map(lambda tree: json.dumps(tree).encode()),
        mutated_bytes(json.dumps(GOOD).encode(), header=40),
        st.sampled_from([b"", b"[" * 100_000, b"null", b"\xff", b'{"inputs": ' + b"[" * 500]),
    )
    requests = st.tuples(bodies, st.sampled_from([*[KINDS[0]] * 9, *KINDS]))
    fuzz(tally, "HTTP requests", 700, requests, check)
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    print(f"{num_broken} of 700 requests broke MLflow's own parser (status 500)")


def test_a_real_server_goes_on_answering(
    place: pytest.MonkeyPatch, tmp_path: Path, tally: Tally
) -> None:
    bodies = [b"", b"{", b"null", b"[" * 100_000, b"\xff", b'{"inputs": []}', b'{"inputs": 1}']
    bodies += [
        json.dumps(GOOD | {"params": {"k": k}}).encode() for k in (-1, 2**63, "x", None, True)
    ]
    bodies += [json.dumps(PACKED | {"params": {"packed": "A" * n}}).encode() for n in (1, 3, 10**6)]
    good = json_body(CONTEXT_BTD, k=2)
    with http_server(BASELINE_URI, tmp_path / "server.log") as address:
        first = ask(address, good)
        assert_answered(*first, good)
        for body in bodies:
            with tally.injecting("requests to a real server"):
                assert_answered(*ask(address, body), body)
                assert ask(address, good) == first
