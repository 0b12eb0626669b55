"""Paired comparison of replays: who is better than whom on the same queries, by how much.

Shapes: Q queries.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from lvm.bank.store import Bank
from lvm.evaluation.intervals import (
    Difference,
    document_interval,
    holm,
    paired_difference,
    smallest_detectable,
)
from lvm.evaluation.lane_diagnosis import LaneFigures, lane_figures
from lvm.evaluation.metrics import figures, hit_at, reciprocal_rank_at
from lvm.models.facts import FREE
from lvm.retrieval.lanes import lane_codes, lane_names
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries


@dataclass(frozen=True, eq=False)
class Replay:
    """What one candidate answered; `per_query` is None where it was refused or not finite.

    `refusal` says why it was not asked, `failure` how the measurement broke off, `leak` how the
    candidate may have seen the answers: then it is scored, but marked. `origin` tells whether the
    answers were measured now or read from the store, `measured_at` when, `seconds` for how long.
    """

    name: str
    kind: str
    version: str | None
    ctx: int
    refusal: str | None = None
    failure: str | None = None
    leak: str | None = None
    num_non_finite: int = 0
    latency_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    origin: str = ""
    measured_at: str = ""
    seconds: float = 0.0
    per_query: pd.DataFrame | None = None


@dataclass(frozen=True)
class Outcome:
    """The figures of one candidate; the dicts are empty where it was not scored."""

    name: str
    kind: str
    version: str | None
    ctx: int
    refusal: str | None
    failure: str | None
    leak: str | None
    num_non_finite: int
    latency_ms: dict[str, float]
    origin: str
    measured_at: str
    seconds: float
    figures: dict[str, float]
    ci95: dict[str, list[float]]
    raw: dict[str, float]
    corrected: dict[str, float]
    corrected_ci95: dict[str, list[float]]
    lanes: tuple[LaneFigures, ...]

    @property
    def is_scored(self) -> bool:
        return bool(self.figures)

    @property
    def why_unscored(self) -> str | None:
        """Return why there are no figures; None where there are."""
        if self.is_scored:
            return None
        if self.refusal is not None:
            return f"refused, {self.refusal}"
        if self.failure is not None:
            return f"refused, {self.failure}"
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

    `p_holm` is the p-value of Hit@5 after Holm over the `num_contenders` that may take the alias
    and are compared with this reference; NaN for others, as a free predictor behind the best one.
    `lanes` is filled where the reference holds the alias, or would, and the candidate may take it.
    `detectable` is the smallest true difference of Hit@5 that these queries find in four of five
    such comparisons (statistics.smallest_detectable); NaN where the two answer alike throughout.
    """

    candidate: str
    reference: str
    hit_at_5: Difference
    mrr_at_10: Difference
    p_holm: float
    detectable: float
    lanes: tuple[LaneChange, ...]
    num_contenders: int = 1


