"""Free predictors are fitted on train rows, chosen on val alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from lvm.bank.bank import Bank
from lvm.evaluation import free_predictors
from lvm.evaluation.free_predictors import (
    DECAYS,
    FREE,
    fit_free_predictors,
    fit_nearest_successor,
    fit_ridge,
    ridge_pairs,
    tuned_context_ridge,
    tuned_decay,
)
from lvm.models.baselines import ContextRidge, MovingAverage, NearestSuccessor, ridge_features
from lvm.models.predict import on_train_rows, predict_contexts, predict_queries
from lvm.models.table import FREE_MODELS
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows, make_queries
from tests.reference import ranks, validation_figures
from tests.synthetic import rotation_bank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 30)


def all_pairs(bank: Bank, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    pairs = list(ridge_pairs(bank, windows, seed=0))
    return np.concatenate([f for f, _ in pairs]), np.concatenate([t for _, t in pairs])


def test_every_free_predictor_is_fitted(tiny_bank: Bank, windows: Windows):
    models = fit_free_predictors(tiny_bank, windows)
    assert tuple(models) == FREE == tuple(FREE_MODELS)
    for name, model in models.items():
        assert model.config["model"] == name
        assert not model.training
        prediction_QD = predict_queries(model, tiny_bank, windows.queries["test"])
        assert np.allclose(np.linalg.norm(prediction_QD, axis=1), 1, atol=1e-5)
    assert list(fit_free_predictors(tiny_bank, windows, ["ridge"])) == ["ridge"]
    with pytest.raises(ValueError, match="predictor: 'oracle' is unknown"):
        fit_free_predictors(tiny_bank, windows, ["ema", "oracle"])


def test_decay_is_the_best_on_val(tiny_bank: Bank, windows: Windows):
    hits = [
        validation_figures(MovingAverage(tiny_bank.dim, decay), tiny_bank, windows)["hit_at_5"]
        for decay in DECAYS
    ]
    assert hits[DECAYS.index(tuned_decay(tiny_bank, windows))] == max(hits)


def test_test_rows_do_not_change_what_is_fitted(tiny_bank: Bank, windows: Windows):
    vectors = np.array(tiny_bank.vectors)
    chosen = windows.split_N == 2
    vectors[chosen] = np.random.default_rng(0).standard_normal((chosen.sum(), tiny_bank.dim))
    other = dataclasses.replace(tiny_bank, vectors=vectors)
    queries = windows.queries["val"]
    blind = dataclasses.replace(windows, queries={"val": queries, "test": queries})
    first, second = fit_ridge(tiny_bank, blind), fit_ridge(other, blind)
    if first.config == second.config:
        assert torch.equal(first.weight, second.weight)
    feature_TF, target_TD = all_pairs(tiny_bank, windows)
    other_feature_TF, other_target_TD = all_pairs(other, windows)
    assert np.array_equal(feature_TF, other_feature_TF)
    assert np.array_equal(target_TD, other_target_TD)


def test_ridge_pairs_are_all_train_rows_with_their_features(tiny_bank: Bank, windows: Windows):
    feature_TF, target_TD = all_pairs(tiny_bank, windows)
    expected = {}
    for code in range(len(tiny_bank.sequences)):
        rows = np.flatnonzero((tiny_bank.sequence_N == code) & (windows.split_N == 0))
        unit_TD = tiny_bank.unit(rows)
        feature_1TF = ridge_features(torch.from_numpy(unit_TD[None, :-1]))
        for last, truth, feature in zip(unit_TD, unit_TD[1:], feature_1TF[0].numpy(), strict=False):
            expected[last.tobytes() + truth.tobytes()] = feature
    assert len(target_TD) == len(expected)
    for feature, truth in zip(feature_TF, target_TD, strict=True):
        wanted = expected[feature[: tiny_bank.dim].tobytes() + truth.tobytes()]
        assert np.allclose(feature, wanted, atol=1e-6)


@pytest.mark.parametrize("segment", [16, 100])
def test_segments_do_not_change_the_features(
    segment: int, tiny_bank: Bank, windows: Windows, monkeypatch: pytest.MonkeyPatch
):
    whole = [np.sort(part, axis=0) for part in all_pairs(tiny_bank, windows)]
    monkeypatch.setattr(free_predictors, "SEGMENT", segment)
    pieces = [np.sort(part, axis=0) for part in all_pairs(tiny_bank, windows)]
    for one, other in zip(whole, pieces, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_ridge_equals_scikit_learns(tiny_bank: Bank, windows: Windows):
    model = fit_ridge(tiny_bank, windows)
    feature_TF, target_TD = all_pairs(tiny_bank, windows)
    fitted = SklearnRidge(alpha=model.config["alpha"]).fit(feature_TF, target_TD)
    assert np.allclose(model.weight.numpy(), fitted.coef_, atol=1e-4)
    assert np.allclose(model.bias.numpy(), fitted.intercept_, atol=1e-4)


def test_the_answer_never_ranks_first_for_nn_successor_while_train_rows_are_candidates(
    tiny_bank: Bank, windows: Windows
):
    """Only the filter, which removes the rows of the context, can let it come first."""
    model = fit_free_predictors(tiny_bank, windows, ["nn-successor"])["nn-successor"]
    queries = windows.queries["test"]
    prediction_QD = predict_queries(model, tiny_bank, queries)
    rank_Q, rank_raw_Q = ranks(prediction_QD, queries, tiny_bank, windows.representative_N)
    assert (rank_raw_Q > 1).all()
    assert (rank_Q <= rank_raw_Q).all()


def test_ridge_learns_a_rotation(tmp_path: Path):
    bank = rotation_bank(tmp_path / "bank")
    windows = plan_windows(bank, 20)
    models = fit_free_predictors(bank, windows, ["copy-last", "ridge"])
    hits = {name: validation_figures(m, bank, windows)["hit_at_1"] for name, m in models.items()}
    assert hits["ridge"] > 0.95
    assert hits["copy-last"] < 0.5


def test_a_sample_of_rows_is_enough(
    tiny_bank: Bank, windows: Windows, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(free_predictors, "SEGMENT", 50)
    monkeypatch.setattr(free_predictors, "MAX_RIDGE_ROWS", 200)
    assert 200 <= len(all_pairs(tiny_bank, windows)[1]) < 250
    first, second = (fit_ridge(tiny_bank, windows, seed=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_nearest_successor_equals_a_search_row_by_row(tiny_bank: Bank, windows: Windows):
    model = fit_nearest_successor(tiny_bank, windows)
    queries = windows.queries["test"].head(60)
    prediction_QD = predict_queries(model, tiny_bank, queries)
    unit_ND = tiny_bank.unit(slice(None)).astype(np.float64)
    train = set(windows.train_rows().tolist())
    keys = [
        row
        for row in sorted(train)
        if row + 1 in train and tiny_bank.sequence_N[row] == tiny_bank.sequence_N[row + 1]
    ]
    assert len(model.row_MD) == len(train)
    for prediction_D, target in zip(prediction_QD, queries.target_row_Q, strict=True):
        nearest = max(keys, key=lambda row: unit_ND[row] @ unit_ND[target - 1])
        assert np.allclose(prediction_D, unit_ND[nearest + 1], atol=1e-3)


def test_a_stored_row_without_its_successor_is_never_found():
    model = NearestSuccessor(4, 4)
    model.row_MD.copy_(torch.eye(4))
    model.is_end_M[1] = True
    asked_BTD = np.eye(4, dtype=np.float32)[:, None]
    found_BD = predict_contexts(model, asked_BTD + 0.1 * asked_BTD[:1])
    assert found_BD.argmax(axis=1).tolist() == [1, 1, 3, 1]


@pytest.mark.parametrize("blocks", [(2, 3), (7, 64)])
def test_blocks_do_not_change_the_nearest_row(
    blocks: tuple[int, int], tiny_bank: Bank, windows: Windows, monkeypatch: pytest.MonkeyPatch
):
    model, queries = fit_nearest_successor(tiny_bank, windows), windows.queries["test"]
    whole_QD = predict_queries(model, tiny_bank, queries)
    monkeypatch.setattr("lvm.models.baselines.QUERY_BLOCK", blocks[0])
    monkeypatch.setattr("lvm.models.baselines.KEY_BLOCK", blocks[1])
    assert np.allclose(predict_queries(model, tiny_bank, queries), whole_QD, atol=1e-6)


def test_a_stored_row_does_not_answer_itself_at_train_time(tiny_bank: Bank, windows: Windows):
    model = fit_nearest_successor(tiny_bank, windows)
    start_W, rows_W = windows.train_windows()
    target_row_Q = start_W + rows_W
    queries = make_queries(np.arange(len(start_W)), target_row_Q, start_W, windows.ctx)
    truth_QD = tiny_bank.unit(target_row_Q)
    leaked, honest = (
        (predict_queries(one, tiny_bank, queries) * truth_QD).sum(axis=1)
        for one in (model, on_train_rows(model))
    )
    assert np.mean(leaked > 0.999) > 0.9
    assert not (honest > 0.999).any()
    assert not model.skips_twins, "the predictor itself keeps all that it has read"


def test_stored_rows_are_runs_up_to_the_limit(
    tiny_bank: Bank, windows: Windows, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(free_predictors, "MAX_STORED_ROWS", 200)
    monkeypatch.setattr(free_predictors, "STORED_SEGMENT", 40)
    first, again = (fit_nearest_successor(tiny_bank, windows, seed=3) for _ in range(2))
    assert torch.equal(first.row_MD, again.row_MD)
    assert not torch.equal(first.row_MD, fit_nearest_successor(tiny_bank, windows, 4).row_MD)
    assert 160 < len(first.row_MD) <= 200
    by_bytes = {row.tobytes(): number for number, row in enumerate(tiny_bank.unit(slice(None)))}
    unit_MD = first.row_MD.numpy()
    halves = {tiny_bank.unit(row).astype(np.float16).tobytes(): row for row in by_bytes.values()}
    row_M = np.array([halves[row.tobytes()] for row in unit_MD])
    follows_M = np.diff(row_M) == 1
    twins = np.bincount(windows.representative_N)[windows.representative_N[row_M]] > 1
    unsure = twins[:-1] | twins[1:]
    assert (follows_M == ~first.is_end_M.numpy()[:-1])[~unsure].all()
    assert (windows.split_N[row_M[~twins]] == 0).all()


@pytest.mark.parametrize("key_decay", [0.0, 0.6])
def test_context_ridge_equals_scikit_learns_on_the_context_alone(key_decay: float):
    context_TD = torch.nn.functional.normalize(
        torch.randn(150, 6, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    model = ContextRidge(6, 0.5, key_decay, penalty=3.0, weight=0.7)
    found_TD = model(context_TD[None])[0].numpy()
    average_TD = MovingAverage(6, 0.5)(context_TD[None])[0].double().numpy()
    key_TD = context_TD[None] if not key_decay else MovingAverage(6, key_decay)(context_TD[None])
    key_TD, row_TD = key_TD[0].double().numpy(), context_TD.double().numpy()
    assert np.allclose(found_TD[0], average_TD[0], atol=1e-6), "nothing to learn from one row"
    for last in (1, 2, 63, 64, 65, 149):
        fitted = SklearnRidge(alpha=3.0, fit_intercept=False).fit(key_TD[:last], row_TD[1:][:last])
        sum_D = average_TD[last] + 0.7 * fitted.predict(key_TD[last : last + 1])[0]
        assert np.allclose(found_TD[last], sum_D / np.linalg.norm(sum_D), atol=2e-6), last


def test_context_ridge_is_the_best_of_its_choices_on_val(tiny_bank: Bank, windows: Windows):
    chosen = tuned_context_ridge(tiny_bank, windows)
    decay = tuned_decay(tiny_bank, windows)
    assert chosen.config["decay"] == decay

    def hits(key_decay: float, penalty: float, weight: float) -> float:
        model = ContextRidge(tiny_bank.dim, decay, key_decay, penalty, weight)
        queries = windows.queries["val"].head(500)
        rank_Q, _ = ranks(
            predict_queries(model, tiny_bank, queries), queries, tiny_bank, windows.representative_N
        )
        return float((rank_Q <= 5).mean())

    choices = [(k, p, w) for k in (0.0, decay) for p in (3.0, 30.0) for w in (0.5, 2.0, 100.0)]
    own = tuple(chosen.config[name] for name in ("key_decay", "penalty", "weight"))
    assert own in choices
    assert hits(*own) == max(hits(*choice) for choice in choices)
