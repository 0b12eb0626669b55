"""Figures of each lane, from the per-query ranks of predictors over one set of queries.

Shapes: N bank rows, Q queries, L lanes. A lane code is an index into `bank.lanes`; unassigned rows
have the last code L and are shown as a lane of their own, never as lane 0.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lvm.bank.row_table import UNASSIGNED
from lvm.bank.store import Bank
from lvm.evaluation.intervals import Difference, document_interval, paired_difference
from lvm.evaluation.metrics import figures, hit_at
from lvm.windows.planning import Windows

UNASSIGNED_LANE = "unassigned"
RESAMPLES = 2000  # per lane; the ends of an interval move by a few hundredths of its width
LaneArray = NDArray[np.int64]


@dataclass(frozen=True)
class LaneFigures:
    """One lane of one predictor: fractions with 95 % intervals over documents.

    `lift` is the paired Hit@5 difference to `best_baseline`, the free predictor that is best in
    this very lane; None where no baseline was given. Lanes without a query do not appear.
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


def lane_names(bank: Bank) -> tuple[str, ...]:
    """Return the names of the codes of `lane_codes`."""
    return (*bank.lanes, UNASSIGNED_LANE)


def lane_codes(bank: Bank, row_Q: NDArray[np.integer]) -> LaneArray:
    """Return the lane code of each row; a row without a lane has the last code.

    Raises:
        ValueError: the bank has no lanes at all.
    """
    if bank.lane_N is None:
        raise ValueError(f"bank {bank.path}: has no lanes; add a column 'lane' to its row table")
    code_Q = bank.lane_N[row_Q].astype(np.int64)
    return np.where(code_Q == UNASSIGNED, len(bank.lanes), code_Q)


def lanes_sha256(bank: Bank) -> str:
    """Return the identity of the lanes: a hash of their names with the lane of every row."""
    codes = lane_codes(bank, np.arange(bank.num_rows))
    digest = hashlib.sha256(json.dumps(bank.lanes).encode())
    digest.update(codes.astype("<i8").data)
    return digest.hexdigest()


def lane_figures(
    per_query: pd.DataFrame, baselines: Mapping[str, pd.DataFrame], bank: Bank, seed: int = 0
) -> list[LaneFigures]:
    """Return the lanes that have queries, in the order of `lane_names`.

    `per_query` holds `target_row` with the filtered `rank`; so does each of `baselines`, for the
    same queries in the same order.
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
    """Compare with the baseline of the highest Hit@5 here, its first name on a tie."""
    if not baseline_ranks:
        return None, None
    hits = {name: hit_at(ranks, 5) for name, ranks in baseline_ranks.items()}
    best = max(hits, key=lambda name: hits[name].mean())
    return best, paired_difference(hit_at(rank_Q, 5), hits[best], document_Q, seed)


def lane_supply(bank: Bank, windows: Windows) -> dict[str, LaneSupply]:
    """Count the train rows of every lane of the bank with their chains and documents."""
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
    """Count the queries of each (lane of the truth, lane of `top_row`), (L + 1, L + 1).

    A top row that is a twin of the truth is the truth, whatever lane its own row is filed under.
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
    """Return the off-diagonal pairs that exceed their margins most, largest excess first."""
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
