"""Retrieval metrics from exact ranks, with intervals and tests by document.

Figures are fractions from 0 to 1, except ranks. Ranks are float64, from 1; a tie costs half a rank.
Queries of one document share their context, so documents are the units of resampling and of sign
flips. Shapes: Q queries, M documents, S resamples, D vector dim.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import hypergeom

from lvm.system.seeding import generator

FIGURES = ("hit_at_1", "hit_at_5", "hit_at_10", "mrr_at_10", "median_rank")
POOLS = (58, 115, 230, 1149)  # pool sizes of the old phases 3.5, 3, 2, 1
Float64Array = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.05  # two-sided: 95 % intervals
BLOCK_VALUES = 2**20  # weights (resamples x documents) in memory at a time: 8 MB
KEPT_VALUES = 2**23  # weights cached for the next call: 64 MB
PROBES = 16  # medians tried per pass over the resamples, for each bound


def hit_at(rank_Q: ArrayLike, k: int) -> Float64Array:
    """Return 1.0 if the truth is among the first k, else 0.0, (Q,)."""
    return (_checked(rank_Q) <= k).astype(np.float64)


def soft_hit_at(rank_Q: ArrayLike, k: int) -> Float64Array:
    """Return 1 / (1 + (rank / k)^2), (Q,): near 1 at the top, a half at rank k, near 0 far below.

    A smooth Hit@k: an improvement from rank 9 to 6 counts, so fewer queries distinguish models of
    similar quality.
    """
    return 1 / (1 + (_checked(rank_Q) / k) ** 2)


def reciprocal_rank_at(rank_Q: ArrayLike, k: int = 10) -> Float64Array:
    """Return 1 / rank if the truth is among the first k, else 0.0, (Q,)."""
    checked_Q = _checked(rank_Q)
    return np.where(checked_Q <= k, 1 / checked_Q, 0.0)


def per_query(rank_Q: ArrayLike) -> Float64Array:
    """Return the per-query values of those FIGURES that are means, (Q, 4)."""
    columns = [hit_at(rank_Q, k) for k in (1, 5, 10)]
    return np.stack([*columns, reciprocal_rank_at(rank_Q, 10)], axis=1)


def figures(rank_Q: ArrayLike) -> dict[str, float]:
    """Return the FIGURES: Hit@1/5/10, MRR@10 as fractions, the median rank.

    Raises ValueError for an empty array and for ranks that are NaN or below 1.
    """
    checked_Q = _checked(rank_Q)
    values = [*per_query(checked_Q).mean(axis=0), np.median(checked_Q)]
    return {name: float(value) for name, value in zip(FIGURES, values, strict=True)}


def pool_hit_at(rank_Q: ArrayLike, pool: int, num_candidates: int, k: int) -> float:
    """Return the expected Hit@k among the truth and pool - 1 others drawn from all candidates.

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

    All are unit vectors. Above 1 a predictor repeats its context more than the text does; copy-last
    has 1 / mean cos(truth, last). After PAR (arXiv 2412.08821, section 2.4.1), on the last row, as
    a ratio of means, so that a truth orthogonal to its context does not divide by zero. NaN if the
    mean cosine of truths and contexts is 0 or less.
    """
    copied = np.einsum("qd,qd->q", prediction_QD, last_QD, dtype=np.float64).mean()
    natural = np.einsum("qd,qd->q", truth_QD, last_QD, dtype=np.float64).mean()
    return float(copied / natural) if natural > 0 else float("nan")


def _checked(rank_Q: ArrayLike) -> Float64Array:
    ranks = np.asarray(rank_Q, dtype=np.float64)
    if ranks.ndim != 1 or not len(ranks):
        raise ValueError(f"ranks: shape {ranks.shape}; expected one rank for each of 1 ... queries")
    bad = ~(ranks >= 1)  # NaN fails this comparison
    if bad.any():
        raise ValueError(f"ranks: {bad.sum()} of {len(ranks)} are NaN or below 1")
    return ranks


class Estimate(Protocol):
    """A figure with its 95 % interval."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def points(found: Estimate, width: int = 0) -> str:
    """Format fractions in points: `+1.2 [+0.4, +2.0]`, each bound at least `width` wide.

    An interval of NaN, as for queries of one document, is `[unknown]`.
    """
    mean, low, high = (100 * value for value in (found.mean, found.low, found.high))
    if math.isnan(low):
        return f"{mean:+.1f} [unknown]"
    return f"{mean:+.1f} [{low:+{width}.1f}, {high:+{width}.1f}]"


