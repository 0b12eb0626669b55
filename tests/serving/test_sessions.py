"""What a server remembers: cached answers are those of a server that remembers nothing.

Shapes: T time, D vector dim.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lvm.models.predict import predict_contexts
from lvm.serving import sessions
from lvm.serving.sessions import Memory, cache_bytes
from tests.models.test_streaming import DIM, TOLERANCE, VARIANTS, rows, toy

CTX = 20
ROOM = 2**24


def uncached(model, context_TD: np.ndarray) -> np.ndarray:
    """Return the prediction (D,) after a context that no server has seen."""
    return predict_contexts(model, context_TD[None], CTX)[0]


def close(found_D: np.ndarray, expected_D: np.ndarray) -> bool:
    return np.allclose(found_D, expected_D, rtol=0, atol=TOLERANCE)


def drawn(seed: int, num_rows: int = 37) -> np.ndarray:
    vector_TD = np.random.default_rng(seed).standard_normal((num_rows, DIM)).astype(np.float32)
    return vector_TD / np.linalg.norm(vector_TD, axis=1, keepdims=True)


@pytest.mark.parametrize(("name", "sizes"), VARIANTS)
def test_growing_contexts_and_sessions_are_answered_as_whole_ones(name: str, sizes: dict) -> None:
    model, context_TD = toy(name, sizes), rows().numpy()
    growing, memory = Memory(model, CTX, ROOM), Memory(model, CTX, ROOM)
    for num_rows in range(1, len(context_TD) + 1):
        expected_D = uncached(model, context_TD[:num_rows])
        assert close(growing.predict(context_TD[:num_rows]), expected_D)
        with memory.session("one", context_TD[num_rows - 1 : num_rows]) as (seen_TD, vector_D):
            assert np.array_equal(seen_TD, context_TD[:num_rows])
            assert close(vector_D, expected_D)
    # Read anew: the first, and where a fifth of ctx was dropped (at 21, 25, 29, 33, 37 rows).
    assert growing.num_hits == memory.num_hits == len(context_TD) - 6


def test_a_context_that_was_answered_may_be_continued_in_several_ways() -> None:
    model, context_TD = toy("delta_memory", {}), drawn(0, 12)
    memory = Memory(model, CTX, ROOM)
    memory.predict(context_TD)
    for seed in (1, 2, 3):
        forked_TD = np.concatenate([context_TD, drawn(seed, 1)])
        assert close(memory.predict(forked_TD), uncached(model, forked_TD))
    again_D = memory.predict(context_TD)
    assert np.array_equal(again_D, memory.predict(context_TD))
    assert memory.num_hits == memory.num_answers - 1 == 5


def test_a_long_addition_is_read_with_its_context_in_one_pass() -> None:
    model, context_TD = toy("delta_memory", {}), drawn(0, 20)
    memory = Memory(model, CTX, ROOM)
    memory.predict(context_TD[:4])
    assert close(memory.predict(context_TD), uncached(model, context_TD))
    assert memory.num_hits == 0


def test_the_memory_stays_within_its_bytes_and_drops_what_was_not_used() -> None:
    model = toy("delta_memory", {})
    one = Memory(model, CTX, ROOM)
    one.predict(drawn(0))
    bound = 5 * one.num_bytes
    memory = Memory(model, CTX, bound)
    for seed in range(1, 41):
        memory.predict(drawn(seed))
        with memory.session(f"session {seed}", drawn(seed, 3)):
            pass
        memory.predict(drawn(0))  # used again and again: it stays
        assert memory.num_bytes <= bound
    assert memory.num_hits == 39 and memory.num_dropped >= 70
    assert f"of {bound / 2**20:.1f} MiB" in str(memory)


def test_eight_sessions_at_once_are_answered_as_one_after_another() -> None:
    model, contexts = toy("memory_gru", {}), [drawn(seed) for seed in range(8)]
    memory = Memory(model, CTX, ROOM)

    def ask(number: int) -> list[np.ndarray]:
        answers = []
        for row in range(len(contexts[number])):
            memory.predict(contexts[number][: row + 1])
            with memory.session(f"{number}", contexts[number][row : row + 1]) as (_, vector_D):
                answers.append(vector_D)
        return answers

    with ThreadPoolExecutor(8) as pool:
        for context_TD, answers in zip(contexts, pool.map(ask, range(8)), strict=True):
            expected_TD = [uncached(model, context_TD[: n + 1]) for n in range(len(context_TD))]
            np.testing.assert_allclose(answers, expected_TD, rtol=0, atol=TOLERANCE)


def test_requests_of_one_session_take_turns() -> None:
    memory = Memory(toy("ema", {}), CTX, ROOM)

    def append(seed: int) -> None:
        with memory.session("one", drawn(seed, 2)):
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(50)))
    with memory.session("one", drawn(50, 1)) as (context_TD, _):
        assert len(context_TD) == 101
        assert {tuple(row_D) for row_D in context_TD[:-1]} == {
            tuple(row_D) for seed in range(50) for row_D in drawn(seed, 2)
        }


def test_a_position_repeats_or_restarts_a_session() -> None:
    model, context_TD = toy("delta_memory", {}), drawn(0)
    memory = Memory(model, CTX, ROOM)
    for position, num_sent in ((0, 10), (10, 1), (10, 1), (5, 20), (0, 3)):
        sent_TD = context_TD[position : position + num_sent]
        with memory.session("one", sent_TD, position) as (seen_TD, vector_D):
            assert np.array_equal(seen_TD, context_TD[: position + num_sent])
            assert close(vector_D, uncached(model, seen_TD))
    reason = "session: 'one' has 3 rows on this server, not 4; send its whole context"
    with pytest.raises(ValueError, match=reason):
        with memory.session("one", context_TD[:1], 4):
            pass


@pytest.mark.parametrize("position", [None, 2])
def test_a_session_whose_answer_fails_is_as_it_was(position) -> None:
    model, context_TD = toy("delta_memory", {}), drawn(0, 9)
    memory = Memory(model, CTX, ROOM)
    with memory.session("one", context_TD[:8]):
        pass
    with pytest.raises(OSError), memory.session("one", drawn(1, 1), position):
        raise OSError
    with memory.session("one", context_TD[8:]) as (seen_TD, vector_D):
        assert np.array_equal(seen_TD, context_TD)
        assert close(vector_D, uncached(model, context_TD))


def test_a_session_that_the_memory_cannot_hold_is_refused() -> None:
    memory = Memory(toy("ema", {}), CTX, 4096)
    reason = r"session: 100 rows take 4,\d+ bytes, more than the 4,096 of LVM_CACHE_BYTES"
    with pytest.raises(ValueError, match=reason):
        with memory.session("one", drawn(0, 100)):
            pass
    with memory.session("one", drawn(0, 10)) as (context_TD, _):
        assert len(context_TD) == 10
    assert memory.predict(drawn(0, 100)).shape == (DIM,)


def test_a_name_of_a_session_is_short() -> None:
    memory = Memory(toy("ema", {}), CTX, ROOM)
    with pytest.raises(ValueError, match="session: a name of 201 characters; at most 200"):
        with memory.session("x" * 201, drawn(0, 1)):
            pass


def test_the_bytes_of_the_cache_are_a_number() -> None:
    assert cache_bytes("") == sessions.MAX_BYTES and cache_bytes("0") == 0
    with pytest.raises(ValueError, match="LVM_CACHE_BYTES: '1 GB' is no number of bytes"):
        cache_bytes("1 GB")


def test_hits_and_bytes_are_logged(monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(sessions._log, "info", lines.append)
    memory = Memory(toy("ema", {}), CTX, ROOM)
    for _ in range(sessions.LOG_EVERY):
        memory.predict(drawn(0))
    (line,) = lines
    assert line.startswith("cache: 99 of 100 contexts continued one that was read before; 1 states")
