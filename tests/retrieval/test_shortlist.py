"""Shortlists hold what exact ranks put first; ranks anew move the truth alone inside its list."""

import numpy as np
import pytest

from lvm.bank.bank import Bank
from lvm.retrieval.exact import exact_ranks, top_rows
from lvm.retrieval.rerank import Shortlist, reranked_ranks, shortlist
from lvm.windows.planning import Queries, Windows, context_queries
from tests.retrieval.test_exact import bank, correction, predictions, queries, windows

__all__ = ["bank", "correction", "predictions", "queries", "windows"]
SIZE = 50


@pytest.mark.parametrize("corrected", [False, True])
def test_in_the_order_of_their_scores_the_truths_keep_their_exact_ranks(
    corrected: bool,
    bank: Bank,
    windows: Windows,
    queries: Queries,
    predictions: np.ndarray,
    correction: np.ndarray,
):
    pair_N2 = correction if corrected else None
    groups = windows.representative_N
    (exact,) = exact_ranks(predictions, queries, bank, groups, (pair_N2,))
    listed = shortlist(predictions, queries, bank, groups, pair_N2, SIZE)
    same = reranked_ranks(listed, listed.score_QC, np.full(len(queries), -1.0))
    on_list_Q = listed.is_truth_QC.any(axis=1)
    assert 10 < on_list_Q.sum() < len(queries), "both cases occur"
    sure_Q = on_list_Q & (exact.rank_Q < SIZE)  # a tie across the end of a list is cut
    assert (same[sure_Q] == exact.rank_Q[sure_Q])[1:].all()
    assert (same[~on_list_Q] == -1).all()
    assert (exact.rank_Q[~on_list_Q][1:] > SIZE - 2).all()


def test_a_list_is_the_plain_search_without_the_context(
    bank: Bank, windows: Windows, queries: Queries, predictions: np.ndarray
):
    groups = windows.representative_N
    listed = shortlist(predictions, queries, bank, groups, size=7)
    row_QC = top_rows(predictions, bank, 7, None, queries, groups)[0]
    inside = (listed.row_QC >= queries.first_row_Q[:, None]) & (
        listed.row_QC < queries.target_row_Q[:, None]
    )
    alone = np.bincount(groups, minlength=bank.num_rows)[listed.row_QC] == 1
    assert not (inside & alone).any()
    whole = ~inside.any(axis=1)  # no group that goes on outside of its context
    whole[0] = False  # the zero prediction ties with everything
    assert whole.sum() > 60
    assert (listed.row_QC == row_QC)[whole].mean() > 0.99


def test_recorded_contexts_remove_exactly_their_rows(
    bank: Bank, windows: Windows, queries: Queries, predictions: np.ndarray
):
    target_row_Q = queries.target_row_Q
    first = shortlist(predictions, queries, bank, windows.representative_N, size=3)
    best = [np.flatnonzero(windows.representative_N == rows[0]) for rows in first.row_QC]
    recorded = context_queries(target_row_Q, queries.sequence_start_Q, best)
    found = shortlist(predictions, recorded, bank, windows.representative_N, size=5)
    lists = zip(found.row_QC, best, strict=True)
    assert not any(rows[0] in listed for listed, rows in lists)


def test_reranked_ranks_count_better_ones_with_half_of_the_ties():
    listed = Shortlist(
        row_QC=np.array([[4, 7, 9, -1], [4, 7, 9, 2]]),
        score_QC=np.zeros((2, 4), np.float32),
        is_truth_QC=np.array([[False, True, False, False], [False] * 4]),
    )
    score_QC = np.array([[3.0, 2.0, 2.0, -np.inf], [1.0, 2.0, 3.0, 4.0]], np.float32)
    assert reranked_ranks(listed, score_QC, np.array([40.0, 500.0])).tolist() == [2.5, 500.0]
