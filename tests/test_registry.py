"""The registered model in a real sqlite store: versions, aliases, predictors read back."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from lvm import registry, tracking
from lvm.facts import facts_from_tags, facts_of
from lvm.models import build_model
from lvm.prediction import predict_contexts
from lvm.windows import plan_windows
from tests.conftest import copy_store


@pytest.fixture(scope="module")
def facts(tiny_bank):
    return facts_of("ema", "2B", tiny_bank, plan_windows(tiny_bank, 50))


@pytest.fixture(scope="module")
def registered_store(empty_store, tmp_path_factory, facts):
    """A store with three versions of lvm, no alias."""
    folder = tmp_path_factory.mktemp("registered") / "store"
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder, patch)
        with tracking.run("train", {}):
            for decay in (0.2, 0.5, 0.8):
                model = build_model({"model": "ema", "dim": 16, "decay": decay})
                registry.register(registry.log_predictor(model, facts), facts)
    return folder / "mlflow.db"


@pytest.fixture
def three_versions(registered_store, tmp_path, monkeypatch):
    """The numbers of three versions of lvm, no alias."""
    copy_store(registered_store, tmp_path / "store", monkeypatch)
    return list(registry.versions())


def contexts() -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_facts_survive_as_tags(facts):
    assert facts_from_tags({key: str(value) for key, value in asdict(facts).items()}) == facts


def test_an_empty_registry_is_empty(store):
    assert registry.aliases() == {}
    assert registry.versions() == {}


def test_versions_carry_their_facts(three_versions, facts):
    assert three_versions == ["1", "2", "3"]
    assert registry.versions() == dict.fromkeys(three_versions, facts)
    assert (facts.model, facts.kind, facts.phase, facts.ctx) == ("ema", "free", "2B", 50)


def test_a_predictor_read_back_predicts_bit_for_bit_the_same(store, facts, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    torch.manual_seed(0)
    sizes = {"model": "memory_gru", "dim": 16, "hidden": 8, "layers": 2, "chunk": 4, "slots": 2}
    model = build_model(sizes).eval()
    torch.nn.init.normal_(model.project_out.weight)
    correction = np.ones((1440, 2), np.float32)
    with tracking.run("train", {}) as run_id:
        trained = facts_of_kind(facts, "trained")
        model_id = registry.log_predictor(model, trained, correction, step=3)
        version = registry.register(model_id, trained)
    registry.promote(version, None, {})
    references = ("models:/lvm@baseline", "models:/lvm/1", f"runs:/{run_id}/model")
    for reference in (*references, f"models:/{model_id}"):
        predictor = registry.load(reference)
        expected = predict_contexts(model, contexts())
        assert np.array_equal(predict_contexts(predictor.model, contexts()), expected)
        assert np.array_equal(predictor.row_correction, correction)
        assert predictor.facts == trained
        assert (predictor.model_id, predictor.run_id) == (model_id, run_id)
    assert registry.load("models:/lvm/1").version == "1"
    assert registry.load(f"models:/{model_id}").version is None


def facts_of_kind(facts, kind):
    return type(facts)(**{**asdict(facts), "kind": kind})


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("banana", "unknown 'banana'; give copy-last, ema"),
        ("models:/lvm@champion", "models:/lvm@champion does not exist; registered: 1, 2, 3"),
        ("models:/lvm/9", "models:/lvm/9 does not exist; registered: 1, 2, 3"),
        ("models:/lvm/one", "models:/lvm/one does not exist"),
        ("models:/other/1", "models:/other/1 does not exist"),
        ("models:/m-0123", "models:/m-0123 cannot be read by lvm"),
        ("runs:/0123/model", "runs:/0123/model cannot be read by lvm"),
    ],
)
def test_an_unknown_reference_is_refused_in_one_line(three_versions, reference, reason):
    with pytest.raises(ValueError) as refused:
        registry.load(reference)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_promotion_moves_both_aliases_and_keeps_the_evidence(three_versions):
    registry.promote("1", None, {"reason": "first"})
    assert registry.aliases() == {"baseline": "1"}
    registry.promote("3", "1", {"reason": "better", "decision_run": "abc"})
    assert registry.aliases() == {"baseline": "3", "previous": "1"}
    tags = MlflowClient().get_model_version("lvm", "3").tags
    assert (tags["reason"], tags["decision_run"]) == ("better", "abc")


def test_promotion_stops_where_the_alias_moved_since_the_decision(three_versions):
    registry.promote("1", None, {})
    registry.promote("2", "1", {})
    with pytest.raises(ValueError, match="baseline moved from 1 to 2"):
        registry.promote("3", "1", {"reason": "late"})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    assert "reason" not in MlflowClient().get_model_version("lvm", "3").tags


@pytest.mark.parametrize(
    ("version", "reason"), [("9", "no version '9'"), ("1", "1 is the baseline already")]
)
def test_promotion_of_a_wrong_version_changes_nothing(three_versions, version, reason):
    registry.promote("1", None, {})
    with pytest.raises(ValueError, match=reason):
        registry.promote(version, "1", {})
    assert registry.aliases() == {"baseline": "1"}


def test_rollback_restores_the_previous_baseline(three_versions):
    registry.promote("1", None, {})
    with pytest.raises(ValueError, match="no previous baseline"):
        registry.rollback()
    registry.promote("2", "1", {})
    assert registry.rollback() == ("1", "2")
    assert registry.aliases() == {"baseline": "1", "previous": "2"}
    assert registry.rollback() == ("2", "1")


def test_a_version_from_elsewhere_is_refused(three_versions):
    MlflowClient().create_model_version("lvm", "file:///nowhere")
    with pytest.raises(ValueError, match="version 4 of lvm was not registered by lvm"):
        registry.versions()
