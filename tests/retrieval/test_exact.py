"""Exact ranks equal the slow reference, whatever the order or block size."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lvm.bank.bank import Bank, write_bank
from lvm.retrieval import counting, exact
from lvm.retrieval.exact import Ranks, exact_ranks, top_rows
from lvm.retrieval.hubness import mean_neighbour_score, neighbour_penalty
from lvm.system.processes import share_blocks
from lvm.windows.export import plan_windows
from lvm.windows.planning import Queries, Windows, make_queries
from tests import reference
from tests.synthetic import make_bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank of 720 rows with 40 pairs of twins, many inside one sequence."""
    path = tmp_path_factory.mktemp("retrieval") / "bank"
    return make_bank(path, num_sequences=3, num_twins=40)


@pytest.fixture(scope="module")
def windows(bank: Bank) -> Windows:
    return plan_windows(bank, 60)


@pytest.fixture(scope="module")
def queries(bank: Bank) -> Queries:
    """Queries all over the bank, two of them for one target, in no order."""
    origin_N = bank.sequence_start_N()
    has_context = np.flatnonzero(np.arange(bank.num_rows) > origin_N)
    target_row_Q = np.random.default_rng(1).choice(has_context, 90, replace=False)
    target_row_Q[5] = target_row_Q[50]
    return make_queries(np.arange(90), target_row_Q, origin_N[target_row_Q], 60)


@pytest.fixture(scope="module")
def predictions(bank: Bank, queries: Queries) -> np.ndarray:
    """Noisy truths; the first query's is zero, the second's copies its last context row."""
    noise = np.random.default_rng(2).standard_normal((len(queries), bank.dim))
    prediction_QD = bank.unit(queries.target_row_Q) + 0.4 * noise
    prediction_QD[0] = 0
    prediction_QD[1] = bank.unit(queries.target_row_Q[1] - 1)
    return prediction_QD.astype(np.float32)


@pytest.fixture(scope="module")
def correction(bank: Bank) -> np.ndarray:
    random = np.random.default_rng(3)
    scale_N, bias_N = random.uniform(0.5, 1.5, bank.num_rows), random.normal(0, 0.2, bank.num_rows)
    return np.stack([scale_N, bias_N], axis=1).astype(np.float32)


def same(first: Ranks, second: Ranks, order: np.ndarray | slice = slice(None)) -> bool:
    fields = [field.name for field in dataclasses.fields(Ranks)]
    return all(
        np.array_equal(getattr(first, name)[order], getattr(second, name)) for name in fields
    )


def test_ranks_equal_the_reference(bank, windows, queries, predictions, correction):
    found = exact_ranks(predictions, queries, bank, windows.representative_N, (None, correction))
    for ranks, pair_N2 in zip(found, (None, correction), strict=True):
        filtered, raw = reference.ranks(
            predictions, queries, bank, windows.representative_N, pair_N2
        )
        assert np.array_equal(ranks.rank_Q, filtered)
        assert np.array_equal(ranks.rank_raw_Q, raw)
    assert (found[0].rank_Q < found[0].rank_raw_Q).any()
    assert (found[0].rank_Q != found[1].rank_Q).any()


def test_ranks_without_groups_count_twins_as_ties(bank, windows, queries, predictions):
    alone_N = np.arange(bank.num_rows)
    ranks = exact_ranks(predictions, queries, bank, alone_N)[0]
    filtered, raw = reference.ranks(predictions, queries, bank, alone_N)
    assert np.array_equal(ranks.rank_Q, filtered)
    assert np.array_equal(ranks.rank_raw_Q, raw)
    assert (raw % 1 == 0.5).any()


def test_ranks_do_not_depend_on_the_order_of_queries(
    bank, windows, queries, predictions, correction
):
    plain, corrected = exact_ranks(
        predictions, queries, bank, windows.representative_N, (None, correction)
    )
    order = np.random.default_rng(4).permutation(len(queries))
    shuffled = exact_ranks(
        predictions[order], queries.take(order), bank, windows.representative_N, (None, correction)
    )
    assert same(plain, shuffled[0], order)
    assert same(corrected, shuffled[1], order)


@pytest.mark.parametrize(("query_block", "bank_block"), [(1, 100), (7, 13), (64, 719), (200, 800)])
def test_ranks_do_not_depend_on_block_sizes(
    query_block, bank_block, bank, windows, queries, predictions, correction, monkeypatch
):
    expected = exact_ranks(predictions, queries, bank, windows.representative_N, (None, correction))
    monkeypatch.setattr(counting, "QUERY_BLOCK", query_block)
    monkeypatch.setattr(counting, "BANK_BLOCK", bank_block)
    found = exact_ranks(predictions, queries, bank, windows.representative_N, (None, correction))
    assert all(same(*pair) for pair in zip(expected, found, strict=True))


def test_a_zero_prediction_ties_with_every_group(bank, windows, queries, predictions):
    ranks = exact_ranks(predictions, queries, bank, windows.representative_N)[0]
    num_groups = len(np.unique(windows.representative_N))
    assert ranks.rank_raw_Q[0] == (num_groups + 1) / 2


def test_the_length_of_a_prediction_does_not_matter(bank, windows, queries, predictions):
    once = exact_ranks(predictions, queries, bank, windows.representative_N)[0]
    scaled = exact_ranks(4 * predictions, queries, bank, windows.representative_N)[0]
    assert same(once, scaled)


