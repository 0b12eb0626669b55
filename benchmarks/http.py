"""Latency over HTTP, without and with a cache: `python -m benchmarks.http --bank <bank>`.

Registers a predictor with random weights in a scratch store and serves it by `mlflow models serve`,
first with LVM_CACHE_BYTES=0, then with a cache. Cold requests send a context that the server has
not seen; growing ones send the last context with one more row; those of a session send that row
alone. The index is written to the scratch folder, too.
"""

import argparse
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.serving import register_and_load, scratch_store
from lvm.bank.bank import Bank, open_bank
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import ensure_windows

STARTING = 120  # seconds


@contextmanager
def http_server(uri: str, log: Path, **settings: str) -> Iterator[str]:
    """Serve the model `uri` on a free port while the block runs; yield its address.

    `settings` are environment variables of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"mlflow models serve -m {uri} --env-manager local --host 127.0.0.1 --port {port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            words.split(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | settings,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_healthy(address, process, log)
            yield address
        finally:
            workers = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            psutil.wait_procs(workers)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll /health until it answers; raises RuntimeError if the server ends or never does."""
    for _ in range(STARTING * 5):
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return
        except urllib.error.URLError:
            try:
                process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                continue
    raise RuntimeError(f"no server at {address}:\n{log.read_text()}")


def ask(address: str, body: bytes) -> tuple[int, bytes]:
    """Return the status and body of the answer to a JSON request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/invocations", body, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


def json_body(context_BTD: np.ndarray, **params: Any) -> bytes:
    """Return a request with the contexts as nested lists."""
    return json.dumps({"inputs": context_BTD.tolist(), "params": params}).encode()


def packed_body(context_BTD: np.ndarray, **params: Any) -> bytes:
    """Return a request with the contexts as base64 text and a placeholder of their shape."""
    batch, _, dim = context_BTD.shape
    packed = base64.b64encode(context_BTD.astype("<f4").tobytes()).decode()
    inputs = np.zeros((batch, 1, dim), int).tolist()
    return json.dumps({"inputs": inputs, "params": {**params, "packed": packed}}).encode()


class Client:
    """Asks one server over one connection; `seconds` are those of each answer."""

    def __init__(self, address: str, k: int) -> None:
        self._connection = http.client.HTTPConnection(address.removeprefix("http://"))
        self._k = k
        self.seconds: list[float] = []
        self.num_sent = 0

    def ask(self, context_TD: np.ndarray, **params: Any) -> None:
        """Send one context; the time includes encoding it and decoding the answer."""
        begin = time.perf_counter()
        body = packed_body(context_TD[None], k=self._k, vectors=False, **params)
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/invocations", body, headers)
        answer = self._connection.getresponse()
        found = json.loads(answer.read())
        self.seconds.append(time.perf_counter() - begin)
        self.num_sent = len(body)
        assert answer.status == 200, found


Rows = Callable[[int, int], np.ndarray]  # unit vectors of the bank, from a row on, so many


def cold(client: Client, rows: Rows, ctx: int, number: int) -> None:
    """Ask after contexts of which no two begin alike."""
    for one in range(number):
        client.ask(rows(7 * one, ctx))


def growing(client: Client, rows: Rows, ctx: int, number: int) -> None:
    """Ask after a context that grows by one row; the first is cold."""
    for one in range(number):
        client.ask(rows(0, ctx + one))


def session(client: Client, rows: Rows, ctx: int, number: int, first: int = 0) -> None:
    """Ask after the same contexts, sending the new row alone."""
    client.ask(rows(first, ctx), session=f"from {first}", position=0)
    for one in range(1, number):
        client.ask(rows(first + ctx + one - 1, 1), session=f"from {first}")


WAYS = {"cold": cold, "growing": growing, "session": session}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", default="data/bank")
    parser.add_argument("--ctx", type=int, default=1000)
    parser.add_argument("--model", default="delta_memory")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--cold", type=int, default=20, help="cold requests")
    parser.add_argument("--requests", type=int, default=200, help="of the other ways, each")
    parser.add_argument("--sessions", type=int, default=8, help="at once")
    parser.add_argument("--cache-mb", type=int, default=64, help="bound of the last server")
    options = parser.parse_args()
    bank = open_bank(Path(options.bank).resolve())
    with scratch_store():
        register_and_load(options.model, bank, ensure_windows(bank, options.ctx)).index()
        print(f"{options.model}, ctx {options.ctx}, {bank.num_rows:,} x {bank.dim}, k {options.k}")
        print(f"{'cache':<7}{'requests':<24}{'p50 ms':>10}{'p95 ms':>10}{'max ms':>10}{'sent':>12}")
        measure("off", ["cold", "growing"], bank, options, LVM_CACHE_BYTES="0")
        measure("on", list(WAYS), bank, options)
        bound = options.cache_mb * 2**20
        measure_bound(bank, options, LVM_CACHE_BYTES=str(bound))


def measure(
    name: str, ways: list[str], bank: Bank, options: argparse.Namespace, **settings: str
) -> None:
    """Print the round-trip times of each way on a server of its own."""

    def rows(first: int, number: int) -> np.ndarray:
        return bank.unit((first + np.arange(number)) % bank.num_rows)

    with http_server(BASELINE_URI, Path("server.log"), **settings) as address:
        Client(address, options.k).ask(rows(1, options.ctx))  # opens the index
        for way in ways:
            client = Client(address, options.k)
            is_short = way == "cold" or name == "off"
            WAYS[way](client, rows, options.ctx, options.cold if is_short else options.requests)
            show(name, way, [client])
        if "session" in ways:
            clients = [Client(address, options.k) for _ in range(options.sessions)]
            with ThreadPoolExecutor(options.sessions) as pool:
                asked = [
                    pool.submit(session, one, rows, options.ctx, options.requests, 1000 * (n + 1))
                    for n, one in enumerate(clients)
                ]
                for one in asked:
                    one.result()
            show(name, f"{options.sessions} sessions at once", clients)


def show(name: str, way: str, clients: list[Client]) -> None:
    """Print one line; the first answer of each client counts for cold requests alone."""
    first = 0 if way == "cold" else 1
    seconds = np.concatenate([one.seconds[first:] for one in clients])
    p50, p95, most = 1e3 * np.quantile(seconds, [0.5, 0.95, 1.0])
    sent = clients[0].num_sent
    print(f"{name:<7}{way:<24}{p50:>10.1f}{p95:>10.1f}{most:>10.1f}{sent:>12,}", flush=True)


def measure_bound(bank: Bank, options: argparse.Namespace, **settings: str) -> None:
    """Print what the server's processes hold before and after its cache has reached its bound."""
    log = Path("bound.log")
    with http_server(BASELINE_URI, log, **settings) as address:
        client = Client(address, options.k)
        client.ask(bank.unit(slice(0, options.ctx)))
        before, line = resident_mb(), ""
        while ", 0 dropped" in line or not line:
            for number in range(100):
                first = 50 * number + len(client.seconds)
                client.ask(bank.unit(slice(first, first + options.ctx // 10)))
            line = [one for one in log.read_text().splitlines() if "cache: " in one][-1]
        print(f"memory of the server: {before:.0f} MiB, at the bound {resident_mb():.0f} MiB")
        print(line)


def resident_mb() -> float:
    """Return the resident memory of this process's children."""
    children = psutil.Process().children(recursive=True)
    return sum(one.memory_info().rss for one in children) / 2**20


if __name__ == "__main__":
    main()
