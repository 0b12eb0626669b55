"""Ceilings of search in each lane: the truth as a query, the serving index, a larger k.

Shapes: Q queries, N bank rows, D vector dim.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvm.bank.bank import Bank, FloatArray
from lvm.evaluation.metrics import Difference, hit_at, paired_difference
from lvm.retrieval.exact import exact_ranks, top_rows
from lvm.retrieval.index import DEPTH, ServingIndex, agreement
from lvm.retrieval.lanes import UNASSIGNED_LANE, lane_codes, lane_names
from lvm.system.settings import LaneRules
from lvm.windows.planning import IntArray, Queries

KS = (5, 10, 50, 100, 200, 1000)
SERVED_DEPTH = 200
ALL_LANES = "all lanes"
MODEL_LIMITED, INDEX_LIMITED, UNKNOWN = "model", "index", "unknown"


@dataclass(frozen=True)
class LaneCeiling:
    """Limits of one lane; all figures are fractions of its queries.

    Attributes:
        oracle_hit_at_5: exact search with the truth itself, filtered.
        oracle_exact_hit_at_10: the same with the row correction and no filter, which the index
            would reach without misses; `oracle_index_hit_at_10` is the index's own figure.
        agreement: mean share of the ten best passages of a prediction that the index finds.
        hits: Hit@k of the model by exact search, plain, filtered: the figures of record.
        hits_corrected: Hit@k by exact search as it is served (corrected, no filter); `hits_served`
            is the same search through the index.
        served_difference: `hits_served` minus `hits_corrected` at 10, paired by query.
        larger_k_helps: whether Hit at the rules' larger k is far enough above Hit@5.
        limited_by: "model", "index", or "unknown" (too few queries).
    """

    lane: str
    num_queries: int
    oracle_hit_at_5: float
    oracle_exact_hit_at_10: float
    oracle_index_hit_at_10: float
    agreement: float
    hits: dict[str, float]
    hits_corrected: dict[str, float]
    hits_served: dict[str, float]
    served_difference: Difference
    larger_k_helps: bool
    limited_by: str


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of each lane and of all queries, and the facts of the index."""

    index: str
    all_lanes: LaneCeiling
    lanes: tuple[LaneCeiling, ...]
    rules: LaneRules

    def sentence(self) -> str:
        """Say in two sentences what limits the figures and whether a larger k helps."""
        limited = [lane.lane for lane in self.lanes if lane.limited_by == INDEX_LIMITED]
        judged = [lane for lane in self.lanes if lane.limited_by != UNKNOWN]
        helped = [lane.lane for lane in judged if lane.larger_k_helps]
        if not judged:
            return "Search: not known yet, no lane has the queries to judge what limits it."
        first = f"the model limits all {len(judged)} judged lanes, not the index"
        if limited:
            first = f"the index limits {', '.join(limited)}; let it read more before training again"
        rules = self.rules
        gain = f"{100 * rules.larger_k_gain:.0f} points or more from Hit@5 to Hit@{rules.larger_k}"
        second = f"A larger k helps in {', '.join(helped)}: {gain}, which a re-ranking could win."
        if not helped:
            second = f"A larger k helps in no lane (it would with {gain})."
        elif len(helped) == len(judged):
            second = f"A larger k helps in every judged lane: {gain}, which a re-ranking could win."
        return f"Search: {first}. {second}"

    def report(self) -> dict[str, Any]:
        """Return the ceilings as JSON values."""
        return {
            "index": self.index,
            "all_lanes": asdict(self.all_lanes),
            "lanes": {lane.lane: asdict(lane) for lane in self.lanes},
            "sentence": self.sentence(),
        }


def search_table(
    index: ServingIndex,
    prediction_QD: FloatArray,
    queries: Queries,
    bank: Bank,
    representative_N: IntArray,
    row_correction: FloatArray,
) -> pd.DataFrame:
    """Search with truths and predictions, exactly and through the index; one line per query.

    Columns: oracle_rank (plain, filtered), oracle_rank_corrected (no filter), oracle_rank_served,
    rank_served (infinite if the index did not find the truth), agreement (share of the ten best
    passages found).
    """
    truth_QD = bank.unit(queries.target_row_Q)
    plain, corrected = exact_ranks(
        truth_QD, queries, bank, representative_N, (None, row_correction)
    )
    depth = min(DEPTH, index.facts.num_passages)
    truth_row_Q = representative_N[queries.target_row_Q]
    found_Qk, _ = index.search(prediction_QD, depth)
    oracle_Qk, _ = index.search(truth_QD, depth)
    deep_Qk, _ = index.search(prediction_QD, min(SERVED_DEPTH, index.facts.num_passages))
    # A search for more passages looks further, so its first ten differ from those served.
    deep_Q = np.maximum(_place(deep_Qk, truth_row_Q), depth + 1)
    shallow_Q = _place(found_Qk, truth_row_Q)
    exact_Qk, _ = top_rows(
        prediction_QD, bank, depth, row_correction, representative_N=representative_N
    )
    return pd.DataFrame(
        {
            "oracle_rank": plain.rank_Q,
            "oracle_rank_corrected": corrected.rank_raw_Q,
            "oracle_rank_served": _place(oracle_Qk, truth_row_Q),
            "rank_served": np.where(np.isfinite(shallow_Q), shallow_Q, deep_Q),
            "agreement": agreement(found_Qk, exact_Qk),
        }
    )


