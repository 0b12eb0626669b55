"""Diagnosis of lanes: which are weak, whether new chains are the remedy."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.evaluation.lane_metrics import (
    UNASSIGNED_LANE,
    ConfusionPair,
    LaneFigures,
    LaneSupply,
    confusion_counts,
    confusion_pairs,
    lane_figures,
    lane_names,
    lane_supply,
)
from lvm.evaluation.metrics import figures
from lvm.system.thresholds import LaneRules
from lvm.windows.planning import Windows

PROCEED, INGEST, UNKNOWN = "proceed", "ingest", "unknown"


@dataclass(frozen=True)
class Diagnosis:
    """The lanes of one predictor with the decision that follows.

    Attributes:
        model: name of the predictor.
        leaky: whether it may know the answers.
        hit_at_5: over all queries, the unassigned ones included.
        weak: lanes that are weak by the interval rule; `weak_old_rule` by the old one.
        small_supply: lanes with fewer chains than the rules ask for.
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
        """Return the diagnosis as JSON-able values."""
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

    `measured` maps `model`, beside any free predictors, to their per-query tables (`target_row`,
    `rank`, `top_row`), all for the same queries in the same order; `leaky` marks what may know the
    answers.

    Raises:
        ValueError: the bank has no lanes, the tables hold different queries.
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
    """Return each lane as the free predictor that is best there finds it; none without any."""
    names = {lane.lane: lane.best_baseline for lane in diagnosis.lanes if lane.best_baseline}
    found = {name: lane_figures(measured[name], {}, bank, seed) for name in {*names.values()}}
    return [lane for name, lanes in found.items() for lane in lanes if names[lane.lane] == name]


def is_judged(lane: LaneFigures, rules: LaneRules) -> bool:
    """Tell whether the lane has the queries for the interval rule."""
    return lane.num_queries >= rules.min_queries and lane.num_documents >= rules.min_documents


def is_weak(lane: LaneFigures, overall: float, rules: LaneRules) -> bool:
    """Tell whether the lane is far below `overall` without a shown lift over its best baseline.

    The lift takes the difficulty of the lane out: a hard lane in which the model still gains is not
    weak.
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
