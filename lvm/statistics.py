"""Intervals, tests by document.

Queries of one document share their context, so the document is the unit that is resampled or
flipped. Shapes: Q queries, M documents, S resamples.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lvm.metrics import FIGURES, per_query
from lvm.seeding import generator

RESAMPLES = 10_000
LEVEL = 0.05  # two-sided: intervals hold 95 %

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A paired difference of means a - b with its 95 % interval, p by sign flips of documents."""

    mean: float
    low: float
    high: float
    p_value: float
    num_documents: int


def document_interval(
    rank_Q: ArrayLike, document_Q: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of each of metrics.FIGURES.

    Percentile bootstrap over documents; every call with one seed and one number of documents draws
    the same resamples, so that predictors are compared on the same ones. NaN where all queries are
    from one document: nothing is known then of other documents.
    """
    value_Q4 = per_query(rank_Q)
    documents = _Documents.of(document_Q, len(value_Q4))
    if documents.num < 2:
        return {name: [float("nan")] * 2 for name in FIGURES}
    weight_SM = _document_weights(documents.num, resamples, seed)
    mean_S4 = weight_SM @ documents.sums(value_Q4)
    mean_S4 /= (weight_SM @ documents.size_M)[:, None]
    bounds = [_percentiles(mean_S) for mean_S in mean_S4.T]
    bounds.append(_median_interval(np.asarray(rank_Q, np.float64), documents, weight_SM))
    return dict(zip(FIGURES, bounds, strict=True))


def paired_difference(
    value_a_Q: ArrayLike, value_b_Q: ArrayLike, document_Q: ArrayLike, seed: int
) -> Difference:
    """Compare two predictors by per-query values on the same queries, (Q,) each.

    The interval is the percentile bootstrap over documents, p the sign-flip permutation test by
    document (two-sided; Smucker et al., CIKM 2007). Interval NaN, p 1 with fewer than two
    documents.
    """
    difference_Q = np.asarray(value_a_Q, np.float64) - np.asarray(value_b_Q, np.float64)
    if not np.isfinite(difference_Q).all():
        raise ValueError("values: not all are finite; a paired difference needs finite values")
    documents = _Documents.of(document_Q, len(difference_Q))
    sum_M = documents.sums(difference_Q[:, None])[:, 0]
    mean = float(sum_M.sum() / len(difference_Q))
    if documents.num < 2:
        return Difference(mean, float("nan"), float("nan"), 1.0, documents.num)
    weight_SM = _document_weights(documents.num, RESAMPLES, seed)
    low, high = _percentiles((weight_SM @ sum_M) / (weight_SM @ documents.size_M))
    test = stats.permutation_test(
        (sum_M,),
        lambda sums, axis: sums.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        batch=1000,
        rng=generator(seed, "sign flips"),
    )
    return Difference(mean, low, high, float(test.pvalue), documents.num)


def holm(p_values: ArrayLike) -> FloatArray:
    """Return p-values adjusted for their number (Holm, Scand. J. Statist. 1979), in their order."""
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p values: each must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def smallest_detectable(
    difference_Q: ArrayLike, document_Q: ArrayLike, power: float = 0.8
) -> float:
    """Return the true mean difference that a test at LEVEL on such queries finds with `power`.

    Normal approximation with the standard error over documents: (z(1 - LEVEL/2) + z(power)) * SE.
    It falls with the square root of the number of documents. NaN with fewer than two.
    """
    values_Q = np.asarray(difference_Q, np.float64)
    documents = _Documents.of(document_Q, len(values_Q))
    if documents.num < 2:
        return float("nan")
    residual_M = documents.sums((values_Q - values_Q.mean())[:, None])[:, 0]
    variance = (residual_M**2).sum() * documents.num / (documents.num - 1)
    z = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(power)
    return float(z * np.sqrt(variance) / len(values_Q))


@dataclass(frozen=True)
class _Documents:
    """Queries grouped by document."""

    num: int
    code_Q: NDArray[np.int64]
    size_M: FloatArray

    @classmethod
    def of(cls, document_Q: ArrayLike, num_queries: int) -> "_Documents":
        names, code_Q = np.unique(np.asarray(document_Q), return_inverse=True)
        if len(code_Q) != num_queries or not num_queries:
            raise ValueError(
                f"documents: {len(code_Q)} for {num_queries} queries; each query needs its own"
            )
        return cls(len(names), code_Q, np.bincount(code_Q).astype(np.float64))

    def sums(self, value_QF: FloatArray) -> FloatArray:
        """Return the sum of each column over each document, (M, F)."""
        columns = [np.bincount(self.code_Q, value_Q, self.num) for value_Q in value_QF.T]
        return np.stack(columns, axis=1)


@lru_cache(maxsize=2)
def _document_weights(num_documents: int, resamples: int, seed: int) -> FloatArray:
    """Return how often each resample draws each document, (S, M)."""
    random = generator(seed, "bootstrap")
    weight_SM = np.empty((resamples, num_documents))
    for line in weight_SM:
        drawn = random.integers(num_documents, size=num_documents)
        line[:] = np.bincount(drawn, minlength=num_documents)
    weight_SM.flags.writeable = False
    return weight_SM


def _percentiles(statistic_S: FloatArray) -> list[float]:
    low, high = np.quantile(statistic_S, [LEVEL / 2, 1 - LEVEL / 2])
    return [float(low), float(high)]


def _median_interval(
    rank_Q: FloatArray, documents: _Documents, weight_SM: FloatArray
) -> list[float]:
    """Return the percentile interval of the median without computing a median.

    The resampled median is at most r where half of the drawn queries rank at r or better; the share
    of such resamples grows with r, so that each bound is found by bisection.
    """
    value_R = np.unique(rank_Q)
    half_S = weight_SM @ documents.size_M / 2
    bounds = []
    for share in (LEVEL / 2, 1 - LEVEL / 2):
        first, last = 0, len(value_R) - 1
        while first < last:
            middle = (first + last) // 2
            within_M = documents.sums((rank_Q <= value_R[middle])[:, None].astype(np.float64))
            reached = np.mean(weight_SM @ within_M[:, 0] >= half_S)
            first, last = (first, middle) if reached >= share else (middle + 1, last)
        bounds.append(float(value_R[first]))
    return bounds
