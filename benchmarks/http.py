"""Latency of an answer over HTTP and in process: `python -m benchmarks.http --bank data/bank`.

Registers a predictor with random weights in a scratch store, serves it by `mlflow models serve`,
and sends the same contexts both ways in turn. The index is written to the scratch folder, too.
"""

import argparse
import base64
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np

from benchmarks.serving import register_and_load, scratch_store
from lvm.bank.bank import Bank, open_bank
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import ensure_windows

STARTING = 120  # seconds


@contextmanager
def http_server(uri: str, log: Path) -> Iterator[str]:
    """Serve the model `uri` on a free port while the block runs; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"mlflow models serve -m {uri} --env-manager local --host 127.0.0.1 --port {port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            words.split(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_healthy(address, process, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", default="data/bank")
    parser.add_argument("--ctx", type=int, default=1000)
    parser.add_argument("--model", default="memory_gru")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--requests", type=int, default=40, help="of each way")
    options = parser.parse_args()
    bank = open_bank(Path(options.bank).resolve())
    with scratch_store():
        register_and_load(options.model, bank, ensure_windows(bank, options.ctx))
        with http_server(BASELINE_URI, Path("server.log")) as address:
            measure(address, bank, options)


def measure(address: str, bank: Bank, options: argparse.Namespace) -> None:
    """Print the round-trip times of each way, including the client's encoding."""
    served = mlflow.pyfunc.load_model(BASELINE_URI)
    k = {"k": options.k}

    def in_process(context_BTD: np.ndarray) -> tuple[int, int]:
        served.predict(context_BTD, params=k)
        return 0, 0

    def over_http(body_of: Callable[..., bytes]) -> Callable[[np.ndarray], tuple[int, int]]:
        def sizes(context_BTD: np.ndarray) -> tuple[int, int]:
            body = body_of(context_BTD, **k)
            status, answer = ask(address, body)
            json.loads(answer)
            assert status == 200, answer
            return len(body), len(answer)

        return sizes

    ways = {"in process": in_process}
    ways |= {"HTTP, lists": over_http(json_body), "HTTP, packed": over_http(packed_body)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {}
    for number in range(options.requests + 1):  # without the first, which opens the index
        row_T = (np.arange(options.ctx) + 7 * number) % bank.num_rows
        for name, way in ways.items():
            begin = time.perf_counter()
            sizes[name] = way(bank.unit(row_T)[None])
            seconds[name].append(time.perf_counter() - begin)
    print(f"{options.model}, ctx {options.ctx}, {bank.num_rows:,} x {bank.dim}, k {options.k}")
    print(f"{'way':<14}{'p50 ms':>10}{'p95 ms':>10}{'ratio':>8}{'sent':>12}{'received':>10}")
    base = np.median(seconds["in process"][1:])
    for name, taken in seconds.items():
        p50, p95 = np.quantile(taken[1:], [0.5, 0.95])
        sent, received = sizes[name]
        times = f"{1e3 * p50:>10.1f}{1e3 * p95:>10.1f}{p50 / base:>8.1f}"
        print(f"{name:<14}{times}{sent:>12,}{received:>10,}")


if __name__ == "__main__":
    main()
