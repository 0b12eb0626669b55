"""What re-ranking by lane does to the answers of an evaluation.

Shapes: Q queries, N bank rows, L lanes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.evaluate import Evaluation
from lvm.evaluation.intervals import document_interval, paired_difference
from lvm.evaluation.metrics import figures, hit_at
from lvm.retrieval.lanes import calibration, context_features, lane_codes, target_codes
from lvm.retrieval.rerank import (
    SIZE,
    Shortlist,
    Weights,
    fit_reranker,
    lane_scores,
    old_rule_scores,
    ranks_anew,
    shortlist,
    true_lane_ranks,
)
from lvm.system.atomic import jsonable
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

FloatArray = NDArray[np.float32]
Ranks = NDArray[np.float64]
KINDS = ("plain", "corrected")


def evaluate_reranking(
    model: nn.Module, bank: Bank, windows: Windows, queries: Queries, own: Evaluation
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Order the answers of `own` to `queries` anew; return the report with the new ranks.

    For plain and for corrected scores the report has tau, beta, the figures with `ci95`, and the
    paired Hit@5 differences to the ranks as they were: of the lane's share, of the replaced
    system's rule (`old_rule`), of the true lane (`true_lane`, the ceiling). `shortlist` says how
    many candidates are ordered anew, `on_list` for how many queries the truth is one of them;
    `classifier` how well the lane is foretold. The table has rank_reranked,
    rank_corrected_reranked. Raises ValueError for a bank without lanes.
    """
    reranker = fit_reranker(model, bank, windows, own.row_correction, windows.seed)
    log_p_QL = reranker.classifier.log_probability(context_features(queries, bank))
    report: dict[str, Any] = {
        "shortlist": SIZE,
        "classifier": _classifier(log_p_QL, queries, bank, windows),
    }
    table = own.per_query[["query", "target_row"]].copy()
    names = {"plain": "rank", "corrected": "rank_corrected"}
    for kind, correction in zip(KINDS, (None, own.row_correction), strict=True):
        groups = windows.representative_N
        listed = shortlist(own.predictions, queries, bank, groups, correction)
        rank_Q = own.per_query[names[kind]].to_numpy()
        case = _Case(listed, rank_Q, log_p_QL, queries, bank, windows.seed)
        weights: Weights = getattr(reranker, kind)
        table[f"{names[kind]}_reranked"] = case.by_lane(weights)
        report[kind] = case.report(weights)
    return jsonable(report), table


@dataclass(frozen=True)
class _Case:
    """One kind of scores: the lists that they made, the ranks as they were."""

    listed: Shortlist
    rank_Q: Ranks
    log_p_QL: FloatArray
    queries: Queries
    bank: Bank
    seed: int

    def by_lane(self, weights: Weights) -> Ranks:
        """Return the ranks (Q,) in the order of the lane's share."""
        weight = weights.tau * weights.beta
        score_QC = lane_scores(self.listed, self.log_p_QL, lane_codes(self.bank), weight)
        return ranks_anew(self.listed, score_QC, self.rank_Q)

    def report(self, weights: Weights) -> dict[str, Any]:
        """Return the figures of the lane's share, of the old rule, of the true lane."""
        code_N, code_Q = lane_codes(self.bank), target_codes(self.queries, self.bank)
        old_QC = old_rule_scores(self.listed, self.log_p_QL, code_N)
        true_Q = true_lane_ranks(self.listed, self.rank_Q, code_Q, code_N)
        return {
            **vars(weights),
            "on_list": float(self.listed.is_truth_QC.any(axis=1).mean()),
            **self._figures(self.by_lane(weights)),
            "old_rule": self._figures(ranks_anew(self.listed, old_QC, self.rank_Q)),
            "true_lane": self._figures(true_Q),
        }

    def _figures(self, rank_Q: Ranks) -> dict[str, Any]:
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        hit_Q, before_Q = hit_at(rank_Q, 5), hit_at(self.rank_Q, 5)
        difference = paired_difference(hit_Q, before_Q, document_Q, self.seed)
        return {
            **figures(rank_Q),
            "ci95": document_interval(rank_Q, document_Q, self.seed),
            "hit_at_5_difference": vars(difference),
        }


def _classifier(
    log_p_QL: FloatArray, queries: Queries, bank: Bank, windows: Windows
) -> dict[str, Any]:
    """Return how well the lane is foretold, beside how often it is that of most train rows."""
    code_Q = target_codes(queries, bank)
    commonest = np.bincount(lane_codes(bank, windows.train_rows())).argmax()
    share = float((code_Q == commonest).mean())
    return calibration(log_p_QL, code_Q) | {"commonest_lane": share}
