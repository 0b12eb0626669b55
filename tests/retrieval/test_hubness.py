"""The correction reads train rows, is chosen on val, lowers hubs."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lvm.bank.bank import Bank
from lvm.evaluation.free_predictors import fit_nearest_successor
from lvm.models.baselines import CopyLast, MovingAverage
from lvm.models.facts import omits_own_document
from lvm.models.predict import on_train_rows, predict_queries
from lvm.models.weights import FIT_VERSION
from lvm.retrieval import hubness
from lvm.retrieval.exact import exact_ranks, selection_score
from lvm.retrieval.hubness import (
    BETAS,
    fit_hubness,
    mean_neighbour_score,
    neighbour_penalty,
    train_positions,
)
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 30)


class Constant(nn.Module):
    """Predicts one vector, whatever it reads."""

    def __init__(self, vector_D: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector_D", vector_D)

    def forward(self, context_BTD: Tensor) -> Tensor:
        return self.vector_D.expand(*context_BTD.shape)


def test_positions_are_targets_of_train_windows(tiny_bank: Bank, windows: Windows):
    positions = train_positions(tiny_bank, windows, seed=0)
    assert len(positions) > 500
    assert (windows.split_N[positions.target_row_Q] == 0).all()
    assert (windows.split_N[positions.first_row_Q] == 0).all()
    start_W, rows_W = windows.train_windows()
    cuts = dict(zip(start_W.tolist(), rows_W.tolist(), strict=True))
    for first, target in zip(positions.first_row_Q, positions.target_row_Q, strict=True):
        assert cuts[int(first)] // 2 < target - first <= cuts[int(first)]
    again = train_positions(tiny_bank, windows, seed=0)
    assert np.array_equal(again.target_row_Q, positions.target_row_Q)


def test_pinned_rows_are_no_positions_where_there_are_others(tiny_bank: Bank, windows: Windows):
    pinned_N = windows.split_N == 0
    pinned_N &= tiny_bank.sequence_N != 2
    chained = dataclasses.replace(tiny_bank, pinned_N=pinned_N)
    positions = train_positions(chained, windows, seed=0)
    assert set(tiny_bank.sequence_N[positions.target_row_Q]) == {2}
    everything = dataclasses.replace(tiny_bank, pinned_N=windows.split_N == 0)
    same = train_positions(tiny_bank, windows, seed=0)
    found = train_positions(everything, windows, seed=0)
    assert np.array_equal(found.target_row_Q, same.target_row_Q)


def test_positions_are_bounded(tiny_bank: Bank, windows: Windows, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hubness, "MAX_POSITIONS", 50)
    monkeypatch.setattr(hubness, "MAX_ROWS_READ", 95)
    positions = train_positions(tiny_bank, windows, seed=0)
    assert len(positions) <= 50
    assert len(np.unique(positions.first_row_Q)) == 3


def test_beta_is_the_best_on_val(tiny_bank: Bank, windows: Windows):
    model = MovingAverage(tiny_bank.dim, 0.5)
    found = fit_hubness(model, tiny_bank, windows)
    queries = windows.queries["val"]
    prediction_QD = predict_queries(model, tiny_bank, queries)
    positions = train_positions(tiny_bank, windows, 0)
    train_PD = predict_queries(model, tiny_bank, positions)
    document_P = tiny_bank.document_N[positions.target_row_Q]
    mean_N = mean_neighbour_score(train_PD, tiny_bank, document_P=document_P)
    scores = {}
    for beta in BETAS:
        pair_N2 = neighbour_penalty(mean_N, beta)
        ranks = exact_ranks(prediction_QD, queries, tiny_bank, windows.representative_N, [pair_N2])
        scores[beta] = selection_score(ranks[0].rank_Q)
    assert scores[found.beta] == max(scores.values())
    expected = neighbour_penalty(mean_N, found.beta)
    assert np.allclose(found.row_correction, expected, atol=1e-6)


def test_test_queries_do_not_choose_beta(tiny_bank: Bank, windows: Windows):
    model = CopyLast(tiny_bank.dim)
    val = windows.queries["val"]
    blind = dataclasses.replace(windows, queries={"val": val, "test": val.head(1)})
    first, second = fit_hubness(model, tiny_bank, windows), fit_hubness(model, tiny_bank, blind)
    assert first.beta == second.beta
    assert np.array_equal(first.row_correction, second.row_correction)


def test_without_a_gain_beta_stays_0(tiny_bank: Bank, windows: Windows):
    val = windows.queries["val"].head(1)
    blind = dataclasses.replace(windows, queries={"val": val, "test": val})
    truth = Constant(torch.from_numpy(tiny_bank.unit(val.target_row_Q)[0]))
    assert fit_hubness(truth, tiny_bank, blind).beta == 0


def test_a_predictor_that_stores_train_rows_is_asked_without_them(tiny_bank, windows, monkeypatch):
    monkeypatch.setattr(hubness, "BETAS", (1.0,))
    model = fit_nearest_successor(tiny_bank, windows)
    found = fit_hubness(model, tiny_bank, windows).row_correction
    positions = train_positions(tiny_bank, windows, 0)
    document_P = tiny_bank.document_N[positions.target_row_Q]
    predicted = [
        predict_queries(one, tiny_bank, positions) for one in (on_train_rows(model), model)
    ]
    honest, leaked = (
        neighbour_penalty(mean_neighbour_score(train_PD, tiny_bank, document_P=document_P), 1.0)
        for train_PD in predicted
    )
    assert np.allclose(found, honest, atol=1e-6)
    assert not np.allclose(found, leaked, atol=1e-2)


def test_predictions_of_a_rows_own_document_are_left_out(tiny_bank: Bank, windows: Windows):
    model = MovingAverage(tiny_bank.dim, 0.5)
    positions = train_positions(tiny_bank, windows, 0)
    train_PD = predict_queries(model, tiny_bank, positions)
    document_P = tiny_bank.document_N[positions.target_row_Q]
    found_N = mean_neighbour_score(train_PD, tiny_bank, document_P=document_P)
    unit_ND = tiny_bank.unit(slice(None)).astype(np.float64)
    for row in range(0, tiny_bank.num_rows, 7):
        others = document_P != tiny_bank.document_N[row]
        nearest = np.sort(train_PD[others].astype(np.float64) @ unit_ND[row])[-10:]
        assert found_N[row] == pytest.approx(nearest.mean(), abs=1e-5)
    counted_N = mean_neighbour_score(train_PD, tiny_bank)
    is_train_N = windows.split_N == 0
    assert (found_N <= counted_N + 1e-6).all()
    assert np.allclose(found_N[~is_train_N], counted_N[~is_train_N], atol=1e-6)
    assert (found_N < counted_N - 1e-3)[is_train_N].mean() > 0.5


def test_a_row_whose_document_has_all_predictions_gets_the_mean_of_the_others(tiny_bank: Bank):
    train_PD = tiny_bank.unit(slice(0, 12))
    own = tiny_bank.document_N[0]
    found_N = mean_neighbour_score(train_PD, tiny_bank, 10, np.full(12, own))
    is_own_N = tiny_bank.document_N == own
    assert np.allclose(found_N[is_own_N], found_N[~is_own_N].mean(), atol=1e-6)
    few_N = mean_neighbour_score(train_PD, tiny_bank, 10, np.where(np.arange(12) < 9, own, own + 1))
    expected = (tiny_bank.unit(slice(0, 1)) @ train_PD[9:].T).mean()
    assert few_N[0] == pytest.approx(expected, abs=1e-6)


def test_models_logged_before_keep_the_definition_that_counts_own_documents(tiny_bank, windows):
    model = MovingAverage(tiny_bank.dim, 0.5)
    positions = train_positions(tiny_bank, windows, 0)
    train_PD = predict_queries(model, tiny_bank, positions)
    before = fit_hubness(model, tiny_bank, windows, omits_own=False)
    expected = neighbour_penalty(mean_neighbour_score(train_PD, tiny_bank), before.beta)
    assert np.allclose(before.row_correction, expected, atol=1e-6)
    assert not omits_own_document(0) and not omits_own_document(1)
    assert omits_own_document(FIT_VERSION)
