"""Intervals, tests by document hold what they promise."""

import numpy as np
import pytest
from scipy import stats

from lvm.evaluation import metrics
from lvm.evaluation.metrics import (
    FIGURES,
    document_interval,
    figures,
    hit_at,
    holm,
    paired_difference,
    smallest_detectable,
    smallest_p,
)


def clustered(seed: int, num_documents: int = 40, spread: float = 1.0):
    """Return ranks that differ by document, the document of each query."""
    random = np.random.default_rng(seed)
    size = random.integers(2, 30, num_documents)
    level = np.repeat(random.normal(1.5, spread, num_documents), size)
    rank_Q = 1 + np.floor(np.exp(level + random.normal(0, 1, len(level))))
    return rank_Q, np.repeat(np.arange(num_documents), size)


def test_interval_equals_scipys_bootstrap():
    rank_Q, document_Q = clustered(0)
    hit_M = np.bincount(document_Q, hit_at(rank_Q, 5))
    size_M = np.bincount(document_Q)
    expected = stats.bootstrap(
        (hit_M, size_M),
        lambda hits, sizes, axis: hits.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    found = document_interval(rank_Q, document_Q, seed=0)
    assert tuple(found) == FIGURES
    assert found["hit_at_5"] == pytest.approx([expected.low, expected.high], abs=0.01)


def test_median_interval_equals_resampled_medians():
    rank_Q, document_Q = clustered(1)
    random = np.random.default_rng(0)
    groups = [rank_Q[document_Q == code] for code in range(40)]
    medians = [
        np.median(np.concatenate([groups[code] for code in random.integers(40, size=40)]))
        for _ in range(3000)
    ]
    low, high = document_interval(rank_Q, document_Q, seed=0)["median_rank"]
    assert low == pytest.approx(np.quantile(medians, 0.025), abs=1)
    assert high == pytest.approx(np.quantile(medians, 0.975), abs=1)


def test_intervals_hold_the_figures_whatever_the_order_or_names():
    rank_Q, document_Q = clustered(2)
    found = document_interval(rank_Q, document_Q, seed=3)
    for name, value in figures(rank_Q).items():
        assert found[name][0] <= value <= found[name][1]
    order = np.random.default_rng(0).permutation(len(rank_Q))
    names = np.array([f"document {code:03}" for code in document_Q])
    shuffled = document_interval(rank_Q[order], names[order], seed=3)
    assert all(shuffled[name] == pytest.approx(found[name]) for name in FIGURES)


@pytest.mark.slow
def test_neither_interval_nor_p_depends_on_the_size_of_a_block(monkeypatch):
    rank_Q, document_Q = clustered(8, num_documents=50)

    def measured():
        metrics._kept_weights.cache_clear()
        difference = paired_difference(1 / rank_Q, 1 / rank_Q[::-1], document_Q, seed=1)
        return document_interval(rank_Q, document_Q, seed=1), difference

    expected = measured()
    monkeypatch.setattr(metrics, "KEPT_VALUES", 0)
    for block_values in (1, 50 * 7, 50 * 4096, 10**9):
        monkeypatch.setattr(metrics, "BLOCK_VALUES", block_values)
        assert measured() == expected


def test_p_equals_scipys_permutation_test():
    for seed in range(3):
        sum_M = np.random.default_rng(seed).normal(0.15, 1, 60)
        expected = stats.permutation_test(
            (sum_M,),
            lambda sums, axis: sums.sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=50_000,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
        found = paired_difference(sum_M, np.zeros(60), np.arange(60), seed=0).p_value
        assert found == pytest.approx(expected, abs=0.02)
    few_M = np.random.default_rng(9).normal(0.5, 1, 9)
    exact = stats.permutation_test(
        (few_M,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    found = paired_difference(few_M, np.zeros(9), np.arange(9), seed=0).p_value
    assert found == pytest.approx(exact)


def test_queries_of_one_document_count_as_one():
    rank_Q, document_Q = clustered(4, num_documents=30)
    alone = document_interval(rank_Q, np.arange(len(rank_Q)), seed=0)["hit_at_5"]
    repeated = document_interval(
        np.repeat(rank_Q, 9), np.repeat(np.arange(len(rank_Q)), 9), seed=0
    )["hit_at_5"]
    assert repeated == pytest.approx(alone)
    clusters = document_interval(rank_Q, document_Q, seed=0)["hit_at_5"]
    assert clusters[1] - clusters[0] > 1.2 * (alone[1] - alone[0])


@pytest.mark.slow
def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    truth = np.mean([figures(clustered(seed, 400)[0])["hit_at_5"] for seed in range(30)])
    held = 0
    for seed in range(200):
        rank_Q, document_Q = clustered(1000 + seed)
        low, high = document_interval(rank_Q, document_Q, seed=0, resamples=1000)["hit_at_5"]
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99


def test_one_document_gives_no_interval():
    found = document_interval([1, 2, 3], [7, 7, 7], seed=0)
    assert all(np.isnan(bounds).all() for bounds in found.values())
    difference = paired_difference([1, 1], [0, 0], [7, 7], seed=0)
    assert (difference.mean, difference.p_value, difference.num_documents) == (1, 1, 1)
    assert np.isnan([difference.low, difference.high]).all()
    assert np.isnan(smallest_detectable([1, 0], [7, 7]))


def test_a_real_difference_is_found():
    random = np.random.default_rng(5)
    document_Q = np.repeat(np.arange(100), 20)
    worse = random.random(2000) < 0.10
    better = worse | (random.random(2000) < 0.05)
    found = paired_difference(better, worse, document_Q, seed=0)
    assert found.mean == pytest.approx(better.mean() - worse.mean())
    assert 0 < found.low < found.mean < found.high
    assert found.p_value < 0.001
    assert found.num_documents == 100
    reverse = paired_difference(worse, better, document_Q, seed=0)
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))


def test_no_difference_is_seldom_called_one():
    random = np.random.default_rng(6)
    document_Q = np.repeat(np.arange(30), 10)
    p_values = []
    for _ in range(100):
        shift = np.repeat(random.normal(0, 0.3, 30), 10)
        value_Q = random.normal(0, 1, 300) + shift
        p_values.append(paired_difference(value_Q, np.zeros(300), document_Q, seed=0).p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.12


def test_sign_flips_are_exact_for_few_documents():
    found = paired_difference([1, 2, 3], [0, 0, 0], ["a", "b", "c"], seed=0)
    assert found.p_value == pytest.approx(2 / 8)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, np.nan])


def test_smallest_detectable_difference_is_found_with_its_power():
    random = np.random.default_rng(7)
    document_Q = np.repeat(np.arange(50), 8)

    def draw(shift: float) -> np.ndarray:
        return random.normal(shift, 1, 400) + np.repeat(random.normal(0, 0.5, 50), 8)

    effect = np.mean([smallest_detectable(draw(0), document_Q) for _ in range(20)])
    found = []
    for _ in range(300):
        value_Q = draw(effect).reshape(50, 8).mean(axis=1)
        found.append(stats.ttest_1samp(value_Q, 0).pvalue < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="documents: 2 for 3 queries"):
        document_interval([1, 2, 3], [0, 1], seed=0)
    with pytest.raises(ValueError, match="finite"):
        paired_difference([np.nan, 1], [0, 0], [0, 1], seed=0)


@pytest.mark.parametrize("num_documents", [1, 2, 8, 13, 20])
def test_the_smallest_p_is_the_one_that_a_full_win_gets(num_documents):
    one_Q = np.ones(num_documents)
    found = paired_difference(one_Q, 0 * one_Q, np.arange(num_documents), seed=0)
    assert found.p_value == smallest_p(num_documents)
