"""Measure one predictor on the queries of a replay, and cache what was measured.

Shapes: N bank rows, D vector dim, Q queries, B batch, T time.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank, open_bank
from lvm.evaluation.latency import measure_latency
from lvm.prediction.predict import POSITIONS_PER_PASS, predict_contexts, predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.rerank import LanePrediction, chosen_weights, lane_scores, ranks_anew, shortlist
from lvm.system.atomic import Entry, cache_key, read_entry, write_entry
from lvm.system.environment import machine
from lvm.windows.queries import ContextQueries, Queries

# Raise this number when equal inputs give other ranks or latencies: cached measurements expire.
MEASUREMENT = 5
ANSWERS = ("rank", "rank_raw", "rank_corrected", "rank_reranked", "top_row")
COLUMNS = ("query", "target_row", *ANSWERS)
FACTS = ("num_non_finite", "latency_ms", "seconds", "at")
STORE = Path("data/replays")
MEASURED_NOW, READ_BACK = "measured now", "read from the store"


class MeasurementFailed(Exception):
    """A measurement did not finish; the message says why."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What one predictor is asked, and the rows that its answers are ranked among.

    `queries` hold the contexts that the predictor reads. `removed` are the same queries with the
    contexts whose rows are left out of the ranking, the same for every candidate.
    `representative_N` gives the first row of each row's duplicate group. With `lanes`, the answers
    are also re-ranked by lane.

    Pickling stores the bank's path and hash instead of its vectors; unpickling opens it again, and
    raises ValueError if its contents have changed.
    """

    bank: Bank
    representative_N: NDArray[np.int64]
    queries: Queries
    removed: Queries
    lanes: LanePrediction | None = None

    def read_by(self, ctx: int) -> "Questions":
        """Return the questions as a predictor with a context of `ctx` rows reads them."""
        return replace(self, queries=self.removed.as_read(ctx))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"bank": (self.bank.path.resolve(), self.bank.sha256)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, sha256 = state["bank"]
        bank = open_bank(path)
        if bank.sha256 != sha256:
            raise ValueError(f"bank {path}: was replaced while the replay ran")
        vars(self).update(state | {"bank": bank})


@dataclass(frozen=True, eq=False)
class Measurement:
    """The answers of one predictor.

    Attributes:
        ranks: the COLUMNS, one line a query, in the order of the queries; None if
            `num_non_finite` predictions are not finite. `rank_corrected` is NaN without a row
            correction, `rank_reranked` unless lanes were asked for.
        latency_ms: p50 and p95 of one query whose whole context is read anew, the model alone.
        seconds: duration of the measurement.
        at: when it began (UTC, ISO 8601).
        origin: MEASURED_NOW or READ_BACK.
    """

    ranks: pd.DataFrame | None
    num_non_finite: int
    latency_ms: dict[str, float]
    seconds: float
    at: str
    origin: str = MEASURED_NOW


def measure(
    model: nn.Module, asked: Questions, row_correction: NDArray[np.float32] | None = None
) -> Measurement:
    """Rank the answers of a model, plain and with `row_correction` (N, 2), and time it."""
    bank, groups_N, removed = asked.bank, asked.representative_N, asked.removed
    begin, at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    prediction_QD = predict(model, bank, asked.queries)
    num_bad = int((~np.isfinite(prediction_QD).all(axis=1)).sum())
    if num_bad:
        return Measurement(None, num_bad, {}, time.perf_counter() - begin, at)
    corrections = [None] if row_correction is None else [None, row_correction]
    plain, *corrected = exact_ranks(
        prediction_QD, removed, bank, groups_N, corrections, progress=True
    )
    ranks = pd.DataFrame(
        {
            "query": asked.queries.query_Q,
            "target_row": asked.queries.target_row_Q,
            "rank": plain.rank_Q,
            "rank_raw": plain.rank_raw_Q,
            "rank_corrected": corrected[0].rank_Q if corrected else np.nan,
            "rank_reranked": np.nan,
            "top_row": plain.top_row_Q,
        }
    )
    if asked.lanes is not None:
        (weights,) = chosen_weights(model, bank, groups_N, asked.lanes)
        listed = shortlist(prediction_QD, removed, bank, groups_N)
        weight = weights.tau * weights.beta
        score_QC = lane_scores(listed, asked.lanes.log_p_QL, asked.lanes.code_N, weight)
        ranks["rank_reranked"] = ranks_anew(listed, score_QC, plain.rank_Q)
    latency_ms = measure_latency(model, bank, timed_queries(asked.queries, bank))
    return Measurement(ranks, 0, latency_ms, time.perf_counter() - begin, at)


def predict(model: nn.Module, bank: Bank, queries: Queries) -> NDArray[np.float32]:
    """Return the predicted unit vector of each query, (Q, D).

    Recorded contexts of equal length share a forward pass. Each is read whole, so `queries` must
    already be cut to the model's context length.
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
    """Return queries with contexts of the same lengths that are runs of rows, for timing."""
    if not isinstance(queries, ContextQueries):
        return queries
    num_rows_Q = np.minimum(queries.num_rows(), bank.num_rows)
    first_row_Q = np.zeros_like(num_rows_Q)
    return Queries(queries.query_Q, num_rows_Q, first_row_Q, first_row_Q, queries.ctx)