@dataclass(frozen=True, eq=False)
class ShadowResult:
    """One replay: `outcomes` from the best Hit@5 down, leaky ones later, unscored ones last.

    Candidates without a leak are compared, trained ones with `best_free`, all with `baseline_name`
    unless that one leaks.
    `num_answers` counts the duplicate groups a rank runs over; `removed_ctx` is the number of rows
    before each target that are removed from the ranking, the same for every candidate; with
    recorded contexts it is the length of the longest, and exactly their rows are removed.
    `per_query` is the long table (candidate, query, target_row, sequence, document, lane, ranks,
    top_row); `source` says in words where the queries come from, `is_log` whether from a log.
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
    source: str = "the frozen test split"
    is_log: bool = False

    def outcome(self, name: str) -> Outcome | None:
        return next((outcome for outcome in self.outcomes if outcome.name == name), None)

    def comparison(self, candidate: str, reference: str) -> Comparison | None:
        pairs = (pair for pair in self.comparisons if pair.candidate == candidate)
        return next((pair for pair in pairs if pair.reference == reference), None)

    def leaders(self) -> list[Outcome]:
        """Return the scored ones of: the first of the ranking, the baseline, the best free."""
        first = next((one.name for one in self.outcomes if one.is_scored), None)
        names = dict.fromkeys([first, self.baseline_name, self.best_free])
        found = [self.outcome(name) for name in names if name is not None]
        return [one for one in found if one is not None and one.is_scored]

    def report(self) -> dict[str, Any]:
        """Return everything except the per-query table as JSON-able values."""
        report = {name: value for name, value in vars(self).items() if name != "per_query"}
        report["outcomes"] = [asdict(outcome) for outcome in self.outcomes]
        report["comparisons"] = [asdict(comparison) for comparison in self.comparisons]
        return report


def compare(
    replays: Sequence[Replay],
    bank: Bank,
    windows: Windows,
    removed: Queries,
    baseline_name: str | None,
    seed: int = 0,
) -> ShadowResult:
    """Compare replays of the queries `removed`; no model is needed for it."""
    tables = {one.name: one.per_query for one in replays if one.per_query is not None}
    bar = tqdm(replays, desc="figures", unit="candidate", disable=None, leave=False)
    outcomes = sorted((_outcome(one, bank, seed) for one in bar), key=_ranking_key)
    scored = [one.name for one in outcomes if one.is_scored]
    honest = [one for one in outcomes if one.is_scored and one.leak is None]
    best_free = next((one.name for one in honest if one.kind == FREE), None)
    trained = [one.name for one in honest if one.kind != FREE]
    comparisons = []
    contenders = {*trained, best_free or ""} - {baseline_name}
    if baseline_name is not None and baseline_name in {one.name for one in honest}:
        challengers = [one.name for one in honest if one.name != baseline_name]
        found = [_compare_pair(name, baseline_name, tables, bank, seed) for name in challengers]
        comparisons += _with_lanes(_adjusted(found, contenders), contenders, tables, bank, seed)
    if best_free is not None and best_free != baseline_name:
        found = [_compare_pair(name, best_free, tables, bank, seed) for name in trained]
        judged = set(trained) if baseline_name is None else set()
        comparisons += _with_lanes(_adjusted(found, contenders), judged, tables, bank, seed)
    per_query = [tables[name].assign(candidate=name) for name in scored]
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
        outcomes=tuple(outcomes),
        comparisons=tuple(comparisons),
        per_query=pd.concat(per_query, ignore_index=True) if per_query else pd.DataFrame(),
    )


def _outcome(one: Replay, bank: Bank, seed: int) -> Outcome:
    shared = {name: getattr(one, name) for name in _SHARED}
    if one.per_query is None:
        return Outcome(
            **shared, figures={}, ci95={}, raw={}, corrected={}, corrected_ci95={}, lanes=()
        )
    document_Q = bank.document_N[one.per_query["target_row"].to_numpy()]
    rank_Q = one.per_query["rank"].to_numpy()
    corrected_Q = one.per_query["rank_corrected"].to_numpy()
    is_corrected = bool(np.isfinite(corrected_Q).all())
    lanes = lane_figures(one.per_query, {}, bank, seed) if bank.lane_N is not None else []
    return Outcome(
        **shared,
        figures=figures(rank_Q),
        ci95=document_interval(rank_Q, document_Q, seed),
        raw=figures(one.per_query["rank_raw"].to_numpy()),
        corrected=figures(corrected_Q) if is_corrected else {},
        corrected_ci95=document_interval(corrected_Q, document_Q, seed) if is_corrected else {},
        lanes=tuple(lanes),
    )


_Tables = Mapping[str, pd.DataFrame]
_SHARED = tuple(f.name for f in dataclasses.fields(Replay) if f.name != "per_query")


def _ranking_key(outcome: Outcome) -> tuple[bool, bool, float, float, str]:
    """Best Hit@5 first, MRR@10 on a tie, then the name; leaky ones later, unscored ones last."""
    hit, reciprocal = (outcome.figures.get(name, 0.0) for name in ("hit_at_5", "mrr_at_10"))
    return (not outcome.is_scored, outcome.leak is not None, -hit, -reciprocal, outcome.name)


def _adjusted(pairs: Sequence[Comparison], contenders: set[str]) -> list[Comparison]:
    """Give those of the contenders their p-values after Holm over them."""
    own = [pair for pair in pairs if pair.candidate in contenders]
    adjusted = holm([pair.hit_at_5.p_value for pair in own])
    by_name = {pair.candidate: float(p) for pair, p in zip(own, adjusted, strict=True)}
    return [
        dataclasses.replace(
            pair, p_holm=by_name.get(pair.candidate, math.nan), num_contenders=len(own)
        )
        for pair in pairs
    ]


def _with_lanes(
    pairs: Sequence[Comparison], judged: set[str], tables: _Tables, bank: Bank, seed: int
) -> list[Comparison]:
    """Compare the candidates in `judged` per lane, too."""
    if bank.lane_N is None:
        return list(pairs)
    return [
        dataclasses.replace(
            pair, lanes=tuple(_lane_changes(pair.candidate, pair.reference, tables, bank, seed))
        )
        if pair.candidate in judged
        else pair
        for pair in pairs
    ]


def _compare_pair(name: str, reference: str, tables: _Tables, bank: Bank, seed: int) -> Comparison:
    target_row_Q = tables[name]["target_row"].to_numpy()
    if not np.array_equal(target_row_Q, tables[reference]["target_row"].to_numpy()):
        raise ValueError(f"shadow: {name} was replayed on other queries than {reference}")
    document_Q = bank.document_N[target_row_Q]
    rank_Q, other_Q = (tables[one]["rank"].to_numpy() for one in (name, reference))
    hit_Q, other_hit_Q = (hit_at(ranks, 5) for ranks in (rank_Q, other_Q))
    reciprocal_Q, other_reciprocal_Q = (reciprocal_rank_at(r, 10) for r in (rank_Q, other_Q))
    detectable = smallest_detectable(hit_Q - other_hit_Q, document_Q)
    return Comparison(
        candidate=name,
        reference=reference,
        hit_at_5=paired_difference(hit_Q, other_hit_Q, document_Q, seed),
        mrr_at_10=paired_difference(reciprocal_Q, other_reciprocal_Q, document_Q, seed),
        p_holm=float("nan"),
        detectable=detectable if (hit_Q != other_hit_Q).any() else float("nan"),
        lanes=(),
    )


def _lane_changes(
    name: str, reference: str, tables: _Tables, bank: Bank, seed: int
) -> Iterator[LaneChange]:
    target_row_Q = tables[name]["target_row"].to_numpy()
    document_Q, code_Q = bank.document_N[target_row_Q], lane_codes(bank, target_row_Q)
    hit_Q, other_Q = (hit_at(tables[one]["rank"].to_numpy(), 5) for one in (name, reference))
    for code in np.unique(code_Q):
        at = code_Q == code
        change = paired_difference(hit_Q[at], other_Q[at], document_Q[at], seed)
        yield LaneChange(lane_names(bank)[code], int(at.sum()), change)
