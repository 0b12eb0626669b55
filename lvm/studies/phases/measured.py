"""The phases under one evaluation: figures, pool equivalents, paired differences.

Shapes: Q queries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.store import Bank
from lvm.evaluation.intervals import (
    FloatArray,
    document_interval,
    holm,
    paired_difference,
    smallest_detectable,
)
from lvm.evaluation.metrics import POOLS, figures, hit_at, pool_hit_at
from lvm.models.facts import FREE
from lvm.retrieval.rerank import LANE, NONE
from lvm.studies.phases.compared import Free, Measured, Pair, PhaseComparison, Row, Trained

POOL_HITS = (1, 5, 10)
Answers = tuple[str, str]
Couple = tuple[Row, str, Answers]


def measure_phases(
    trained: Sequence[Trained], replay: Mapping[str, Any], per_query: pd.DataFrame, bank: Bank
) -> PhaseComparison:
    """Compare the phases by the ranks of one shadow replay (its report, its per-query table).

    Raises ValueError where a phase was not scored, or no free predictor was.
    """
    tables = {str(name): table for name, table in per_query.groupby("candidate")}
    free = str(replay["best_free"])
    for name in [*(one.candidate for one in trained), free]:
        if name not in tables:
            raise ValueError(f"shadow: {name} has no figures; see the report of the replay")
    compare = _Comparing(tables, bank, int(replay["seed"]), int(replay["num_answers"]))
    outcomes = {str(one["name"]): one for one in replay["outcomes"]}
    rows: list[Row] = []
    for one in trained:
        order = _order(one, tables)
        twin = next((row for row in rows if _answers(row) == (one.candidate, order)), None)
        measured = compare.measure(one.candidate, order) if twin is None else twin.measured
        same_as, before = twin.name if twin else None, _before(one, rows)
        latency_ms = dict(outcomes[one.candidate]["latency_ms"])
        rows.append(Row(one, measured, order, same_as, before, latency_ms))
    best_free = {NONE: Free(free, compare.measure(free, NONE))}
    if LANE in {row.order for row in rows}:
        best_free[LANE] = _best_by_lane(compare, outcomes)
    met = [(row, best_free[row.order].name) for row in rows if row.same_as is None]
    return PhaseComparison(
        rows=tuple(rows),
        free=best_free[NONE],
        free_by_lane=best_free.get(LANE),
        successive=compare.pairs(_successive(rows)),
        leads=compare.pairs([(row, name, (name, row.order)) for row, name in met]),
        num_queries=int(replay["num_queries"]),
        num_documents=int(replay["num_documents"]),
        num_answers=int(replay["num_answers"]),
        num_rows=int(replay["num_rows"]),
    )


def _order(one: Trained, tables: Mapping[str, pd.DataFrame]) -> str:
    """Return the order a phase is shown in: by lane only where the replay has ranks for it."""
    there = "rank_reranked" in tables[one.candidate]
    has_lanes = there and bool(np.isfinite(tables[one.candidate]["rank_reranked"]).all())
    return LANE if one.phase.rerank == LANE and has_lanes else NONE


def _answers(row: Row) -> tuple[str, str]:
    return row.trained.candidate, row.order


def _before(one: Trained, rows: Sequence[Row]) -> str | None:
    """Return the name of the row above that a phase is compared with; see Row."""
    own = [row for row in rows if row.trained.recipe == one.recipe]
    is_phase = one.label == one.phase.name  # a grown model follows the one it grew from
    named = [row for row in own if is_phase and row.trained.label == one.phase.after]
    return (named or own)[-1].name if own else None


def _successive(rows: Sequence[Row]) -> list[Couple]:
    """Return each row with the one before it; rows of the same answers are one, the first."""
    by_name = {row.name: row for row in rows}
    first = {row.name: by_name[row.same_as or row.name] for row in rows}
    found = [(row, first[row.before]) for row in rows if row.same_as is None and row.before]
    return [(row, earlier.name, _answers(earlier)) for row, earlier in found]


@dataclass(frozen=True)
class _Comparing:
    """The ranks of a replay with what is needed to compare them."""

    tables: Mapping[str, pd.DataFrame]
    bank: Bank
    seed: int
    num_answers: int

    def measure(self, candidate: str, order: str) -> Measured:
        table = self.tables[candidate]
        rank_Q = self._ranks(candidate, order)
        document_Q = self._documents(candidate)
        pools = POOLS if order == NONE else ()
        raw_Q = table["rank_raw"].to_numpy()
        return Measured(
            figures=figures(rank_Q),
            ci95=document_interval(rank_Q, document_Q, self.seed),
            pools={pool: self._pool(raw_Q, pool) for pool in pools if pool <= self.num_answers},
        )

    def pairs(self, couples: Sequence[Couple]) -> tuple[Pair, ...]:
        found = [self._pair(*couple) for couple in couples]
        adjusted = holm([one.hit_at_5.p_value for one in found])
        return tuple(
            Pair(**(vars(one) | {"p_holm": float(p)}))
            for one, p in zip(found, adjusted, strict=True)
        )

    def _pair(self, row: Row, name: str, reference: Answers) -> Pair:
        asked_Q, other_asked_Q = (
            self.tables[one]["target_row"].to_numpy()
            for one in (row.trained.candidate, reference[0])
        )
        if not np.array_equal(asked_Q, other_asked_Q):
            raise ValueError(f"shadow: {row.name} was replayed on other queries than {name}")
        document_Q = self._documents(row.trained.candidate)
        rank_Q, other_Q = self._ranks(*_answers(row)), self._ranks(*reference)
        hits = {k: (hit_at(rank_Q, k), hit_at(other_Q, k)) for k in (5, 10)}
        by_5, by_10 = (paired_difference(*hits[k], document_Q, self.seed) for k in (5, 10))
        change_Q = hits[5][0] - hits[5][1]
        detectable = smallest_detectable(change_Q, document_Q) if change_Q.any() else math.nan
        return Pair(row.name, name, by_5, by_10, detectable, math.nan)

    def _ranks(self, candidate: str, order: str) -> FloatArray:
        column = "rank" if order == NONE else "rank_reranked"
        return np.asarray(self.tables[candidate][column], np.float64)

    def _documents(self, candidate: str) -> np.ndarray:
        return self.bank.document_N[self.tables[candidate]["target_row"].to_numpy()]

    def _pool(self, raw_Q: FloatArray, pool: int) -> dict[str, float]:
        return {f"hit_at_{k}": pool_hit_at(raw_Q, pool, self.num_answers, k) for k in POOL_HITS}


def _best_by_lane(compare: _Comparing, outcomes: Mapping[str, Mapping[str, Any]]) -> Free:
    """Return the free predictor of the best Hit@5 when each is ordered by lane."""
    known = (outcomes[name] for name in compare.tables)
    names = [str(one["name"]) for one in known if one["kind"] == FREE and one["leak"] is None]
    measured = (Free(name, compare.measure(name, LANE)) for name in names)
    return max(measured, key=lambda one: one.measured.figures["hit_at_5"])
