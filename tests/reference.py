"""Slow float64 re-implementations, written from the definitions alone.

Shapes: Q queries, N bank rows, D vector dim, P train-time predictions.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from lvm.bank.bank import Bank
from lvm.models.predict import predict_queries
from lvm.windows.planning import Queries, Windows

TIE = 1e-6


def ranks(
    prediction_QD: np.ndarray,
    queries: Queries,
    bank: Bank,
    representative_N: np.ndarray,
    correction_N2: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return filtered and raw ranks, one query, one duplicate group at a time."""
    vector_ND = bank.vectors.astype(np.float64)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    members: dict[int, list[int]] = {}
    for row, representative in enumerate(representative_N.tolist()):
        members.setdefault(representative, []).append(row)
    filtered, raw = [], []
    for place in range(len(queries)):
        target = int(queries.target_row_Q[place])
        context = range(int(queries.first_row_Q[place]), target)
        length = np.linalg.norm(prediction_QD[place].astype(np.float64))
        prediction = prediction_QD[place].astype(np.float64) / (length or 1.0)
        score_N = vector_ND @ prediction
        if correction_N2 is not None:
            score_N = correction_N2[:, 0] * score_N + correction_N2[:, 1]
        truth = int(representative_N[target])
        counts = {"filtered": 1.0, "raw": 1.0}
        for group, rows in members.items():
            if group == truth:
                continue
            tied = abs(score_N[group] - score_N[truth]) <= TIE
            step = 0.5 if tied else float(score_N[group] > score_N[truth])
            counts["raw"] += step
            if not all(row in context for row in rows):
                counts["filtered"] += step
        filtered.append(counts["filtered"])
        raw.append(counts["raw"])
    return np.array(filtered), np.array(raw)


def top_rows(
    prediction_QD: np.ndarray,
    bank: Bank,
    k: int,
    correction_N2: np.ndarray | None = None,
    exclude: Queries | None = None,
) -> list[list[int]]:
    """Return the k best allowed rows of each prediction."""
    vector_ND = bank.vectors.astype(np.float64)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    found = []
    for place, prediction in enumerate(prediction_QD.astype(np.float64)):
        score_N = vector_ND @ (prediction / np.linalg.norm(prediction))
        if correction_N2 is not None:
            score_N = correction_N2[:, 0] * score_N + correction_N2[:, 1]
        hidden: range = range(0)
        if exclude is not None:
            hidden = range(int(exclude.first_row_Q[place]), int(exclude.target_row_Q[place]))
        allowed = [row for row in range(bank.num_rows) if row not in hidden]
        found.append(sorted(allowed, key=lambda row: (-score_N[row], row))[:k])
    return found


def mean_neighbour_score(train_prediction_PD: np.ndarray, bank: Bank, count: int) -> np.ndarray:
    """Return each row's mean cosine to its `count` nearest train predictions."""
    vector_ND = bank.vectors.astype(np.float64)
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    unit_PD = train_prediction_PD.astype(np.float64)
    unit_PD = unit_PD / np.linalg.norm(unit_PD, axis=1, keepdims=True)
    return np.array([np.sort(unit_PD @ vector)[-count:].mean() for vector in vector_ND])


def validation_figures(model: nn.Module, bank: Bank, windows: Windows) -> dict[str, float]:
    """Return the plain filtered figures on val."""
    queries = windows.queries["val"]
    prediction_QD = predict_queries(model, bank, queries)
    return figures(ranks(prediction_QD, queries, bank, windows.representative_N)[0].tolist())


def figures(rank_Q: Sequence[float]) -> dict[str, float]:
    """Return Hit@1/5/10, MRR@10, median rank, counted query by query."""
    num = len(rank_Q)
    result = {f"hit_at_{k}": sum(rank <= k for rank in rank_Q) / num for k in (1, 5, 10)}
    result["mrr_at_10"] = sum(1 / rank if rank <= 10 else 0 for rank in rank_Q) / num
    ordered = sorted(rank_Q)
    result["median_rank"] = (ordered[(num - 1) // 2] + ordered[num // 2]) / 2
    return result


def pool_hit_at(rank_Q: Sequence[int], pool: int, num_candidates: int, k: int) -> float:
    """Return the expected Hit@k among the truth with pool - 1 others, by counting all draws."""
    total = math.comb(num_candidates - 1, pool - 1)
    expected = 0.0
    for rank in rank_Q:
        better, worse = rank - 1, num_candidates - rank
        ways = sum(
            math.comb(better, i) * math.comb(worse, pool - 1 - i) for i in range(min(k, pool))
        )
        expected += ways / total
    return expected / len(rank_Q)
