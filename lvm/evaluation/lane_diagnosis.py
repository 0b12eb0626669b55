"""Diagnosis of lanes: which are weak, and whether new chains would help."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import Difference, document_interval, figures, hit_at, paired_difference
from lvm.retrieval.lanes import UNASSIGNED_LANE, lane_codes, lane_names
from lvm.system.settings import LaneRules
from lvm.windows.planning import Windows

RESAMPLES = 2000  # per lane; the ends of an interval move by a few hundredths of its width


@dataclass(frozen=True)
class LaneFigures:
    """One lane of one predictor: fractions with 95 % intervals over documents.

    `lift` is the paired Hit@5 difference to `best_baseline`, the free predictor that is best in
    this lane; None without baselines. Lanes without queries do not appear.
    """

    lane: str
    num_queries: int
    num_documents: int
    figures: dict[str, float]
    ci95: dict[str, list[float]]
    best_baseline: str | None
    lift: Difference | None


@dataclass(frozen=True)
class LaneSupply:
    """Train rows of one lane; a chain is a sequence with train rows in the lane."""

    num_chains: int
    num_documents: int
    num_rows: int


@dataclass(frozen=True)
class ConfusionPair:
    """How often queries of lane `truth` retrieve lane `found` first.

    `expected` is the count if both lanes were drawn independently, `excess` = count - expected.
    """

    truth: str
    found: str
    count: int
    share: float
    expected: float
    excess: float


def lane_figures(
    per_query: pd.DataFrame, baselines: Mapping[str, pd.DataFrame], bank: Bank, seed: int = 0
) -> list[LaneFigures]:
    """Return the lanes that have queries, in the order of `lane_names`.

    `per_query` holds `target_row` and the filtered `rank`; each of `baselines` holds the same, for
    the same queries in the same order.
    """
    target_row_Q = per_query["target_row"].to_numpy()
    rank_Q = per_query["rank"].to_numpy()
    document_Q = bank.document_N[target_row_Q]
    code_Q = lane_codes(bank, target_row_Q)
    for name, other in baselines.items():
        if not np.array_equal(other["target_row"].to_numpy(), target_row_Q):
            raise ValueError(f"lanes: {name} was measured on other queries; replay both together")
    result = []
    for code in np.unique(code_Q):
        in_lane_Q = code_Q == code
        lane_rank_Q, lane_document_Q = rank_Q[in_lane_Q], document_Q[in_lane_Q]
        ranks = {name: other["rank"].to_numpy()[in_lane_Q] for name, other in baselines.items()}
        best, lift = _lift(lane_rank_Q, ranks, lane_document_Q, seed)
        result.append(
            LaneFigures(
                lane=lane_names(bank)[code],
                num_queries=int(in_lane_Q.sum()),
                num_documents=len(np.unique(lane_document_Q)),
                figures=figures(lane_rank_Q),
                ci95=document_interval(lane_rank_Q, lane_document_Q, seed, RESAMPLES),
                best_baseline=best,
                lift=lift,
            )
        )
    return result


def _lift(
    rank_Q: NDArray[np.float64],
    baseline_ranks: Mapping[str, NDArray[np.float64]],
    document_Q: NDArray[np.integer],
    seed: int,
) -> tuple[str | None, Difference | None]:
    """Compare with the baseline of the highest Hit@5 in the lane, the first one on a tie."""
    if not baseline_ranks:
        return None, None
    hits = {name: hit_at(ranks, 5) for name, ranks in baseline_ranks.items()}
    best = max(hits, key=lambda name: hits[name].mean())
    return best, paired_difference(hit_at(rank_Q, 5), hits[best], document_Q, seed)


def lane_supply(bank: Bank, windows: Windows) -> dict[str, LaneSupply]:
    """Count the train rows, chains and documents of every lane of the bank."""
    train_row = windows.train_rows()
    rows = pd.DataFrame(
        {
            "lane": lane_codes(bank, train_row),
            "sequence": bank.sequence_N[train_row],
            "document": bank.document_N[train_row],
        }
    )
    counts = rows.groupby("lane").agg(
        chains=("sequence", "nunique"), documents=("document", "nunique"), rows=("lane", "size")
    )
    counts = counts.reindex(range(len(bank.lanes)), fill_value=0)
    return {
        lane: LaneSupply(*(int(count) for count in row))
        for lane, row in zip(bank.lanes, counts.to_numpy(), strict=True)
    }


def confusion_counts(
    per_query: pd.DataFrame, bank: Bank, representative_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Count the queries by (lane of the truth, lane of `top_row`), (L + 1, L + 1).

    A top row that is a twin of the truth counts as the truth, whatever the lane of its own row.
    """
    target_row_Q = per_query["target_row"].to_numpy()
    top_row_Q = per_query["top_row"].to_numpy()
    truth_Q = lane_codes(bank, target_row_Q)
    is_truth_Q = representative_N[top_row_Q] == representative_N[target_row_Q]
    found_Q = np.where(is_truth_Q, truth_Q, lane_codes(bank, top_row_Q))
    num_codes = len(lane_names(bank))
    pair_count = np.bincount(truth_Q * num_codes + found_Q, minlength=num_codes**2)
    return pair_count.reshape(num_codes, num_codes)


