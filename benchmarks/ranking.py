"""Rate of exact ranking beside plain matrix products of the same shapes.

Run `python -m benchmarks.ranking`; `--rows 60000 --queries 1000` takes seconds. A float16 bank is
written to a scratch folder: `--like text` has the structure of text (benchmarks/text_bank.py), its
predictions are means of the last rows, so that truths rank as in practice; with `--like random`
half of all candidates are better than a truth, the worst case of counting. Then each way runs in a
process of its own, so that its peak of resident memory is its own. The product is of all queries
with one float32 block in memory after the other: its rate is the machine's. faiss holds the whole
bank as float32, and gets fewer queries.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch

from benchmarks.text_bank import vectors
from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.retrieval.counting import AUTO, BANK_BLOCK, BF16, FP32
from lvm.retrieval.exact import exact_ranks
from lvm.system.processes import has_native_bf16
from lvm.windows.planning import make_queries

BLOCK = 16_384
LAST_ROWS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=637_997)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--faiss-queries", type=int, default=1_000)
    parser.add_argument("--like", choices=("text", "random"), default="text")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--scratch", help="folder on a disk with room for the bank")
    parser.add_argument("--only", choices=tuple(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(WAYS[options.only](options)))
        return
    options.threads = options.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        options.scratch = folder
        make_bank(options)
        print(
            f"{options.queries:,} queries over {options.rows:,} x {options.dim} float16, "
            f"{options.threads} thread(s)\n"
            f"{'':<12}{'queries':>9}{'seconds':>9}{'GFLOP/s':>9}{'of matmul':>11}{'peak RSS':>10}"
        )
        rates: dict[str, float] = {}
        checksums = set()
        for name in WAYS:
            found = apart(name, options)
            checksums |= {found["checksum"]} if "checksum" in found else set()
            rate = 2e-9 * found["queries"] * options.rows * options.dim / found["seconds"]
            rates[name] = rate
            print(
                f"{name:<12}{found['queries']:>9,}{found['seconds']:>9.2f}{rate:>9.0f}"
                f"{rate / rates['matmul']:>11.0%}{found['peak_mb']:>7,.0f} MB",
                flush=True,
            )
        print("equal ranks" if len(checksums) == 1 else f"ranks differ: {checksums}")


def make_bank(options: argparse.Namespace) -> None:
    """Write the random bank, block by block."""
    random = np.random.default_rng(0)

    def blocks() -> Iterator[np.ndarray]:
        if options.like == "text":
            yield from vectors(options.rows, options.dim, random)
            return
        for start in range(0, options.rows, BLOCK):
            shape = (min(BLOCK, options.rows - start), options.dim)
            yield random.standard_normal(shape, dtype=np.float32)

    row_N = np.arange(options.rows)
    rows = pd.DataFrame({"sequence": "all", "document": (row_N // 50).astype(str)})
    write_bank(Path(options.scratch) / "bank", blocks(), rows, "drawn", "benchmarks/ranking.py")


def apart(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one method in a process of its own."""
    values = {key: value for key, value in vars(options).items() if key != "only"}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "benchmarks.ranking", *arguments, f"--only={name}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def plain_matmul(options: argparse.Namespace) -> dict[str, float]:
    """Multiply all queries with every block of rows."""
    torch.set_num_threads(options.threads)
    prediction_QD = torch.from_numpy(random_queries(options))
    block_KD = torch.randn(BANK_BLOCK, options.dim)
    score_QK = prediction_QD @ block_KD.T
    begin = time.perf_counter()
    for start in range(0, options.rows, BANK_BLOCK):
        part_KD = block_KD[: options.rows - start]
        torch.matmul(prediction_QD, part_KD.T, out=score_QK[:, : len(part_KD)])
    return measured(options.queries, begin)


def ranking(options: argparse.Namespace, product: str = AUTO) -> dict[str, float]:
    """Rank with `lvm.retrieval.exact.exact_ranks` over the memory-mapped bank."""
    bank = opened(options)
    random = np.random.default_rng(2)
    target_row_Q = random.integers(LAST_ROWS, options.rows, options.queries)
    if options.like == "text":
        before_QL = target_row_Q[:, None] - 1 - np.arange(LAST_ROWS)
        prediction_QD = np.stack([bank.unit(row_L).mean(axis=0) for row_L in before_QL])
    else:
        prediction_QD = random_queries(options)
    query_Q = np.arange(options.queries)
    queries = make_queries(query_Q, target_row_Q, np.zeros_like(target_row_Q), ctx=1000)
    begin = time.perf_counter()
    groups = np.arange(options.rows)
    (ranks,) = exact_ranks(prediction_QD, queries, bank, groups, product=product)
    found = measured(options.queries, begin)
    return found | {"checksum": float(ranks.rank_Q.sum())}


def faiss_flat(options: argparse.Namespace) -> dict[str, float]:
    """Search with `faiss.IndexFlatIP`, which holds the bank as float32; ten rows per query."""
    bank = opened(options)
    faiss.omp_set_num_threads(options.threads)
    index = faiss.IndexFlatIP(options.dim)
    for _, unit_BD in bank.unit_blocks():
        index.add(unit_BD)
    prediction_QD = random_queries(options)[: options.faiss_queries]
    begin = time.perf_counter()
    index.search(prediction_QD, 10)
    return measured(len(prediction_QD), begin)


WAYS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "matmul": plain_matmul,
    "exact_ranks": ranking,
    "fp32 ranks": partial(ranking, product=FP32),
}
if has_native_bf16():
    WAYS["bf16 ranks"] = partial(ranking, product=BF16)
WAYS["faiss flat"] = faiss_flat


def opened(options: argparse.Namespace) -> Bank:
    return open_bank(Path(options.scratch) / "bank")


def random_queries(options: argparse.Namespace) -> np.ndarray:
    """Return unit queries (Q, D)."""
    shape = (options.queries, options.dim)
    vector_QD = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    return vector_QD / np.linalg.norm(vector_QD, axis=1, keepdims=True)


def measured(num_queries: int, begin: float) -> dict[str, float]:
    """Return queries, seconds since `begin`, the peak of resident memory in MB."""
    return {
        "queries": num_queries,
        "seconds": time.perf_counter() - begin,
        "peak_mb": peak_resident_mb(),
    }


def peak_resident_mb() -> float:
    """Return the peak of this process alone; it includes the pages of files that it maps."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
