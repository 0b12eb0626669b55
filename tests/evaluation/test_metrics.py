"""Figures equal their definitions, ir_measures, counting by hand."""

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import RR, Qrel, ScoredDoc, Success

from lvm.evaluation.metrics import (
    FIGURES,
    contrastive_accuracy,
    copy_ratio,
    figures,
    hit_at,
    per_query,
    pool_hit_at,
    reciprocal_rank_at,
    soft_hit_at,
)
from tests import reference

half_ranks = st.integers(2, 60).map(lambda twice: twice / 2)


@given(st.lists(half_ranks, min_size=1, max_size=40))
def test_figures_equal_the_reference(ranks: list[float]):
    found, expected = figures(ranks), reference.figures(ranks)
    assert tuple(found) == FIGURES
    assert found == pytest.approx(expected)
    assert per_query(ranks).mean(axis=0) == pytest.approx(list(expected.values())[:4])


def test_figures_equal_ir_measures():
    random = np.random.default_rng(0)
    ranks = random.integers(1, 20, 50)
    qrels = [Qrel(str(query), "truth", 1) for query in range(50)]
    run = []
    for query, rank in enumerate(ranks):
        names = [f"other-{place}" for place in range(25)]
        names.insert(rank - 1, "truth")
        run += [ScoredDoc(str(query), name, -place) for place, name in enumerate(names)]
    measures = {
        "hit_at_1": Success @ 1,
        "hit_at_5": Success @ 5,
        "hit_at_10": Success @ 10,
        "mrr_at_10": RR @ 10,
    }
    expected = ir_measures.calc_aggregate(measures.values(), qrels, run)
    found = figures(ranks)
    for name, measure in measures.items():
        assert found[name] == pytest.approx(expected[measure])


def test_order_does_not_matter():
    ranks = np.random.default_rng(1).integers(1, 30, 100)
    assert figures(ranks) == pytest.approx(figures(ranks[::-1]))


def test_a_tie_costs_half_a_rank():
    assert hit_at([1, 1.5, 5, 5.5], 5).tolist() == [1, 1, 1, 0]
    assert hit_at([1, 1.5], 1).tolist() == [1, 0]
    assert reciprocal_rank_at([1, 1.5, 10.5]).tolist() == [1, 1 / 1.5, 0]


@pytest.mark.parametrize("ranks", [[1.0, np.nan], [0.5], [], [[1.0]]])
def test_impossible_ranks_are_refused(ranks: list):
    for measure in (figures, lambda r: hit_at(r, 5), reciprocal_rank_at):
        with pytest.raises(ValueError, match="ranks: "):
            measure(ranks)


@pytest.mark.parametrize("pool", [1, 2, 5, 11, 12])
@pytest.mark.parametrize("k", [1, 3])
def test_pool_figure_equals_counting_all_draws(pool: int, k: int):
    ranks = [1, 2, 5, 12]
    assert pool_hit_at(ranks, pool, 12, k) == pytest.approx(
        reference.pool_hit_at(ranks, pool, 12, k)
    )


def test_pool_of_all_candidates_is_the_whole_bank():
    ranks = np.array([1, 3, 6, 40, 100])
    assert pool_hit_at(ranks, 100, 100, 5) == pytest.approx(figures(ranks)["hit_at_5"])
    assert pool_hit_at(ranks, 5, 100, 5) == 1
    halves = [pool_hit_at([r], 20, 100, 1) for r in (3, 3.5, 4)]
    assert halves[1] == pytest.approx((halves[0] + halves[2]) / 2)
    for pool in (0, 101):
        with pytest.raises(ValueError, match=f"pool: {pool} of 100"):
            pool_hit_at(ranks, pool, 100, 5)


def test_contrastive_accuracy_runs_from_0_to_1():
    assert contrastive_accuracy([1], 11) == 1
    assert contrastive_accuracy([11], 11) == 0
    assert contrastive_accuracy([6], 11) == 0.5


def test_copy_ratio_tells_a_copier():
    random = np.random.default_rng(2)
    last = random.standard_normal((200, 8))
    last /= np.linalg.norm(last, axis=1, keepdims=True)
    truth = last + 0.5 * random.standard_normal((200, 8))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    assert copy_ratio(truth, last, truth) == pytest.approx(1)
    assert copy_ratio(last, last, truth) == pytest.approx(1 / np.mean(np.sum(last * truth, 1)))
    assert np.isnan(copy_ratio(last, last, -truth))


def test_soft_hits_are_a_half_at_rank_k_and_fall_with_the_rank():
    soft = soft_hit_at([1, 5, 10, 1000], 5)
    assert soft == pytest.approx([25 / 26, 0.5, 0.2, 25 / (25 + 1e6)])
    with pytest.raises(ValueError, match="below 1"):
        soft_hit_at([0.0], 5)
