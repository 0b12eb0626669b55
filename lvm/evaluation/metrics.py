"""Retrieval figures from exact ranks.

Shapes: Q queries, D vector dim. Figures are fractions from 0 to 1, ranks aside. Ranks are float64,
from 1; a tie costs half a rank.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom

FIGURES = ("hit_at_1", "hit_at_5", "hit_at_10", "mrr_at_10", "median_rank")
POOLS = (58, 115, 230, 1149)  # candidates of the old phases 3.5, 3, 2, 1

FloatArray = NDArray[np.float64]


def hit_at(rank_Q: ArrayLike, k: int) -> FloatArray:
    """Return 1.0 where the truth is among the first k, else 0.0, (Q,)."""
    return (_checked(rank_Q) <= k).astype(np.float64)


def soft_hit_at(rank_Q: ArrayLike, k: int) -> FloatArray:
    """Return 1 / (1 + (rank / k)^2), (Q,): near 1 at the top, a half at rank k, near 0 far below.

    A smooth Hit@k: a rank that moves from 9 to 6 counts, so that models which differ little are
    told apart by fewer queries.
    """
    return 1 / (1 + (_checked(rank_Q) / k) ** 2)


def reciprocal_rank_at(rank_Q: ArrayLike, k: int = 10) -> FloatArray:
    """Return 1 / rank where the truth is among the first k, else 0.0, (Q,)."""
    checked_Q = _checked(rank_Q)
    return np.where(checked_Q <= k, 1 / checked_Q, 0.0)


def per_query(rank_Q: ArrayLike) -> FloatArray:
    """Return the per-query values of the FIGURES that are means, (Q, 4)."""
    columns = [hit_at(rank_Q, k) for k in (1, 5, 10)]
    return np.stack([*columns, reciprocal_rank_at(rank_Q, 10)], axis=1)


def figures(rank_Q: ArrayLike) -> dict[str, float]:
    """Return the FIGURES: Hit@1/5/10, MRR@10 as fractions, the median rank.

    Raises ValueError on no rank at all, on ranks that are NaN or below 1.
    """
    checked_Q = _checked(rank_Q)
    values = [*per_query(checked_Q).mean(axis=0), np.median(checked_Q)]
    return {name: float(value) for name, value in zip(FIGURES, values, strict=True)}


def pool_hit_at(rank_Q: ArrayLike, pool: int, num_candidates: int, k: int) -> float:
    """Return the expected Hit@k among the truth with pool - 1 others drawn from all candidates.

    The number of drawn candidates that are better than the truth is hypergeometric. A half rank (an
    odd number of ties) is the mean of its two neighbours. Raises ValueError for an impossible pool.
    """
    checked_Q = _checked(rank_Q)
    if not 1 <= pool <= num_candidates or checked_Q.max() > num_candidates:
        raise ValueError(
            f"pool: {pool} of {num_candidates} candidates with ranks up to {checked_Q.max():g}; "
            "neither a pool nor a rank can exceed the candidates"
        )
    sides = np.concatenate([np.floor(checked_Q), np.ceil(checked_Q)])
    rank_R, num_R = np.unique(sides, return_counts=True)
    hit_R = hypergeom.cdf(k - 1, num_candidates - 1, rank_R - 1, pool - 1)
    return float(hit_R @ num_R / num_R.sum())


def contrastive_accuracy(rank_raw_Q: ArrayLike, num_candidates: int) -> float:
    """Return the mean share of other candidates that score below the truth; chance is 0.5.

    Source: Large Concept Models (arXiv 2412.08821), section 2.4.1, over the whole bank.
    """
    checked_Q = _checked(rank_raw_Q)
    return float(np.mean((num_candidates - checked_Q) / max(1, num_candidates - 1)))


def copy_ratio(prediction_QD: NDArray[Any], last_QD: NDArray[Any], truth_QD: NDArray[Any]) -> float:
    """Return mean cos(prediction, last context row) / mean cos(truth, last context row).

    All unit vectors. Above 1 a predictor repeats its context more than the text does; copy-last has
    1 / mean cos(truth, last). After PAR (arXiv 2412.08821, section 2.4.1), on the last row, as a
    ratio of means, so that a truth at a right angle to its context does no harm. NaN where the
    truths do not lean to their contexts at all (mean cosine of 0 or less).
    """
    copied = np.einsum("qd,qd->q", prediction_QD, last_QD, dtype=np.float64).mean()
    natural = np.einsum("qd,qd->q", truth_QD, last_QD, dtype=np.float64).mean()
    return float(copied / natural) if natural > 0 else float("nan")


def _checked(rank_Q: ArrayLike) -> FloatArray:
    ranks = np.asarray(rank_Q, dtype=np.float64)
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks: shape {ranks.shape}; expected one rank for each of 1 ... queries")
    bad = ~(ranks >= 1)  # NaN compares false
    if bad.any():
        raise ValueError(f"ranks: {bad.sum()} of {len(ranks)} are NaN or below 1")
    return ranks
