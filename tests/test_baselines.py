"""Free predictors are fitted on train rows, chosen on val alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from lvm import baselines
from lvm.bank import Bank
from lvm.baselines import DECAYS, FREE, fit_free_predictors, fit_ridge, ridge_pairs, tuned_decay
from lvm.evaluation import validation_figures
from lvm.models import FREE_MODELS
from lvm.models.baselines import MovingAverage, ridge_features
from lvm.prediction import predict_queries
from lvm.windows import Windows, plan_windows
from tests.synthetic import rotation_bank


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
    monkeypatch.setattr(baselines, "SEGMENT", segment)
    pieces = [np.sort(part, axis=0) for part in all_pairs(tiny_bank, windows)]
    for one, other in zip(whole, pieces, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_ridge_equals_scikit_learns(tiny_bank: Bank, windows: Windows):
    model = fit_ridge(tiny_bank, windows)
    feature_TF, target_TD = all_pairs(tiny_bank, windows)
    fitted = SklearnRidge(alpha=model.config["alpha"]).fit(feature_TF, target_TD)
    assert np.allclose(model.weight.numpy(), fitted.coef_, atol=1e-4)
    assert np.allclose(model.bias.numpy(), fitted.intercept_, atol=1e-4)


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
    monkeypatch.setattr(baselines, "SEGMENT", 50)
    monkeypatch.setattr(baselines, "MAX_RIDGE_ROWS", 200)
    assert 200 <= len(all_pairs(tiny_bank, windows)[1]) < 250
    first, second = (fit_ridge(tiny_bank, windows, seed=3) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
