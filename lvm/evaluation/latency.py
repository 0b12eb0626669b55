"""Time of single queries whose whole context is read anew.

Shapes: Q queries, T time, D vector dim.
"""

import time

import numpy as np
from torch import nn

from lvm.bank.store import Bank, FloatArray
from lvm.prediction.predict import predict_contexts
from lvm.prediction.streaming import open_stream
from lvm.retrieval.index import ServingIndex
from lvm.windows.queries import Queries

MEASURED_QUERIES = 100
MAX_SECONDS = 10.0
MEASURED_ROWS = 200
PASSAGES = 10


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


def measure_warm_latency(
    model: nn.Module,
    bank: Bank,
    ctx: int,
    index: ServingIndex,
    num_rows: int = MEASURED_ROWS,
) -> dict[str, float]:
    """Time answers after each of `num_rows` new vectors; return quantiles in milliseconds.

    An answer is one append to a stream that has read ctx rows, then a search for ten passages:
    warm_p50, warm_p95, warm_max. The stream is bounded by ctx, so the largest includes reading
    0.8 ctx rows again. The rows are the bank's first; its sequences do not matter to the time.
    """
    stream = open_stream(model, ctx)
    row_T = np.arange(ctx + num_rows + 1) % bank.num_rows
    vector_TD = bank.unit(row_T)
    k = min(PASSAGES, index.facts.num_passages)
    index.search(stream.warm(vector_TD[: ctx - 1])[None], k)
    times = []
    for vector_D in vector_TD[ctx - 1 : ctx - 1 + num_rows]:
        begin = time.perf_counter()
        index.search(stream.append(vector_D)[None], k)
        times.append(1000 * (time.perf_counter() - begin))
    p50, p95, longest = np.quantile(times, [0.5, 0.95, 1.0])
    return {"warm_p50": float(p50), "warm_p95": float(p95), "warm_max": float(longest)}


def measure_search(index: ServingIndex, prediction_QD: FloatArray) -> dict[str, float]:
    """Time a search for ten passages, in milliseconds: one query at a time, then all at once.

    Returns index_p50, index_p95, index_batch (per query of the batch).
    """
    k = min(PASSAGES, index.facts.num_passages)
    index.search(prediction_QD[:1], k)
    times = []
    for prediction_1D in prediction_QD[:MEASURED_ROWS, None]:
        begin = time.perf_counter()
        index.search(prediction_1D, k)
        times.append(1000 * (time.perf_counter() - begin))
    begin = time.perf_counter()
    index.search(prediction_QD, k)
    batch = 1000 * (time.perf_counter() - begin) / len(prediction_QD)
    p50, p95 = np.quantile(times, [0.5, 0.95])
    return {"index_p50": float(p50), "index_p95": float(p95), "index_batch": batch}