@dataclass(frozen=True)
class Difference:
    """A paired difference of means a - b with its 95 % interval and the p-value of sign flips."""

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
    the same resamples, so predictors are compared on the same ones. NaN if all queries are from one
    document, which allows no inference about others.
    """
    value_Q4 = per_query(rank_Q)
    documents = _Documents.of(document_Q, len(value_Q4))
    if documents.num < 2:
        return {name: [float("nan")] * 2 for name in FIGURES}
    bootstrap = _Bootstrap(documents.num, resamples, seed)
    mean_S4 = bootstrap.means(documents.sums(value_Q4), documents.size_M)
    bounds = [_percentiles(mean_S) for mean_S in mean_S4.T]
    bounds.append(_median_interval(np.asarray(rank_Q, np.float64), documents, bootstrap))
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
    bootstrap = _Bootstrap(documents.num, RESAMPLES, seed)
    low, high = _percentiles(bootstrap.means(sum_M[:, None], documents.size_M)[:, 0])
    p_value = _sign_flip_p(sum_M, seed)
    return Difference(mean, low, high, p_value, documents.num)


def holm(p_values: ArrayLike) -> Float64Array:
    """Return p-values adjusted for their number (Holm, Scand. J. Statist. 1979), in order."""
    p = np.asarray(p_values, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p values: each must lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def smallest_p(num_documents: int) -> float:
    """Return the smallest p-value that the sign-flip test can give for this number of documents."""
    return max(2.0 ** (1 - num_documents), 1 / RESAMPLES)


def smallest_detectable(
    difference_Q: ArrayLike, document_Q: ArrayLike, power: float = 0.8
) -> float:
    """Return the true mean difference that a test at LEVEL on such queries detects with `power`.

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
    size_M: Float64Array

    @classmethod
    def of(cls, document_Q: ArrayLike, num_queries: int) -> "_Documents":
        names, code_Q = np.unique(np.asarray(document_Q), return_inverse=True)
        if len(code_Q) != num_queries or not num_queries:
            raise ValueError(
                f"documents: {len(code_Q)} for {num_queries} queries; each query needs its own"
            )
        return cls(len(names), code_Q, np.bincount(code_Q).astype(np.float64))

    def sums(self, value_QF: Float64Array) -> Float64Array:
        """Return the sum of each column over each document, (M, F)."""
        columns = [np.bincount(self.code_Q, value_Q, self.num) for value_Q in value_QF.T]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class _Bootstrap:
    """Resamples of documents, drawn in blocks, so that they are never all in memory."""

    num_documents: int
    resamples: int
    seed: int

    def weights(self) -> Iterator[Float64Array]:
        """Yield how often each resample draws each document, (B, M), B resamples at a time."""
        if self.resamples * self.num_documents <= KEPT_VALUES:
            yield _kept_weights(self)
        else:
            yield from _drawn_weights(self)

    def means(self, sum_MF: Float64Array, size_M: Float64Array) -> Float64Array:
        """Return the resampled means of columns with these sums over documents, (S, F).

        Each resample is summed separately along the documents: the rounding of a matrix product
        would depend on the block size.
        """
        blocks = []
        for weight_BM in self.weights():
            num_B = (weight_BM * size_M).sum(axis=1)
            total_FB = [(weight_BM * sum_M).sum(axis=1) for sum_M in sum_MF.T]
            blocks.append(np.stack(total_FB, axis=1) / num_B[:, None])
        return np.concatenate(blocks)


