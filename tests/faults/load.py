"""Load on a served model: clients that arrive whether or not the server keeps up."""

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

PATIENCE = 30.0  # seconds that a client waits for its answer
UNAVAILABLE = (429, 503)


@dataclass(frozen=True)
class Question:
    """A request body with the answer that it must get: vectors (B, D), rows where asked for."""

    body: bytes
    vector_BD: np.ndarray
    row_BK: list[list[int]] | None

    def is_answered_by(self, answer: bytes) -> bool:
        """Tell whether the vectors agree to float32 tolerance, the rows exactly."""
        found = json.loads(answer)["predictions"]
        if self.row_BK is None:
            return np.allclose(found, self.vector_BD, atol=1e-5)
        same = np.allclose(found["vectors"], self.vector_BD, atol=1e-5)
        return same and found["rows"] == self.row_BK


@dataclass
class Seen:
    """What the clients saw: seconds of each right answer, refused requests, wrong answers."""

    seconds: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, question: Question, address: str, due: float) -> None:
        """Ask once; times count from the moment at which the request was `due`."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/invocations", question.body, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            kind = self.refused if error.code in UNAVAILABLE else self.wrong
            kind.append(f"{error.code}: {error.read()[:200]!r}")
        except (TimeoutError, urllib.error.URLError, ConnectionError) as error:
            self.refused.append(repr(error))
        else:
            if question.is_answered_by(answer):
                self.seconds.append(time.monotonic() - due)
            else:
                self.wrong.append(f"another answer: {answer[:200]!r}")


def comfortable_rate(address: str, questions: Sequence[Question], seconds: float) -> float:
    """Return the requests a second of one client that asks again as soon as it is answered."""
    seen, begin, number = Seen(), time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        seen.add(questions[number % len(questions)], address, time.monotonic())
        number += 1
    assert not seen.wrong and not seen.refused, (seen.wrong, seen.refused)
    return number / (time.monotonic() - begin)


def open_load(
    address: str, questions: Sequence[Question], rate: float, seconds: float, num_clients: int
) -> tuple[Seen, list[tuple[float, int]]]:
    """Ask `rate` questions a second; return what was seen, the memory of the server by time.

    A client that is still waiting does not hold up those that are due: the queue grows, and a
    request that found no client within `PATIENCE` is refused unasked, as its user would have left.
    """
    due: queue.SimpleQueue[float | None] = queue.SimpleQueue()
    seen, lock, number = Seen(), threading.Lock(), 0

    def client() -> None:
        nonlocal number
        while (moment := due.get()) is not None:
            with lock:
                question = questions[number % len(questions)]
                number += 1
            if time.monotonic() - moment > PATIENCE:
                seen.refused.append("nobody was free to ask in time")
            else:
                seen.add(question, address, moment)

    clients = [threading.Thread(target=client) for _ in range(num_clients)]
    for one in clients:
        one.start()
    memory, begin, asked = [], time.monotonic(), 0
    while (now := time.monotonic() - begin) < seconds:
        while asked < now * rate:
            due.put(begin + asked / rate)
            asked += 1
        if not memory or now - memory[-1][0] > 1:
            memory.append((now, tree_memory()))
        time.sleep(min(0.01, 0.5 / rate))
    for _ in clients:
        due.put(None)
    for one in clients:
        one.join()
    return seen, memory


def tree_memory() -> int:
    """Return the resident bytes of this process's children, theirs included: the server's."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
