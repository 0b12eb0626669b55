"""Measurements from recorded contexts: their last ctx rows are read, exactly they are removed."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from lvm.bank.bank import Bank
from lvm.models.baselines import ContextMean, CopyLast
from lvm.models.facts import facts_of
from lvm.models.predict import predict_contexts
from lvm.models.table import build_model
from lvm.retrieval.exact import exact_ranks
from lvm.shadow.replay import Candidate, Questions, measure, measure_here, predict, timed_queries
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows, context_queries, make_queries
from tests import reference
from tests.models.test_models import TOY_SIZES


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 20)


@pytest.fixture(scope="module")
def contexts(tiny_bank: Bank) -> list[np.ndarray]:
    """Contexts of six lengths, from anywhere in the bank, in any order, some rows repeated."""
    random = np.random.default_rng(0)
    lengths = [1, 2, 2, 9, 9, 30, 30, 30, 4, 90]
    found = [random.integers(0, tiny_bank.num_rows, length) for length in lengths]
    found[3][:2] = found[3][0]
    return [rows.astype(np.int64) for rows in found]


@pytest.fixture(scope="module")
def queries(tiny_bank: Bank, contexts: list[np.ndarray]):
    used = np.concatenate(contexts)
    free = np.setdiff1d(np.arange(tiny_bank.num_rows), used)
    target_row_Q = np.random.default_rng(1).choice(free, len(contexts), replace=False)
    return context_queries(target_row_Q, tiny_bank.sequence_start_N()[target_row_Q], contexts)


@pytest.mark.parametrize("name", ["copy-last", "ema", "memory_gru"])
def test_each_context_is_read_alone_and_whole(tiny_bank, queries, contexts, name):
    model = build_model({"model": name, "dim": tiny_bank.dim} | TOY_SIZES.get(name, {}))
    prediction_QD = predict(model, tiny_bank, queries)
    for prediction_D, rows in zip(prediction_QD, contexts, strict=True):
        alone_1D = predict_contexts(model, tiny_bank.unit(rows)[None])
        np.testing.assert_allclose(prediction_D, alone_1D[0], atol=2e-6)


def test_exactly_the_rows_of_the_context_are_removed(tiny_bank, windows, queries, contexts):
    noise = np.random.default_rng(2).standard_normal((len(queries), tiny_bank.dim))
    prediction_QD = noise.astype(np.float32)
    representative_N = windows.representative_N
    ranks = exact_ranks(prediction_QD, queries, tiny_bank, representative_N)[0]
    nothing = make_queries(queries.query_Q, queries.target_row_Q, queries.target_row_Q, 1)
    _, raw = reference.ranks(prediction_QD, nothing, tiny_bank, representative_N)
    assert np.array_equal(ranks.rank_raw_Q, raw)
    for place, rows in enumerate(contexts):
        inside = np.isin(np.arange(tiny_bank.num_rows), rows)
        whole = [
            group
            for group in np.unique(representative_N[rows])
            if inside[representative_N == group].all()
        ]
        unit_ND = tiny_bank.unit(slice(None)).astype(np.float64)
        score_N = unit_ND @ (noise[place] / np.linalg.norm(noise[place]))
        truth = score_N[representative_N[queries.target_row_Q[place]]]
        better = sum(score_N[group] > truth + 1e-6 for group in whole)
        assert ranks.rank_Q[place] == raw[place] - better
    assert (ranks.rank_Q < ranks.rank_raw_Q).any()


def test_a_twin_outside_the_context_keeps_its_group_in_the_ranking(tiny_bank, windows):
    rows, counts = np.unique(windows.representative_N, return_counts=True)
    group = rows[counts == 2][0]
    first, second = np.flatnonzero(windows.representative_N == group)
    target = np.setdiff1d(np.arange(50), [first, second])[:1]
    start = tiny_bank.sequence_start_N()[target]
    alone = context_queries(target, start, [np.array([first])])
    both = context_queries(target, start, [np.array([second, first])])
    prediction_1D = tiny_bank.unit(np.array([first]))
    found = [
        exact_ranks(prediction_1D, one, tiny_bank, windows.representative_N)[0]
        for one in (alone, both)
    ]
    assert found[0].rank_Q[0] == found[0].rank_raw_Q[0]
    assert found[1].rank_Q[0] == found[1].rank_raw_Q[0] - 1
    assert found[0].top_row_Q[0] == group and found[1].top_row_Q[0] != group


def test_a_recorded_run_of_rows_is_the_frozen_query(tiny_bank, windows):
    frozen = windows.queries["test"].head(30)
    contexts = [
        np.arange(first, target)
        for first, target in zip(frozen.first_row_Q, frozen.target_row_Q, strict=True)
    ]
    recorded = context_queries(frozen.target_row_Q, frozen.sequence_start_Q, contexts)
    model, groups = CopyLast(tiny_bank.dim), windows.representative_N
    expected = measure(model, Questions(tiny_bank, groups, frozen, frozen)).ranks
    found = measure(model, Questions(tiny_bank, groups, recorded, recorded)).ranks
    for column in ("rank", "rank_raw", "top_row", "target_row"):
        assert found[column].tolist() == expected[column].tolist()


def test_a_context_beyond_ctx_is_read_as_served_and_removed_whole(tiny_bank, windows, queries):
    facts = dataclasses.replace(facts_of("context-mean", "none", tiny_bank, windows), ctx=9)
    model, groups = ContextMean(tiny_bank.dim), windows.representative_N
    asked = Questions(tiny_bank, groups, queries, queries).read_by(9)
    found = measure_here(Candidate("mean", model, facts), asked).ranks
    last = [bank_rows[-9:] for bank_rows in queries.context_row_Q]
    cut = [predict_contexts(model, tiny_bank.unit(rows)[None])[0] for rows in last]
    (expected,) = exact_ranks(np.stack(cut), queries, tiny_bank, groups)
    assert found["rank"].tolist() == expected.rank_Q.tolist()
    assert found["rank_raw"].tolist() == expected.rank_raw_Q.tolist()


def test_the_clock_runs_over_contexts_of_the_recorded_lengths(tiny_bank, queries):
    timed = timed_queries(queries, tiny_bank)
    assert (timed.target_row_Q - timed.first_row_Q).tolist() == queries.num_rows().tolist()
    lengths = []

    class Counted(nn.Module):
        def forward(self, context_BTD: torch.Tensor) -> torch.Tensor:
            lengths.append(context_BTD.shape[1])
            return context_BTD

    model, groups = Counted(), np.arange(tiny_bank.num_rows)
    found = measure(model, Questions(tiny_bank, groups, queries, queries))
    assert lengths[-len(queries) :] == queries.num_rows().tolist()
    assert set(found.latency_ms) == {"p50", "p95"} and found.seconds > 0


def test_predictions_that_are_not_finite_are_counted(tiny_bank, windows, queries):
    class Broken(nn.Module):
        def forward(self, context_BTD: torch.Tensor) -> torch.Tensor:
            is_long = context_BTD.shape[1] > 9
            return context_BTD * (float("nan") if is_long else 1.0)

    groups = windows.representative_N
    found = measure(Broken(), Questions(tiny_bank, groups, queries, queries))
    assert found.ranks is None and found.num_non_finite == 4