def _drawn_weights(bootstrap: _Bootstrap) -> Iterator[Float64Array]:
    num = bootstrap.num_documents
    random = generator(bootstrap.seed, "bootstrap")
    height = max(1, BLOCK_VALUES // num)
    for begin in range(0, bootstrap.resamples, height):
        lines = min(height, bootstrap.resamples - begin)
        drawn_BM = random.integers(num, size=(lines, num))
        drawn_BM += np.arange(lines)[:, None] * num  # one index range per resample
        count = np.bincount(drawn_BM.ravel(), minlength=lines * num)
        yield count.reshape(lines, num).astype(np.float64)


def _sign_flip_p(sum_M: Float64Array, seed: int) -> float:
    """Return the two-sided p-value of sums by document under random signs.

    All 2^M patterns of signs if RESAMPLES cover them, else RESAMPLES - 1 random ones and the
    observed one (Phipson & Smyth, arXiv 1603.05766).
    """
    is_exact = 2 ** len(sum_M) <= RESAMPLES
    rounding = 1e-12 * np.abs(sum_M).sum()
    least = abs(sum_M.sum()) - rounding
    num_patterns, num_reached = 0, 0 if is_exact else 1
    for flipped_BM in _exact_flips(len(sum_M)) if is_exact else _random_flips(len(sum_M), seed):
        total_B = np.where(flipped_BM, -sum_M, sum_M).sum(axis=1)
        num_reached += int((np.abs(total_B) >= least).sum())
        num_patterns += len(total_B)
    return num_reached / (num_patterns if is_exact else RESAMPLES)


def _exact_flips(num_documents: int) -> Iterator[NDArray[np.bool_]]:
    pattern = np.arange(2**num_documents)[:, None]
    yield (pattern >> np.arange(num_documents) & 1).astype(bool)


def _random_flips(num_documents: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Yield which documents change their sign, (B, M), B patterns at a time.

    Random bytes come in words of four, so a pattern of whole words is the same for any block size.
    """
    random = generator(seed, "sign flips")
    height = max(1, BLOCK_VALUES // num_documents)
    width = 4 * -(-num_documents // 32)
    for begin in range(0, RESAMPLES - 1, height):
        num = min(height, RESAMPLES - 1 - begin)
        packed = np.frombuffer(random.bytes(width * num), np.uint8).reshape(num, width)
        yield np.unpackbits(packed, axis=1, count=num_documents).astype(bool)


@lru_cache(maxsize=2)
def _kept_weights(bootstrap: _Bootstrap) -> Float64Array:
    weight_SM = np.concatenate(list(_drawn_weights(bootstrap)))
    weight_SM.flags.writeable = False
    return weight_SM


def _percentiles(statistic_S: Float64Array) -> list[float]:
    low, high = np.quantile(statistic_S, [LEVEL / 2, 1 - LEVEL / 2])
    return [float(low), float(high)]


def _median_interval(
    rank_Q: Float64Array, documents: _Documents, bootstrap: _Bootstrap
) -> list[float]:
    """Return the percentile interval of the median without computing a median.

    The resampled median is at most r if half of the drawn queries rank at r or better. The share of
    such resamples grows with r, so the bounds are found by bisection, with several r per pass.
    """
    value_R = np.unique(rank_Q)
    shares = (LEVEL / 2, 1 - LEVEL / 2)
    ranges = [(0, len(value_R) - 1) for _ in shares]  # the place of each bound lies within
    while any(first < last for first, last in ranges):
        probe_P = np.unique([np.linspace(*ends, PROBES + 2, dtype=int)[:-1] for ends in ranges])
        reached_P = _shares_reached(value_R[probe_P], rank_Q, documents, bootstrap)
        for bound, share in enumerate(shares):
            first, last = ranges[bound]
            enough = probe_P[(reached_P >= share) & (probe_P < last)]
            short = probe_P[(reached_P < share) & (probe_P >= first)]
            ranges[bound] = (max([first, *(short + 1)]), min([last, *enough]))
    return [float(value_R[first]) for first, _ in ranges]


def _shares_reached(
    value_P: Float64Array, rank_Q: Float64Array, documents: _Documents, bootstrap: _Bootstrap
) -> Float64Array:
    """Return the share of resamples in which half of the queries rank at each value or better."""
    within_MP = documents.sums((rank_Q[:, None] <= value_P).astype(np.float64))
    num_reached_P = np.zeros(len(value_P))
    for weight_BM in bootstrap.weights():
        half_B1 = (weight_BM @ documents.size_M)[
            :, None
        ] / 2  # whole numbers: sums are exact in any order
        num_reached_P += (weight_BM @ within_MP >= half_B1).sum(axis=0)
    return num_reached_P / bootstrap.resamples
