"""Time of single queries.

Shapes: T time, D vector dim.
"""

import time

import numpy as np
from torch import nn

from lvm.bank import Bank
from lvm.prediction import predict_contexts
from lvm.windows import Queries

MEASURED_QUERIES = 20


def measure_latency(
    model: nn.Module, bank: Bank, queries: Queries, num_queries: int = MEASURED_QUERIES
) -> dict[str, float]:
    """Time the model alone on one whole context at a time; return its p50, p95 in milliseconds.

    The vectors are read before the clock starts; one query warms up.
    """
    chosen = queries.head(num_queries)
    times = []
    for place, (first, target) in enumerate(
        zip(chosen.first_row_Q.tolist(), chosen.target_row_Q.tolist(), strict=True)
    ):
        context_1TD = bank.unit(slice(first, target))[None]
        if place == 0:
            predict_contexts(model, context_1TD)
        begin = time.perf_counter()
        predict_contexts(model, context_1TD)
        times.append(1000 * (time.perf_counter() - begin))
    p50, p95 = np.quantile(times, [0.5, 0.95])
    return {"p50": float(p50), "p95": float(p95)}
