"""Compare the trained phases on one replay: figures, pool equivalents, pairs, the old criteria.

Shapes: Q queries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import (
    POOLS,
    Difference,
    Float64Array,
    document_interval,
    figures,
    hit_at,
    holm,
    paired_difference,
    pool_hit_at,
    smallest_detectable,
)
from lvm.models.facts import FREE
from lvm.retrieval.rerank import LANE, NONE
from lvm.studies.phases import OldGates, Phase, published_report

POOL_HITS = (1, 5, 10)
OLD_GATES = ("gain", "converged", "latency")


@dataclass(frozen=True)
class Trained:
    """One trained phase: its run, and its candidate in the replay.

    `label` is the phase's name, followed by the model's for a grown model. `name` also has the
    recipe if the table has several. `report` is the training's (history, plan, warnings, ...).
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

    `pools` holds the expected Hit@1/5/10 in a pool of that many candidates, from the same raw
    ranks. It omits pools larger than the bank, and is empty for re-ranked answers. `served` holds
    Hit@5 of the order that is served with its interval; it is None for replays that did not store
    that order.
    """

    figures: dict[str, float]
    ci95: dict[str, list[float]]
    pools: dict[int, dict[str, float]]
    served: tuple[float, list[float]] | None


@dataclass(frozen=True)
class Row:
    """One phase of the table.

    `same_as` names an earlier row with the same answers. `before` names the row it is compared
    with: the phase that the table calls `after` if that is shown above it, else the row above with
    the same recipe.
    """

    trained: Trained
    measured: Measured
    order: str
    same_as: str | None
    before: str | None
    latency_ms: dict[str, float]

    @property
    def name(self) -> str:
        return self.trained.name


@dataclass(frozen=True)
class Free:
    """The free predictor with the best Hit@5, as ranked or re-ranked."""

    name: str
    measured: Measured


@dataclass(frozen=True)
class Pair:
    """Paired differences of Hit@5 and Hit@10, `later` - `earlier`, on the same queries.

    `p_holm` is the p-value of Hit@5 after Holm over the pairs of one family. `detectable` is the
    smallest true difference that these queries find with 80 % power; NaN if both answer every query
    alike.
    """

    later: str
    earlier: str
    hit_at_5: Difference
    hit_at_10: Difference
    detectable: float
    p_holm: float


@dataclass(frozen=True)
class PhaseComparison:
    """The table: each row against the one before it, and against the best free predictor.

    Rows re-ranked by lane are compared with `free_by_lane`, the best one re-ranked by lane.
    """

    rows: tuple[Row, ...]
    free: Free
    free_by_lane: Free | None
    successive: tuple[Pair, ...]
    leads: tuple[Pair, ...]
    num_queries: int
    num_documents: int
    num_answers: int
    num_rows: int

    @property
    def distinct(self) -> list[Row]:
        """Return the rows whose answers differ from those of all earlier rows."""
        return [row for row in self.rows if row.same_as is None]

    @property
    def best(self) -> Row:
        """Return the first row with the best Hit@5."""
        return max(self.rows, key=lambda row: row.measured.figures["hit_at_5"])

    @property
    def as_ranked(self) -> Row | None:
        """Return the first row that is not re-ranked, so that it has pool equivalents."""
        return next((row for row in self.rows if row.order == NONE), None)

    def row(self, name: str) -> Row:
        """Return the row with this name."""
        return next(row for row in self.rows if row.name == name)

    def report(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "phases": [_row_report(row) for row in self.rows],
            "free": _free_report(self.free),
            "free_by_lane": None if self.free_by_lane is None else _free_report(self.free_by_lane),
            "successive": [asdict(pair) for pair in self.successive],
            "against_free": [asdict(pair) for pair in self.leads],
            "best": self.best.name,
            "queries": self.num_queries,
            "documents": self.num_documents,
            "answers": self.num_answers,
            "bank_rows": self.num_rows,
        }


def _free_report(one: Free) -> dict[str, Any]:
    return {"name": one.name, **asdict(one.measured)}


def _row_report(row: Row) -> dict[str, Any]:
    one, report = row.trained, row.trained.report
    published = one.phase.published
    return {
        "name": row.name,
        "phase": one.phase.name,
        "label": one.label,
        "recipe": one.recipe,
        "ctx": one.phase.ctx,
        "order": row.order,
        "same_as": row.same_as,
        "before": row.before,
        "run": one.run_id,
        "version": one.version,
        "published": None if published is None else published_report(published),
        **asdict(row.measured),
        "latency_ms": row.latency_ms,
        "plan": report["plan"],
        "optimiser_steps": report["optimiser_steps"],
        "epochs": len(report["history"]),
        "best_epoch": report["best_epoch"],
        "warnings": report["warnings"],
    }


_Answers = tuple[str, str]  # candidate, order
_Couple = tuple[Row, str, _Answers]  # a row, the name of its reference, the answers of that


def measure_phases(
    trained: Sequence[Trained], replay: Mapping[str, Any], per_query: pd.DataFrame, bank: Bank
) -> PhaseComparison:
    """Compare the phases by the ranks of one shadow replay: its report and per-query table.

    Raises ValueError if a phase, or every free predictor, was not scored.
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
    """Return the order of the answers: by lane only if the replay has those ranks."""
    there = "rank_reranked" in tables[one.candidate]
    has_lanes = there and bool(np.isfinite(tables[one.candidate]["rank_reranked"]).all())
    return LANE if one.phase.rerank == LANE and has_lanes else NONE


