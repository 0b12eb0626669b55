"""The phases under one evaluation: figures, pool equivalents, paired differences.

Shapes: Q queries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.store import Bank
from lvm.lanes.reranking import LANE, NONE
from lvm.metrics import POOLS, figures, hit_at, pool_hit_at
from lvm.phases.published import published_report
from lvm.phases.table import Phase
from lvm.statistics import (
    Difference,
    FloatArray,
    document_interval,
    holm,
    paired_difference,
    smallest_detectable,
)

POOL_HITS = (1, 5, 10)


@dataclass(frozen=True)
class Trained:
    """One phase under one recipe, trained: by which run, as which candidate of the replay.

    `label` is the phase's name, of a grown model with the model's behind it; `name` has the recipe,
    too, where the table has several.
    `report` is that of the training (history, plan, warnings, ...).
    """

    name: str
    label: str
    phase: Phase
    recipe: str
    run_id: str
    version: str
    candidate: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """Figures of one predictor over the whole bank, with intervals by document.

    `pools` holds the expected Hit@1/5/10 in a pool of so many candidates, from the same raw ranks;
    it lacks pools that exceed the bank, and is empty for ranks that were ordered anew.
    """

    figures: dict[str, float]
    ci95: dict[str, list[float]]
    pools: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One phase of the table; `same_as` names an earlier row with the very same answers."""

    trained: Trained
    measured: Measured
    order: str
    same_as: str | None
    latency_ms: dict[str, float]

    @property
    def name(self) -> str:
        return self.trained.name


@dataclass(frozen=True)
class Pair:
    """Paired Hit@5, Hit@10 of `later` - `earlier` on the same queries.

    `p_holm` is the p-value of Hit@5 after Holm over the pairs of one family, `detectable` the
    smallest true difference that these queries find in four of five cases; NaN where the two answer
    alike throughout.
    """

    later: str
    earlier: str
    hit_at_5: Difference
    hit_at_10: Difference
    detectable: float
    p_holm: float


@dataclass(frozen=True)
class PhaseComparison:
    """The table: its rows, each phase against the one before, each against the free predictor."""

    rows: tuple[Row, ...]
    free: str
    free_measured: Measured
    free_by_lane: Measured | None
    successive: tuple[Pair, ...]
    leads: tuple[Pair, ...]
    num_queries: int
    num_documents: int
    num_answers: int
    num_rows: int
    leaky: bool

    @property
    def best(self) -> Row:
        """Return the row of the best Hit@5, the first of equals."""
        return max(self.rows, key=lambda row: row.measured.figures["hit_at_5"])

    def report(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "phases": [_row_report(row) for row in self.rows],
            "free": {"name": self.free, **asdict(self.free_measured)},
            "free_by_lane": None if self.free_by_lane is None else asdict(self.free_by_lane),
            "successive": [asdict(pair) for pair in self.successive],
            "against_free": [asdict(pair) for pair in self.leads],
            "best": self.best.name,
            "queries": self.num_queries,
            "documents": self.num_documents,
            "answers": self.num_answers,
            "bank_rows": self.num_rows,
            "leaky": self.leaky,
        }


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
    rows: list[Row] = []
    for one in trained:
        order = _order(one, tables)
        twin = next((row for row in rows if _answers(row) == (one.candidate, order)), None)
        measured = compare.measure(one.candidate, order) if twin is None else twin.measured
        latency = next(o["latency_ms"] for o in replay["outcomes"] if o["name"] == one.candidate)
        rows.append(Row(one, measured, order, twin.name if twin else None, dict(latency)))
    return PhaseComparison(
        rows=tuple(rows),
        free=free,
        free_measured=compare.measure(free, NONE),
        free_by_lane=compare.measure(free, LANE) if LANE in {row.order for row in rows} else None,
        successive=compare.pairs(_successive(rows)),
        leads=compare.pairs([(row, None, free) for row in rows if row.same_as is None]),
        num_queries=int(replay["num_queries"]),
        num_documents=int(replay["num_documents"]),
        num_answers=int(replay["num_answers"]),
        num_rows=int(replay["num_rows"]),
        leaky=bool(replay["leaky"]),
    )


def _order(one: Trained, tables: Mapping[str, pd.DataFrame]) -> str:
    """Return the order a phase is shown in: by lane only where the replay has ranks for it."""
    there = "rank_reranked" in tables[one.candidate]
    has_lanes = there and bool(np.isfinite(tables[one.candidate]["rank_reranked"]).all())
    return LANE if one.phase.rerank == LANE and has_lanes else NONE


def _answers(row: Row) -> tuple[str, str]:
    return row.trained.candidate, row.order


Couple = tuple[Row, Row | None, str]


def _successive(rows: Sequence[Row]) -> list[Couple]:
    """Return each row with the one before it of its recipe; rows of the same answers are one."""
    found: list[Couple] = []
    before: dict[str, Row] = {}
    for row in (row for row in rows if row.same_as is None):
        earlier = before.get(row.trained.recipe)
        if earlier is not None:
            found.append((row, earlier, earlier.name))
        before[row.trained.recipe] = row
    return found


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
        found = []
        for row, earlier, name in couples:
            reference = (name, row.order) if earlier is None else _answers(earlier)
            found.append(self._pair(row, name, reference))
        adjusted = holm([one.hit_at_5.p_value for one in found])
        return tuple(
            Pair(**(vars(one) | {"p_holm": float(p)}))
            for one, p in zip(found, adjusted, strict=True)
        )

    def _pair(self, row: Row, name: str, reference: tuple[str, str]) -> Pair:
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


def _row_report(row: Row) -> dict[str, Any]:
    one, told = row.trained, row.trained.report
    published = one.phase.published
    return {
        "name": row.name,
        "phase": one.phase.name,
        "label": one.label,
        "recipe": one.recipe,
        "ctx": one.phase.ctx,
        "order": row.order,
        "same_as": row.same_as,
        "run": one.run_id,
        "version": one.version,
        "published": None if published is None else published_report(published),
        **asdict(row.measured),
        "latency_ms": row.latency_ms,
        "plan": told["plan"],
        "optimiser_steps": told["optimiser_steps"],
        "epochs": len(told["history"]),
        "best_epoch": told["best_epoch"],
        "warnings": told["warnings"],
    }