def test_the_truth_itself_ranks_first(bank, windows, queries):
    truth_QD = bank.unit(queries.target_row_Q)
    ranks = exact_ranks(truth_QD, queries, bank, windows.representative_N)[0]
    assert (ranks.rank_raw_Q == 1).all()
    assert (ranks.top_row_Q == queries.target_row_Q).all()


def test_only_groups_wholly_inside_the_context_are_removed(tmp_path: Path):
    vectors = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0.6, 0.8, 0]])
    rows = pd.DataFrame({"sequence": ["s"] * 6})
    bank = write_bank(tmp_path / "bank", vectors, rows, "hand", "test")
    representative_N = np.array([0, 1, 1, 3, 0, 5])
    queries = make_queries(np.arange(1), np.array([3]), np.zeros(1, int), 3)
    prediction_QD = np.array([[0.5, 0.7, 0.1]], np.float32)
    ranks = exact_ranks(prediction_QD, queries, bank, representative_N)[0]
    # better than the truth (row 3): group 0 (its row 4 lies outside the context), group 1, row 5
    assert ranks.rank_raw_Q.tolist() == [4]
    assert ranks.rank_Q.tolist() == [3]
    assert ranks.top_row_Q.tolist() == [5]


def test_top_row_is_the_best_of_the_filtered_ranking(bank, windows, queries, predictions):
    ranks = exact_ranks(predictions, queries, bank, windows.representative_N)[0]
    vector_ND = bank.unit(slice(None)).astype(np.float64)
    for place in range(1, len(queries)):
        target = queries.target_row_Q[place]
        score_N = vector_ND @ predictions[place]
        top = ranks.top_row_Q[place]
        assert (top == target) == (ranks.rank_Q[place] < 2 and ranks.rank_Q[place] % 1 in (0, 0.5))
        beaten = np.sum(score_N > score_N[top] + 1e-6)
        inside = np.arange(queries.first_row_Q[place], target)
        assert beaten <= np.sum(score_N[inside] > score_N[top] + 1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_refused(value, bank, windows, queries, predictions):
    broken = predictions.copy()
    broken[3, 1] = value
    with pytest.raises(ValueError, match="1 of 90 are not finite, first number 3"):
        exact_ranks(broken, queries, bank, windows.representative_N)
    with pytest.raises(ValueError, match="not finite"):
        top_rows(broken, bank, 3)


def test_wrong_shapes_are_refused(bank, windows, queries, predictions, correction):
    with pytest.raises(ValueError, match=r"predictions: shape \(89, 16\)"):
        exact_ranks(predictions[1:], queries, bank, windows.representative_N)
    for broken in (correction[1:], np.full_like(correction, np.nan)):
        with pytest.raises(ValueError, match="row correction: shape"):
            exact_ranks(predictions, queries, bank, windows.representative_N, (broken,))
    for k in (0, bank.num_rows + 1):
        with pytest.raises(ValueError, match="k: "):
            top_rows(predictions, bank, k)


@pytest.mark.parametrize("top_block", [50, 16384])
def test_top_rows_equal_the_reference(
    top_block, bank, queries, predictions, correction, monkeypatch
):
    monkeypatch.setattr(exact, "TOP_BLOCK", top_block)
    some, asked = predictions[1:40], queries.take(slice(1, 40))
    row_QK, score_QK = top_rows(some, bank, 15, correction, asked)
    assert row_QK.tolist() == reference.top_rows(some, bank, 15, correction, asked)
    assert (np.diff(score_QK) <= 0).all()
    plain_QK, _ = top_rows(some, bank, 5)
    expected = np.array(reference.top_rows(some, bank, 5))
    unit_ND = bank.unit(slice(None))  # twins may stand in either order
    assert np.array_equal(unit_ND[plain_QK], unit_ND[expected])


def test_top_rows_fill_up_where_the_context_leaves_too_few(bank, predictions):
    queries = make_queries(np.arange(1), np.array([239]), np.zeros(1, int), 239)
    row_QK, score_QK = top_rows(predictions[1:2], bank, 500, exclude=queries)
    assert (row_QK[0] >= 0).sum() == bank.num_rows - 239
    assert (row_QK[0, bank.num_rows - 239 :] == -1).all()
    assert (score_QK[0, bank.num_rows - 239 :] == -np.inf).all()


@pytest.mark.parametrize("num_predictions", [10, 128, 333])
def test_mean_neighbour_score_equals_the_reference(num_predictions, bank, predictions):
    train_PD = np.random.default_rng(5).standard_normal((num_predictions, bank.dim))
    found = mean_neighbour_score(train_PD.astype(np.float32), bank)
    assert np.allclose(found, reference.mean_neighbour_score(train_PD, bank, 10), atol=1e-6)
    pair_N2 = neighbour_penalty(found, beta=0.5)
    assert (pair_N2[:, 0] == 1).all()
    assert np.allclose(pair_N2[:, 1], -0.5 * found)
    with pytest.raises(ValueError, match="neighbours: 10 of only 9"):
        mean_neighbour_score(train_PD[:9].astype(np.float32), bank)


def test_share_blocks_hands_out_each_block_once():
    before = torch.get_num_threads()
    found = share_blocks(list, range(0, 1000, 7), "list")
    assert sorted(start for part in found for start in part) == list(range(0, 1000, 7))
    assert torch.get_num_threads() == before


def test_share_blocks_stops_all_workers_when_one_fails():
    before = torch.get_num_threads()

    def fail_at_100(starts):
        for start in starts:
            if start == 100:
                raise RuntimeError(f"block {start}")

    with pytest.raises(RuntimeError, match="block 100"):
        share_blocks(fail_at_100, range(10**12), "fail")
    assert torch.get_num_threads() == before
