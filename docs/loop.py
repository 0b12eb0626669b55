"""From requests to the alias: serve the baseline, ask, replay what was asked, promote the winner.

`python -m docs.loop`, in the project folder, whose store has an alias `baseline`. Readers go
through the test rows of a bank; each is a session that sends one row at a time.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.http import ask, http_server, packed_body
from lvm.bank.bank import open_bank
from lvm.shadow.request_log import FILES
from lvm.windows.export import ensure_windows
from lvm.windows.planning import SPLITS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", default="data/bank")
    parser.add_argument("--registry", default="lvm")
    parser.add_argument("--ctx", type=int, default=100)
    parser.add_argument("--requests", default="requests", help="folder of the request log")
    options = parser.parse_args()
    uri = f"models:/{options.registry}@baseline"
    with http_server(uri, Path("server.log"), LVM_REQUEST_LOG=options.requests) as address:
        num_asked = read_on(address, options.bank, options.ctx)
        wait_for_log(Path(options.requests), num_asked)
    print(f"asked {num_asked:,} times; the requests are in {options.requests}", flush=True)
    words = ["--bank", options.bank, "--registry", options.registry, "--ctx", str(options.ctx)]
    words += ["--queries", options.requests, "--promote", "enabled"]
    sys.exit(subprocess.run([sys.executable, "-m", "entrypoints.shadow_eval", *words]).returncode)


def read_on(address: str, bank_path: str, ctx: int) -> int:
    """Ask for the best five passages after each test row; return the number of requests."""
    bank = open_bank(bank_path)
    is_test_N = ensure_windows(bank, ctx).split_N == SPLITS.index("test")
    num_asked = 0
    for code, name in enumerate(bank.sequences):
        row_T = np.flatnonzero(is_test_N & (bank.sequence_N == code))
        if not len(row_T):
            continue
        start = max(int(np.argmax(bank.sequence_N == code)), int(row_T[0]) - ctx)
        parts = [np.arange(start, row_T[0] + 1), *row_T[1:, None]]
        for part in parts:
            body = packed_body(bank.unit(part)[None], session=name, k=5)
            status, answer = ask(address, body)
            if status != 200:
                raise RuntimeError(answer.decode())
        num_asked += len(parts)
    return num_asked


def wait_for_log(folder: Path, num_asked: int, seconds: float = 60.0) -> None:
    """Wait until all requests are on disk; a server that ends loses those of its last second."""
    last = time.monotonic() + seconds
    while sum(pq.read_metadata(path).num_rows for path in folder.glob(FILES)) < num_asked:
        if time.monotonic() > last:
            raise RuntimeError(f"{folder}: not all {num_asked:,} requests are logged")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
