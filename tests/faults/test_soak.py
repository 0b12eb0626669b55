"""A served model under twice its comfortable load: right answers, flat memory.

SOAK_MINUTES says for how long (3; `make soak` takes 30).
"""

import os

import mlflow
import numpy as np
import pytest

from benchmarks.http import http_server, json_body, packed_body
from lvm.tracking.registry import BASELINE_URI
from tests.faults.load import Question, comfortable_rate, open_load
from tests.served import baseline_of
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults

MINUTES = float(os.environ.get("SOAK_MINUTES", "3"))
DIM, NUM_QUESTIONS, NUM_CLIENTS = 16, 24, 16
WARM_UP = 5.0  # seconds of one client, for its rate
# What the second half may add: pages that allocators keep, then a share of the requests.
MAX_NOISE, MAX_GROWTH = 16 * 2**20, 2**18  # bytes; bytes a 1,000 requests


@pytest.fixture(scope="module")
def served(tmp_path_factory, empty_store):
    """The address of a served baseline, with questions whose answers it gave in process."""
    folder = tmp_path_factory.mktemp("soak")
    bank = make_bank(folder / "bank")
    with baseline_of(bank, empty_store):
        questions = asked(mlflow.pyfunc.load_model(BASELINE_URI))
        with http_server(BASELINE_URI, folder / "server.log") as address:
            yield address, questions


def asked(model: mlflow.pyfunc.PyFuncModel) -> list[Question]:
    """Return contexts of several lengths, as lists or packed, some with passages."""
    random, questions = np.random.default_rng(0), []
    for number in range(NUM_QUESTIONS):
        context_BTD = random.standard_normal((1 + number % 3, 1 + 7 * number % 40, DIM))
        context_BTD = context_BTD.astype(np.float32)
        body_of = (json_body, packed_body)[number % 2]
        if number % 3:
            found = model.predict(context_BTD, params={"k": 3})
            expected = (np.asarray(found["vectors"]), np.asarray(found["rows"]).tolist())
            questions.append(Question(body_of(context_BTD, k=3), *expected))
        else:
            questions.append(Question(body_of(context_BTD), model.predict(context_BTD), None))
    return questions


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """Return the bytes a second by which memory grows over its second half, over all of it."""
    half = memory[len(memory) // 2 :]
    seconds, total = np.array(half).T
    slope = float(np.polyfit(seconds, total, 1)[0])
    return slope, slope * float(seconds[-1] - seconds[0])


def test_a_leak_shows_in_the_line() -> None:
    leak = [(second, 2**30 + 2**20 * second) for second in range(100)]
    assert growth(leak) == pytest.approx((2**20, 49 * 2**20))
    assert growth([(second, 2**30) for second in range(100)])[0] == pytest.approx(0, abs=1)


def test_another_answer_is_seen_as_wrong() -> None:
    question = Question(b"", np.ones((1, 2)), [[3, 4]])
    right = b'{"predictions": {"vectors": [[1, 1]], "rows": [[3, 4]]}}'
    assert question.is_answered_by(right)
    assert not question.is_answered_by(right.replace(b"[3, 4]", b"[4, 3]"))
    assert not question.is_answered_by(right.replace(b"[1, 1]", b"[1, 1.001]"))


def test_twice_the_comfortable_load_is_borne(served, tally, capsys) -> None:
    address, questions = served
    rate = 2 * comfortable_rate(address, questions, WARM_UP)
    num_requests = int(rate * 60 * MINUTES)
    with tally.injecting("request at twice the comfortable rate", num_requests):
        seen, memory = open_load(address, questions, rate, 60 * MINUTES, NUM_CLIENTS)
        slope, grown = growth(memory)
        answered, per_thousand = len(seen.seconds), 1000 * slope / rate
        p50, p95 = np.quantile(seen.seconds, [0.5, 0.95])
        with capsys.disabled():
            print(
                f"\nsoak: {MINUTES:g} min at {rate:.0f} requests a second, twice one client's; "
                f"{answered:,} answered, {len(seen.refused):,} refused, {len(seen.wrong)} wrong; "
                f"P50 {1e3 * p50:.0f} ms, P95 {1e3 * p95:.0f} ms; memory "
                f"{memory[-1][1] / 2**20:.0f} MiB, {per_thousand / 2**20:+.3f} MiB a 1,000 requests"
            )
        assert not seen.wrong, seen.wrong[:3]
        assert answered > num_requests // 4, seen.refused[:3]
        assert grown < MAX_NOISE + MAX_GROWTH * num_requests / 2000