def _answers(row: Row) -> tuple[str, str]:
    return row.trained.candidate, row.order


def _before(one: Trained, rows: Sequence[Row]) -> str | None:
    """Return the name of the row above that a phase is compared with (see Row)."""
    own = [row for row in rows if row.trained.recipe == one.recipe]
    is_phase = one.label == one.phase.name  # a grown model is compared with the one it grew from
    named = [row for row in own if is_phase and row.trained.label == one.phase.after]
    return (named or own)[-1].name if own else None


def _successive(rows: Sequence[Row]) -> list[_Couple]:
    """Pair each row with the one before it; of rows with the same answers only the first counts."""
    by_name = {row.name: row for row in rows}
    first = {row.name: by_name[row.same_as or row.name] for row in rows}
    found = [(row, first[row.before]) for row in rows if row.same_as is None and row.before]
    return [(row, earlier.name, _answers(earlier)) for row, earlier in found]


@dataclass(frozen=True)
class _Comparing:
    """The ranks of a replay, and what is needed to compare them."""

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
        served = None
        if "rank_served" in table:
            served_Q = table["rank_served"].to_numpy()
            interval = document_interval(served_Q, document_Q, self.seed)["hit_at_5"]
            served = figures(served_Q)["hit_at_5"], interval
        return Measured(
            figures=figures(rank_Q),
            ci95=document_interval(rank_Q, document_Q, self.seed),
            pools={pool: self._pool(raw_Q, pool) for pool in pools if pool <= self.num_answers},
            served=served,
        )

    def pairs(self, couples: Sequence[_Couple]) -> tuple[Pair, ...]:
        found = [self._pair(*couple) for couple in couples]
        adjusted = holm([one.hit_at_5.p_value for one in found])
        return tuple(
            Pair(**(vars(one) | {"p_holm": float(p)}))
            for one, p in zip(found, adjusted, strict=True)
        )

    def _pair(self, row: Row, name: str, reference: _Answers) -> Pair:
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

    def _ranks(self, candidate: str, order: str) -> Float64Array:
        column = "rank" if order == NONE else "rank_reranked"
        return np.asarray(self.tables[candidate][column], np.float64)

    def _documents(self, candidate: str) -> np.ndarray:
        return self.bank.document_N[self.tables[candidate]["target_row"].to_numpy()]

    def _pool(self, raw_Q: Float64Array, pool: int) -> dict[str, float]:
        return {f"hit_at_{k}": pool_hit_at(raw_Q, pool, self.num_answers, k) for k in POOL_HITS}


def _best_by_lane(compare: _Comparing, outcomes: Mapping[str, Mapping[str, Any]]) -> Free:
    """Return the free predictor with the best Hit@5 when all are re-ranked by lane."""
    known = (outcomes[name] for name in compare.tables)
    names = [str(one["name"]) for one in known if one["kind"] == FREE and one["leak"] is None]
    measured = (Free(name, compare.measure(name, LANE)) for name in names)
    return max(measured, key=lambda one: one.measured.figures["hit_at_5"])


@dataclass(frozen=True)
class OldCheck:
    """One old criterion for one phase; `passed` is None if nothing can be judged."""

    phase: str
    gate: str
    passed: bool | None
    detail: str


def old_checks(table: PhaseComparison, rules: OldGates) -> list[OldCheck]:
    """Judge every phase by the old criteria of success; no promotion follows from them."""
    found = []
    for row in table.rows:
        verdicts = (
            _gain(row, None if row.before is None else table.row(row.before), rules),
            _converged(row.trained.report, rules),
            _fast(row, rules),
        )
        found += [
            OldCheck(row.name, gate, passed, detail)
            for gate, (passed, detail) in zip(OLD_GATES, verdicts, strict=True)
        ]
    return found


def _gain(row: Row, before: Row | None, rules: OldGates) -> tuple[bool | None, str]:
    """Compare a phase with the one before it, even if both are one training under two names."""
    if before is None:
        return None, "no phase before it"
    old, new = before.measured.figures, row.measured.figures
    changes = {"Hit@5": "hit_at_5", "Hit@10": "hit_at_10"}
    gains = {name: new[key] - old[key] for name, key in changes.items()}
    gains_text = ", ".join(f"{name} {100 * value:+.1f}" for name, value in gains.items())
    passed = all(value > rules.gain_above for value in gains.values())
    return passed, f"{gains_text} points over {before.name}"


def _converged(report: Mapping[str, Any], rules: OldGates) -> tuple[bool | None, str]:
    best = int(report["best_epoch"])
    losses: Sequence[float] = [record["train/loss"] for record in report["history"]]
    if len(losses) < 2:
        return False, f"{len(losses)} epoch: nothing can be said of its end"
    lowest = min(losses[:-1])
    falls = losses[-1] <= lowest + rules.loss_rise * abs(lowest)
    detail = f"best epoch {best} of {len(losses)}, loss {losses[-1]:.4f} after {lowest:.4f}"
    return best > rules.best_epoch_above and falls, detail


def _fast(row: Row, rules: OldGates) -> tuple[bool | None, str]:
    p95 = row.latency_ms.get("p95")
    if p95 is None:
        return None, "not measured"
    return p95 <= rules.latency_p95_ms, f"P95 {p95:.1f} ms, at most {rules.latency_p95_ms:g}"
