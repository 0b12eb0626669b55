"""Time of single queries whose whole context is read anew.

Shapes: Q queries, T time, D vector dim.
"""

import platform
import time
from pathlib import Path

import numpy as np
from torch import nn

from lvm.bank.store import Bank
from lvm.prediction.predict import predict_contexts
from lvm.retrieval.search import num_cores
from lvm.windows.queries import Queries

MEASURED_QUERIES = 100
MAX_SECONDS = 10.0
CPU_FILE = Path("/proc/cpuinfo")


def measure_latency(
    model: nn.Module, bank: Bank, queries: Queries, num_queries: int = MEASURED_QUERIES
) -> dict[str, float]:
    """Time the model alone on one whole context at a time; return its p50, p95 in milliseconds.

    The vectors are read before the clock starts; one query warms up. A slow model is asked fewer
    queries, so that it takes MAX_SECONDS.
    """
    chosen = queries.head(num_queries)
    times: list[float] = []
    for place, (first, target) in enumerate(
        zip(chosen.first_row_Q.tolist(), chosen.target_row_Q.tolist(), strict=True)
    ):
        context_1TD = bank.unit(slice(first, target))[None]
        if place == 0:
            predict_contexts(model, context_1TD)
        begin = time.perf_counter()
        predict_contexts(model, context_1TD)
        times.append(1000 * (time.perf_counter() - begin))
        if sum(times) > 1000 * MAX_SECONDS:
            break
    p50, p95 = np.quantile(times, [0.5, 0.95])
    return {"p50": float(p50), "p95": float(p95)}


def machine() -> str:
    """Say what the times of this process depend on besides the model: processor, threads."""
    words = [platform.machine(), platform.processor()]
    if CPU_FILE.is_file():
        named = (line for line in CPU_FILE.read_text().splitlines() if "model name" in line)
        words.append(next(named, "").partition(":")[2].strip())
    return ", ".join([*filter(None, words), f"{num_cores()} threads"])
