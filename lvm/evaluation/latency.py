"""Latency of a predictor: cold contexts, warm streams, searches of the serving index.

Shapes: Q queries, T time, D vector dim.
"""

import time
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.models.predict import open_stream, predict_contexts
from lvm.retrieval.exact import top_rows
from lvm.retrieval.index import DEPTH, ServingIndex, agreement
from lvm.system.progress import part
from lvm.windows.planning import IntArray, Queries

MEASURED_QUERIES = 100
MAX_SECONDS = 3.0
MEASURED_ROWS = 200
SEARCHED = 500  # predictions for which the index is compared with exact search


@part("latency")
def measure_latency(
    model: nn.Module, bank: Bank, queries: Queries, num_queries: int = MEASURED_QUERIES
) -> dict[str, float]:
    """Return p50, p95 in milliseconds of the model on one whole context at a time.

    The vectors are read before the clock starts, and one query warms up. A slow model answers fewer
    queries: the measurement ends after MAX_SECONDS.
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


@part("serving index")
def measure_serving(
    index: ServingIndex,
    model: nn.Module,
    ctx: int,
    prediction_QD: FloatArray,
    representative_N: IntArray,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the index's facts with its agreement on the first SEARCHED predictions, and latencies.

    Agreement is the mean share of the ten best passages of exact search that the index finds.
    """
    depth = min(DEPTH, index.facts.num_passages)
    asked_QD = prediction_QD[:SEARCHED]
    exact_Qk, _ = top_rows(
        asked_QD, index.bank, depth, index.pair_N2, representative_N=representative_N
    )
    found_Qk, _ = index.search(asked_QD, depth)
    facts = asdict(index.facts) | {"description": str(index.facts), "queries": len(asked_QD)}
    facts |= {"agreement": float(agreement(found_Qk, exact_Qk).mean())}
    times = measure_search(index, asked_QD)
    return facts, times | measure_warm_latency(model, index.bank, ctx, index)


def measure_warm_latency(
    model: nn.Module,
    bank: Bank,
    ctx: int,
    index: ServingIndex,
    num_rows: int = MEASURED_ROWS,
) -> dict[str, float]:
    """Return warm_p50, warm_p95, warm_max in milliseconds over `num_rows` answers of a stream.

    An answer is one append to a stream that has read ctx rows, and a search for ten passages. The
    stream is bounded by ctx, so warm_max includes reading 0.8 ctx rows again. The rows are the
    first rows of the bank, regardless of sequences.
    """
    stream = open_stream(model, ctx)
    row_T = np.arange(ctx + num_rows + 1) % bank.num_rows
    vector_TD = bank.unit(row_T)
    k = min(DEPTH, index.facts.num_passages)
    index.search(stream.warm(vector_TD[: ctx - 1])[None], k)
    times = []
    for vector_D in vector_TD[ctx - 1 : ctx - 1 + num_rows]:
        begin = time.perf_counter()
        index.search(stream.append(vector_D)[None], k)
        times.append(1000 * (time.perf_counter() - begin))
    p50, p95, longest = np.quantile(times, [0.5, 0.95, 1.0])
    return {"warm_p50": float(p50), "warm_p95": float(p95), "warm_max": float(longest)}


def measure_search(index: ServingIndex, prediction_QD: FloatArray) -> dict[str, float]:
    """Return index_p50, index_p95, index_batch in milliseconds of a search for ten passages.

    The quantiles are for one query at a time; index_batch is the time per query of all at once.
    """
    k = min(DEPTH, index.facts.num_passages)
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
