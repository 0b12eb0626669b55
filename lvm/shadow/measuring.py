"""Measurement of one predictor on the queries of a replay.

Shapes: N bank rows, D vector dim, Q queries, B batch, T time.
"""

import time
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.latency import measure_latency
from lvm.prediction.predict import POSITIONS_PER_PASS, predict_contexts, predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.rerank import LanePrediction, chosen_weights, lane_scores, ranks_anew, shortlist
from lvm.windows.queries import ContextQueries, Queries

# Raised whenever equal inputs give other ranks or latencies than before; stored ones then expire.
MEASUREMENT = 5
ANSWERS = ("rank", "rank_raw", "rank_corrected", "rank_reranked", "top_row")
COLUMNS = ("query", "target_row", *ANSWERS)
MEASURED_NOW, READ_BACK = "measured now", "read from the store"


class MeasurementFailed(Exception):
    """A measurement came to no end; the message says why."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one predictor answered.

    `ranks` has the COLUMNS, a line a query in their order (`rank_corrected` is NaN without a row
    correction, `rank_reranked` unless lanes were asked for); it is None where `num_non_finite`
    predictions are not finite. `latency_ms` holds p50, p95 of one cold context, model only;
    `seconds` is what the measurement took, `at` when.
    """

    ranks: pd.DataFrame | None
    num_non_finite: int
    latency_ms: dict[str, float]
    seconds: float
    at: str
    origin: str = MEASURED_NOW

    def answers(self) -> dict[str, pd.Series]:
        """Return the ranks with the first row found, by column; nothing where there are none."""
        return {} if self.ranks is None else {name: self.ranks[name] for name in ANSWERS}


@dataclass(frozen=True, eq=False)
class Questions:
    """What a predictor is asked: `queries`, without the rows of the contexts of `removed`.

    Both are the same queries; only the lengths of their contexts may differ. With `foretold` the
    answers are ranked with the lanes that the contexts promise, too.
    """

    queries: Queries
    removed: Queries
    foretold: LanePrediction | None = None


def measure(
    model: nn.Module,
    bank: Bank,
    representative_N: NDArray[np.int64],
    asked: Questions,
    row_correction: NDArray[np.float32] | None = None,
) -> Measurement:
    """Rank the answers of a predictor to the questions."""
    queries, removed, foretold = asked.queries, asked.removed, asked.foretold
    begin, at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    prediction_QD = predict(model, bank, queries)
    num_bad = int((~np.isfinite(prediction_QD).all(axis=1)).sum())
    if num_bad:
        return Measurement(None, num_bad, {}, time.perf_counter() - begin, at)
    corrections = [None] if row_correction is None else [None, row_correction]
    plain, *corrected = exact_ranks(
        prediction_QD, removed, bank, representative_N, corrections, progress=True
    )
    ranks = pd.DataFrame(
        {
            "query": queries.query_Q,
            "target_row": queries.target_row_Q,
            "rank": plain.rank_Q,
            "rank_raw": plain.rank_raw_Q,
            "rank_corrected": corrected[0].rank_Q if corrected else np.nan,
            "rank_reranked": np.nan,
            "top_row": plain.top_row_Q,
        }
    )
    if foretold is not None:
        (weights,) = chosen_weights(model, bank, representative_N, foretold)
        listed = shortlist(prediction_QD, removed, bank, representative_N)
        score_QC = lane_scores(
            listed, foretold.log_p_QL, foretold.code_N, weights.tau * weights.beta
        )
        ranks["rank_reranked"] = ranks_anew(listed, score_QC, plain.rank_Q)
    latency_ms = measure_latency(model, bank, timed_queries(queries, bank))
    return Measurement(ranks, 0, latency_ms, time.perf_counter() - begin, at)


def predict(model: nn.Module, bank: Bank, queries: Queries) -> NDArray[np.float32]:
    """Return the predicted unit vector (Q, D) of each query, whatever its kind of context.

    Recorded contexts of one length share a pass; each is read whole: `queries` are cut to ctx.
    """
    if not isinstance(queries, ContextQueries):
        return predict_queries(model, bank, queries, progress=True)
    prediction_QD = np.empty((len(queries), bank.dim), dtype=np.float32)
    num_rows_Q = queries.num_rows()
    for length in np.unique(num_rows_Q):
        place_Q = np.flatnonzero(num_rows_Q == length)
        per_pass = max(1, POSITIONS_PER_PASS // int(length))
        for begin in range(0, len(place_Q), per_pass):
            chosen = place_Q[begin : begin + per_pass]
            row_BT = np.stack(list(queries.context_row_Q[chosen]))
            context_BTD = bank.unit(row_BT.ravel()).reshape(*row_BT.shape, bank.dim)
            prediction_QD[chosen] = predict_contexts(model, context_BTD)
    return prediction_QD


def timed_queries(queries: Queries, bank: Bank) -> Queries:
    """Return queries of the same lengths that are runs of rows, as the clock wants them."""
    if not isinstance(queries, ContextQueries):
        return queries
    num_rows_Q = np.minimum(queries.num_rows(), bank.num_rows)
    first_row_Q = np.zeros_like(num_rows_Q)
    return Queries(queries.query_Q, num_rows_Q, first_row_Q, first_row_Q, queries.ctx)