@dataclass(frozen=True, eq=False)
class Job:
    """A measurement to make: of the model in `folder`, cached as the file `result` under `key`."""

    folder: Path
    result: Path
    key: str
    asked: Questions


def measurement_key(model: str, row_correction: str, asked: Questions) -> str:
    """Return a hash of everything that a measurement depends on.

    `model` describes the model, with the sha256 of its weights; `row_correction` is the sha256 of
    its row correction. Torch and the machine count, too: they change latencies, and the last bits
    of scores.
    """
    way = [MEASUREMENT, torch.__version__, machine()]
    queries = [[*query_parts(one)] for one in (asked.queries, asked.removed)]
    lanes: list[Any] = []
    if asked.lanes is not None:
        arrays = [asked.lanes.code_N, asked.lanes.log_p_QL, asked.lanes.val_log_p_QL]
        val = [[*query_parts(one)] for one in (asked.lanes.val, asked.lanes.val_removed)]
        lanes = [*arrays, *val]
    bank = [asked.bank.sha256, asked.representative_N]
    return cache_key(way, model, row_correction, bank, queries, lanes)


def query_parts(queries: Queries) -> Iterator[Any]:
    """Yield what tells queries apart: numbers, targets and contexts, in their order."""
    yield from (queries.query_Q, queries.target_row_Q, queries.first_row_Q)
    yield from (queries.sequence_start_Q, queries.ctx)
    if isinstance(queries, ContextQueries):
        yield queries.num_rows()
        yield np.concatenate([np.zeros(0, np.int64), *queries.context_row_Q])


def measurement_path(store: Path, key: str) -> Path:
    """Return the file of the measurement `key`, whether it is there or not."""
    return store / key[:2] / f"{key}.safetensors"


def write_measurement(path: Path, key: str, found: Measurement) -> None:
    """Write a measurement; raises OSError if the disk refuses it."""
    ranks = pd.DataFrame(columns=COLUMNS, dtype=float) if found.ranks is None else found.ranks
    columns = {name: ranks[name].to_numpy() for name in COLUMNS}
    write_entry(path, key, Entry(columns, {name: getattr(found, name) for name in FACTS}))


def read_measurement(path: Path, key: str) -> Measurement | None:
    """Return the measurement `key`; None if it is missing or damaged."""
    found = read_entry(path, key)
    if found is None:
        return None
    ranks = None if found.values["num_non_finite"] else pd.DataFrame(found.arrays)[[*COLUMNS]]
    return Measurement(ranks, **found.values, origin=READ_BACK)