def lane_ceilings(
    index: str,
    per_query: pd.DataFrame,
    searched: pd.DataFrame,
    bank: Bank,
    rules: LaneRules,
    seed: int = 0,
) -> Ceilings:
    """Return the ceilings of each lane that has queries, in the order of `lane_names`.

    `per_query` holds `target_row`, `rank`, `rank_corrected_raw` of the same queries as `searched`,
    the table of `search_table`; `index` has the facts of the index.
    """
    target_row_Q = per_query["target_row"].to_numpy()
    document_Q = bank.document_N[target_row_Q]
    code_Q = lane_codes(bank, target_row_Q)
    columns = per_query[["rank", "rank_corrected_raw"]].reset_index(drop=True)
    table = pd.concat([columns, searched.reset_index(drop=True)], axis=1)

    def of(lane: str, in_lane_Q: NDArray[np.bool_]) -> LaneCeiling:
        return _ceiling(lane, table[in_lane_Q], document_Q[in_lane_Q], rules, seed)

    lanes = [of(lane_names(bank)[code], code_Q == code) for code in np.unique(code_Q)]
    return Ceilings(index, of(ALL_LANES, np.ones(len(code_Q), bool)), tuple(lanes), rules)


def _ceiling(
    lane: str, table: pd.DataFrame, document_Q: NDArray[np.integer], rules: LaneRules, seed: int
) -> LaneCeiling:
    rank_Q = table["rank"].to_numpy()
    corrected_Q, served_Q = table["rank_corrected_raw"].to_numpy(), table["rank_served"].to_numpy()
    oracle = {name: _hits(table[f"oracle_{name}"]) for name in ("rank_corrected", "rank_served")}
    difference = paired_difference(hit_at(served_Q, 10), hit_at(corrected_Q, 10), document_Q, seed)
    ks = sorted({*KS, rules.larger_k})
    hits = {str(k): float(hit_at(rank_Q, k).mean()) for k in ks}
    corrected = {str(k): float(hit_at(corrected_Q, k).mean()) for k in KS if k <= SERVED_DEPTH}
    is_large = len(table) >= rules.min_queries and difference.num_documents >= rules.min_documents
    is_judged = is_large and lane != UNASSIGNED_LANE
    limited_by = UNKNOWN
    if is_judged:
        limited_by = limit(
            oracle["rank_corrected"], oracle["rank_served"], corrected["10"], difference, rules
        )
    return LaneCeiling(
        lane=lane,
        num_queries=len(table),
        oracle_hit_at_5=float(hit_at(table["oracle_rank"], 5).mean()),
        oracle_exact_hit_at_10=oracle["rank_corrected"],
        oracle_index_hit_at_10=oracle["rank_served"],
        agreement=float(table["agreement"].mean()),
        hits=hits,
        hits_corrected=corrected,
        hits_served={k: float(hit_at(served_Q, int(k)).mean()) for k in corrected},
        served_difference=difference,
        larger_k_helps=hits[str(rules.larger_k)] - hits["5"] >= rules.larger_k_gain,
        limited_by=limited_by,
    )


def limit(
    oracle_exact: float,
    oracle_index: float,
    exact: float,
    difference: Difference,
    rules: LaneRules,
) -> str:
    """Return what limits a lane of enough queries: the index if it misses too much, else the model.

    The index misses too much if it finds the truth itself too rarely, or if serving loses a
    significant part of the hits of exact search.
    """
    misses_truth = oracle_index < rules.index_recall * oracle_exact
    loses_hits = -difference.mean > rules.index_loss * exact and difference.high < 0
    return INDEX_LIMITED if misses_truth or loses_hits else MODEL_LIMITED


def failing_queries(
    per_query: pd.DataFrame, bank: Bank, weak: tuple[str, ...], k: int = 5
) -> pd.DataFrame:
    """Return the queries with a rank above k in the lanes `weak`, or in all lanes if none is weak.

    Columns: sequence, target_row, rank, lane, document; in the order of `per_query`.
    """
    target_row_Q = per_query["target_row"].to_numpy()
    lane_Q = np.array(lane_names(bank), dtype=object)[lane_codes(bank, target_row_Q)]
    table = pd.DataFrame(
        {
            "sequence": _names(bank.sequences, bank.sequence_N[target_row_Q]),
            "target_row": target_row_Q,
            "rank": per_query["rank"].to_numpy(),
            "lane": lane_Q,
            "document": _names(bank.documents, bank.document_N[target_row_Q]),
        }
    )
    chosen_Q = (table["rank"] > k) & (table["lane"].isin(weak) if weak else True)
    return table[chosen_Q].reset_index(drop=True)


def _names(names: tuple[str, ...], code_Q: NDArray[np.integer]) -> NDArray[np.object_]:
    return np.array(names, dtype=object)[code_Q]


def _hits(rank_Q: pd.Series) -> float:
    return float(hit_at(rank_Q, DEPTH).mean())


def _place(row_Qk: IntArray, truth_row_Q: IntArray) -> NDArray[np.float64]:
    """Return the position of the truth among the rows found, infinite if it is missing."""
    is_truth_Qk = row_Qk == truth_row_Q[:, None]
    return np.where(is_truth_Qk.any(axis=1), 1.0 + is_truth_Qk.argmax(axis=1), np.inf)
