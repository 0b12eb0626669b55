"""Who is better than whom on the same queries, by how much, and with what interval.

Shapes: Q queries.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.bank import Bank
from lvm.evaluation.lane_diagnosis import LaneFigures, lane_figures
from lvm.evaluation.metrics import (
    Difference,
    document_interval,
    figures,
    hit_at,
    paired_difference,
    reciprocal_rank_at,
    smallest_detectable,
)
from lvm.models.facts import FREE
from lvm.retrieval.lanes import lane_codes, lane_names
from lvm.system.atomic import cache_key
from lvm.windows.planning import Queries, Windows

# Columns of ranks by query: the first that a candidate has is the order that it is served in.
SERVED_FIRST = ("rank_corrected_reranked", "rank_reranked", "rank_corrected", "rank")


@dataclass(frozen=True)
class Outcome:
    """How one candidate did in a replay; the dicts are empty if it was not scored.

    Attributes:
        refusal: why it was not measured.
        failure: why its measurement broke off.
        counts_own: whether its corrected order counts predictions of a row's own document, as
            models were logged before; see `lvm.models.facts.omits_own_document`.
        leak: how it may have seen the answers; it is scored, but marked.
        origin: whether the answers were measured now or read from the store.
        measured_at: when (UTC, ISO 8601).
        seconds: duration of the measurement.
        figures, raw, corrected: Hit@k, MRR@10 and median rank, each with its 95 % interval.
        served: the same of the order that a user gets, by which candidates are ranked and compared:
            corrected where it has a row correction, and re-ranked where the replay re-ranks.
        lanes: Hit@k of the served order by lane.
        val_hit_at_5: corrected Hit@5 on val, as `train` logged it, else measured in the replay.
        per_query: its ranks by query, until `compare` has joined them into one table.
    """

    name: str
    kind: str
    version: str | None
    ctx: int
    refusal: str | None = None
    failure: str | None = None
    leak: str | None = None
    counts_own: bool = False
    num_non_finite: int = 0
    latency_ms: dict[str, float] = field(default_factory=dict)
    origin: str = ""
    measured_at: str = ""
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    ci95: dict[str, list[float]] = field(default_factory=dict)
    raw: dict[str, float] = field(default_factory=dict)
    corrected: dict[str, float] = field(default_factory=dict)
    corrected_ci95: dict[str, list[float]] = field(default_factory=dict)
    served: dict[str, float] = field(default_factory=dict)
    served_ci95: dict[str, list[float]] = field(default_factory=dict)
    val_hit_at_5: float = math.nan
    lanes: tuple[LaneFigures, ...] = ()
    per_query: pd.DataFrame | None = field(default=None, repr=False, compare=False)

    @property
    def is_scored(self) -> bool:
        return bool(self.figures)

    @property
    def why_unscored(self) -> str | None:
        """Return why there are no figures; None if there are."""
        if self.is_scored:
            return None
        reason = self.refusal if self.refusal is not None else self.failure
        if reason is not None:
            return f"refused, {reason}"
        return f"{self.num_non_finite:,} predictions are not finite"


@dataclass(frozen=True)
class LaneChange:
    """Paired Hit@5 difference in one lane."""

    lane: str
    num_queries: int
    hit_at_5: Difference


@dataclass(frozen=True)
class Comparison:
    """Paired differences candidate - reference on the same queries.

    Attributes:
        hit_at_5, mrr_at_10: of the served order, by which is decided.
        plain_hit_at_5: of plain cosines.
        detectable: the smallest true difference of `hit_at_5` that these queries find with 80 %
            power (metrics.smallest_detectable); NaN if both answer every query alike.
        lanes: filled if the reference holds the alias, or would.
    """

    candidate: str
    reference: str
    hit_at_5: Difference
    mrr_at_10: Difference
    plain_hit_at_5: Difference
    detectable: float
    lanes: tuple[LaneChange, ...]


@dataclass(frozen=True, eq=False)
class ShadowResult:
    """The result of one replay.

    Trained candidates without a leak are compared with `best_free`, and all candidates without a
    leak with `baseline_name`, unless that one leaks.

    Attributes:
        num_rows, num_answers: bank rows, and the duplicate groups that ranks run over.
        removed_ctx: number of rows before each target that are removed from the ranking, the same
            for every candidate; of recorded contexts, the length of the longest.
        outcomes: from the best served Hit@5 down, leaky candidates after them, unscored ones last.
        per_query: long table (candidate, query, target_row, sequence, document, lane, ranks,
            rank_served, top_row).
        queries_sha256: hash of the bank and the rows asked for.
        source: where the queries come from, in words; `is_log` tells whether from a query log.
        num_earlier: how often these queries have decided before.
    """

    bank_sha256: str
    windows_sha256: str
    leaky: bool
    num_rows: int
    num_answers: int
    num_queries: int
    num_documents: int
    removed_ctx: int
    seed: int
    baseline_name: str | None
    best_free: str | None
    outcomes: tuple[Outcome, ...]
    comparisons: tuple[Comparison, ...]
    per_query: pd.DataFrame
    queries_sha256: str
    source: str = "the frozen test split"
    is_log: bool = False
    num_earlier: int = 0

    def outcome(self, name: str) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.name == name), None)

    def comparison(self, candidate: str, reference: str) -> Comparison | None:
        pairs = (pair for pair in self.comparisons if pair.candidate == candidate)
        return next((pair for pair in pairs if pair.reference == reference), None)

    def leaders(self) -> list[Outcome]:
        """Return the first of the ranking, the baseline and the best free one, if scored."""
        first = next((one.name for one in self.outcomes if one.is_scored), None)
        names = dict.fromkeys([first, self.baseline_name, self.best_free])
        found = [self.outcome(name) for name in names if name is not None]
        return [one for one in found if one is not None and one.is_scored]

    def report(self) -> dict[str, Any]:
        """Return everything except the per-query table as JSON values."""
        report = {name: value for name, value in vars(self).items() if name != "per_query"}
        report["outcomes"] = [_without_table(asdict(outcome)) for outcome in self.outcomes]
        report["comparisons"] = [asdict(comparison) for comparison in self.comparisons]
        return report


@dataclass(frozen=True)
class Reranked:
    """One candidate with its best 200 re-ranked: the order that is served then.

    `change` is the paired Hit@5 difference to its own ranks before, `lead` that to the best free
    predictor, also re-ranked; None for that one itself, or if no free one was scored.
    """

    name: str
    figures: dict[str, float]
    ci95: dict[str, list[float]]
    change: Difference
    lead: Difference | None

    def report(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def scored(one: Outcome, per_query: pd.DataFrame, bank: Bank, seed: int = 0) -> Outcome:
    """Return the outcome with the figures of its ranks by query."""
    document_Q = bank.document_N[per_query["target_row"].to_numpy()]
    orders = [name for name in SERVED_FIRST if np.isfinite(per_query[name]).all()]
    served = per_query.assign(rank=per_query[orders[0]])
    lanes = lane_figures(served, {}, bank, seed) if bank.lane_N is not None else []
    found = {name: figures(per_query[name].to_numpy()) for name in orders}
    ci95 = {name: document_interval(per_query[name], document_Q, seed) for name in orders}
    return dataclasses.replace(
        one,
        figures=found["rank"],
        ci95=ci95["rank"],
        raw=figures(per_query["rank_raw"].to_numpy()),
        corrected=found.get("rank_corrected", {}),
        corrected_ci95=ci95.get("rank_corrected", {}),
        served=found[orders[0]],
        served_ci95=ci95[orders[0]],
        lanes=tuple(lanes),
        per_query=per_query.assign(rank_served=served["rank"]),
    )


def compare(
    outcomes: Sequence[Outcome],
    bank: Bank,
    windows: Windows,
    removed: Queries,
    baseline_name: str | None,
    seed: int = 0,
) -> ShadowResult:
    """Rank and compare the outcomes of the queries `removed`; no model is needed for it.

    Lanes are compared where the reference holds the alias, or would.
    """
    outcomes = sorted(outcomes, key=_ranking_key)
    tables = {one.name: one.per_query for one in outcomes if one.per_query is not None}
    honest = [one for one in outcomes if one.is_scored and one.leak is None]
    best_free = next((one.name for one in honest if one.kind == FREE), None)
    names = [one.name for one in honest]
    pairs = []
    if baseline_name in names:
        pairs += [(name, baseline_name) for name in names if name != baseline_name]
    if best_free is not None and best_free != baseline_name:
        pairs += [(one.name, best_free) for one in honest if one.kind != FREE]
    judged = baseline_name or best_free if bank.lane_N is not None else None
    comparisons = [
        _compare_pair(name, str(reference), tables, bank, seed, by_lane=reference == judged)
        for name, reference in pairs
    ]
    long = [table.assign(candidate=name) for name, table in tables.items()]
    return ShadowResult(
        bank_sha256=bank.sha256,
        windows_sha256=windows.sha256,
        leaky=windows.leaky,
        num_rows=bank.num_rows,
        num_answers=len(np.unique(windows.representative_N)),
        num_queries=len(removed),
        num_documents=len(np.unique(bank.document_N[removed.target_row_Q])),
        removed_ctx=removed.ctx,
        seed=seed,
        baseline_name=baseline_name,
        best_free=best_free,
        outcomes=tuple(dataclasses.replace(one, per_query=None) for one in outcomes),
        comparisons=tuple(comparisons),
        per_query=pd.concat(long, ignore_index=True) if long else pd.DataFrame(),
        queries_sha256=cache_key(bank.sha256, removed.target_row_Q),
    )


def reranked_outcomes(result: ShadowResult, bank: Bank) -> list[Reranked]:
    """Return the scored candidates re-ranked, from the best Hit@5 down."""
    tables = dict(list(result.per_query.groupby("candidate"))) if len(result.per_query) else {}
    hits = {name: hit_at(table["rank_served"].to_numpy(), 5) for name, table in tables.items()}
    free_Q = hits.get(result.best_free or "")
    found = []
    for name, table in tables.items():
        rank_Q = table["rank_served"].to_numpy()
        document_Q = bank.document_N[table["target_row"].to_numpy()]
        is_corrected = bool(np.isfinite(table["rank_corrected"]).all())
        before_Q = hit_at(table["rank_corrected" if is_corrected else "rank"].to_numpy(), 5)
        lead = None
        if free_Q is not None and name != result.best_free:
            lead = paired_difference(hits[name], free_Q, document_Q, result.seed)
        found.append(
            Reranked(
                name=str(name),
                figures=figures(rank_Q),
                ci95=document_interval(rank_Q, document_Q, result.seed),
                change=paired_difference(hits[name], before_Q, document_Q, result.seed),
                lead=lead,
            )
        )
    return sorted(found, key=lambda one: -one.figures["hit_at_5"])


_Tables = Mapping[str, pd.DataFrame]


def _without_table(outcome: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in outcome.items() if name != "per_query"}


def _ranking_key(outcome: Outcome) -> tuple[bool, bool, float, float, str]:
    """Sort by served Hit@5, then MRR@10, then name; leaky ones later, unscored ones last."""
    hit, reciprocal = (outcome.served.get(name, 0.0) for name in ("hit_at_5", "mrr_at_10"))
    return (not outcome.is_scored, outcome.leak is not None, -hit, -reciprocal, outcome.name)


def _compare_pair(
    name: str, reference: str, tables: _Tables, bank: Bank, seed: int, by_lane: bool
) -> Comparison:
    target_row_Q = tables[name]["target_row"].to_numpy()
    if not np.array_equal(target_row_Q, tables[reference]["target_row"].to_numpy()):
        raise ValueError(f"shadow: {name} was replayed on other queries than {reference}")
    document_Q = bank.document_N[target_row_Q]
    rank_Q, plain_Q, other_Q, other_plain_Q = (
        tables[one][order].to_numpy()
        for one in (name, reference)
        for order in ("rank_served", "rank")
    )
    hit_Q, other_hit_Q = hit_at(rank_Q, 5), hit_at(other_Q, 5)
    reciprocal_Q, other_reciprocal_Q = (
        reciprocal_rank_at(rank_Q, 10),
        reciprocal_rank_at(other_Q, 10),
    )
    plain = paired_difference(hit_at(plain_Q, 5), hit_at(other_plain_Q, 5), document_Q, seed)
    detectable = smallest_detectable(hit_Q - other_hit_Q, document_Q)
    return Comparison(
        candidate=name,
        reference=reference,
        hit_at_5=paired_difference(hit_Q, other_hit_Q, document_Q, seed),
        mrr_at_10=paired_difference(reciprocal_Q, other_reciprocal_Q, document_Q, seed),
        plain_hit_at_5=plain,
        detectable=detectable if (hit_Q != other_hit_Q).any() else float("nan"),
        lanes=tuple(_lane_changes(name, reference, tables, bank, seed)) if by_lane else (),
    )


def _lane_changes(
    name: str, reference: str, tables: _Tables, bank: Bank, seed: int
) -> Iterator[LaneChange]:
    target_row_Q = tables[name]["target_row"].to_numpy()
    document_Q, code_Q = bank.document_N[target_row_Q], lane_codes(bank, target_row_Q)
    hit_Q, other_Q = (hit_at(tables[one]["rank_served"].to_numpy(), 5) for one in (name, reference))
    for code in np.unique(code_Q):
        at = code_Q == code
        change = paired_difference(hit_Q[at], other_Q[at], document_Q[at], seed)
        yield LaneChange(lane_names(bank)[code], int(at.sum()), change)