def confusion_pairs(
    count_LL: NDArray[np.int64], lanes: tuple[str, ...], num_pairs: int
) -> list[ConfusionPair]:
    """Return the off-diagonal pairs that exceed their expected counts, largest excess first."""
    truth_L, found_L = count_LL.sum(axis=1), count_LL.sum(axis=0)
    expected_LL = np.outer(truth_L, found_L) / max(1, count_LL.sum())
    excess_LL = count_LL - expected_LL
    np.fill_diagonal(excess_LL, 0.0)
    pairs = []
    for flat in np.argsort(-excess_LL, axis=None, kind="stable")[:num_pairs]:
        truth, found = np.unravel_index(flat, count_LL.shape)
        if excess_LL[truth, found] > 0:
            pairs.append(
                ConfusionPair(
                    truth=lanes[truth],
                    found=lanes[found],
                    count=int(count_LL[truth, found]),
                    share=float(count_LL[truth, found] / truth_L[truth]),
                    expected=float(expected_LL[truth, found]),
                    excess=float(excess_LL[truth, found]),
                )
            )
    return pairs


PROCEED, INGEST, UNKNOWN = "proceed", "ingest", "unknown"


@dataclass(frozen=True)
class Diagnosis:
    """The lanes of one predictor and the decision.

    Attributes:
        model: name of the predictor.
        leaky: whether it may have been trained on the answers.
        hit_at_5: over all queries, including unassigned ones.
        weak: lanes that are weak by the interval rule; `weak_old_rule` by the old one.
        small_supply: lanes with fewer chains than the rules require.
        unjudged: lanes with too few queries or documents for the interval rule.
        decision: "proceed", "ingest" or "unknown"; `sentence` gives it with its reasons.
        confusion_LL: queries by (lane of the truth, lane of the first retrieved row).
    """

    model: str
    leaky: bool
    num_queries: int
    hit_at_5: float
    lanes: tuple[LaneFigures, ...]
    supply: dict[str, LaneSupply]
    weak: tuple[str, ...]
    weak_old_rule: tuple[str, ...]
    small_supply: tuple[str, ...]
    unjudged: tuple[str, ...]
    decision: str
    sentence: str
    confusion_lanes: tuple[str, ...]
    confusion_LL: NDArray[np.int64]
    pairs: tuple[ConfusionPair, ...]
    rules: LaneRules

    def report(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        report = {name: value for name, value in vars(self).items() if name != "confusion_LL"}
        report["lanes"] = {
            lane.lane: {**asdict(lane), "supply": asdict(self.supply[lane.lane])}
            if lane.lane in self.supply
            else asdict(lane)
            for lane in self.lanes
        }
        report["supply"] = {lane: asdict(supply) for lane, supply in self.supply.items()}
        report["pairs"] = [asdict(pair) for pair in self.pairs]
        report["rules"] = asdict(self.rules)
        report["confusion"] = self.confusion_LL.tolist()
        return report


def diagnose(
    model: str,
    measured: Mapping[str, pd.DataFrame],
    bank: Bank,
    windows: Windows,
    rules: LaneRules,
    leaky: bool,
    seed: int = 0,
) -> Diagnosis:
    """Judge the lanes of `model` on the queries of `measured`.

    `measured` maps `model` and any free predictors to their per-query tables (`target_row`, `rank`,
    `top_row`), all for the same queries in the same order; `leaky` tells whether the model may have
    been trained on the answers.

    Raises:
        ValueError: the bank has no lanes, or the tables hold different queries.
    """
    per_query = measured[model]
    others = {name: table for name, table in measured.items() if name != model}
    lanes = lane_figures(per_query, others, bank, seed)
    supply = lane_supply(bank, windows)
    overall = figures(per_query["rank"].to_numpy())["hit_at_5"]
    named = [lane for lane in lanes if lane.lane != UNASSIGNED_LANE]
    judged = [lane for lane in named if is_judged(lane, rules)]
    weak = tuple(lane.lane for lane in judged if is_weak(lane, overall, rules))
    decision, sentence = _decide(overall, judged, weak, supply, rules)
    count_LL = confusion_counts(per_query, bank, windows.representative_N)
    return Diagnosis(
        model=model,
        leaky=leaky,
        num_queries=len(per_query),
        hit_at_5=overall,
        lanes=tuple(lanes),
        supply=supply,
        weak=weak,
        weak_old_rule=tuple(
            lane.lane for lane in named if lane.figures["hit_at_5"] < overall - rules.old_rule_fall
        ),
        small_supply=tuple(n for n, s in supply.items() if s.num_chains < rules.min_chains),
        unjudged=tuple(lane.lane for lane in named if not is_judged(lane, rules)),
        decision=decision,
        sentence=sentence,
        confusion_lanes=lane_names(bank),
        confusion_LL=count_LL,
        pairs=tuple(confusion_pairs(count_LL, lane_names(bank), rules.confusion_pairs)),
        rules=rules,
    )


def best_free_lanes(
    diagnosis: Diagnosis, measured: Mapping[str, pd.DataFrame], bank: Bank, seed: int = 0
) -> list[LaneFigures]:
    """Return for each lane the figures of its best free predictor; empty without baselines."""
    names = {lane.lane: lane.best_baseline for lane in diagnosis.lanes if lane.best_baseline}
    found = {name: lane_figures(measured[name], {}, bank, seed) for name in {*names.values()}}
    return [lane for name, lanes in found.items() for lane in lanes if names[lane.lane] == name]


def is_judged(lane: LaneFigures, rules: LaneRules) -> bool:
    """Tell whether the lane has enough queries for the interval rule."""
    return lane.num_queries >= rules.min_queries and lane.num_documents >= rules.min_documents


def is_weak(lane: LaneFigures, overall: float, rules: LaneRules) -> bool:
    """Tell whether the lane is far below `overall` without a clear lift over its best baseline.

    The lift accounts for the difficulty of the lane: a hard lane in which the model still gains is
    not weak.
    """
    is_low = lane.ci95["hit_at_5"][1] < rules.weak_share * overall
    has_lift = lane.lift is not None and lane.lift.low > 0
    return is_low and not has_lift


def _decide(
    overall: float,
    judged: Sequence[LaneFigures],
    weak: Sequence[str],
    supply: Mapping[str, LaneSupply],
    rules: LaneRules,
) -> tuple[str, str]:
    if not judged:
        return UNKNOWN, (
            f"Not known yet: no lane has {rules.min_queries} queries from {rules.min_documents} "
            "documents; measure on more queries or a larger bank."
        )
    if len(weak) < max(1, rules.ingest_from):
        lowest = min(judged, key=lambda lane: lane.figures["hit_at_5"])
        few = f"only {', '.join(weak)} is weak" if weak else "no lane is weak"
        return PROCEED, (
            f"Proceed: {few} among {len(judged)} judged; the lowest is {lowest.lane} at "
            f"Hit@5 {100 * lowest.figures['hit_at_5']:.1f} % (all lanes {100 * overall:.1f} %)."
        )
    wanted = [f"{lane} ({_supply_words(supply[lane], rules)})" for lane in weak]
    return INGEST, (
        f"Ingest for {', '.join(wanted)}: Hit@5 there lies wholly below "
        f"{100 * rules.weak_share:.0f} % of the {100 * overall:.1f} % over all lanes, no lift over "
        "the best baseline is shown."
    )


def _supply_words(supply: LaneSupply, rules: LaneRules) -> str:
    chains = f"{supply.num_chains:,} chains, {supply.num_rows:,} rows to train on"
    return chains if supply.num_chains < rules.min_chains else f"{chains}: supply is not small"
