"""The served predictor, loaded by MLflow from a real sqlite store."""

import mlflow
import numpy as np
import pytest

from lvm import registry, tracking
from lvm.contexts import check_contexts
from lvm.facts import facts_of
from lvm.models.baselines import MovingAverage
from lvm.prediction import predict_contexts
from lvm.windows import plan_windows
from tests.conftest import copy_store

DIM = 16


@pytest.fixture(scope="module")
def served(empty_store, tiny_bank, tmp_path_factory):
    """The baseline as a user loads it, with pickle switched off."""
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 50))
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, tmp_path_factory.mktemp("served") / "store", patch)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        with tracking.run("train", {}):
            version = registry.register(registry.log_predictor(MovingAverage(DIM), facts), facts)
        registry.promote(version, None, {})
        return mlflow.pyfunc.load_model("models:/lvm@baseline")


def contexts(batch: int = 3, time: int = 7, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, time, dim)).astype(np.float32)


def test_the_baseline_predicts_unit_vectors(served):
    prediction_BD = served.predict(contexts())
    assert prediction_BD.shape == (3, DIM)
    assert prediction_BD.dtype == np.float32
    assert np.allclose(np.linalg.norm(prediction_BD, axis=1), 1, atol=1e-6)
    unit_BTD = contexts() / np.linalg.norm(contexts(), axis=-1, keepdims=True)
    assert np.array_equal(prediction_BD, predict_contexts(MovingAverage(DIM), unit_BTD))


def test_the_signature_names_the_shapes(served):
    inputs, outputs = served.metadata.signature.inputs, served.metadata.signature.outputs
    assert (inputs.inputs[0].shape, inputs.inputs[0].type) == ((-1, -1, DIM), np.float32)
    assert (outputs.inputs[0].shape, outputs.inputs[0].type) == ((-1, DIM), np.float32)


def test_any_batch_and_any_length_is_served(served):
    for batch, time in ((1, 1), (2, 300), (5, 2)):
        assert served.predict(contexts(batch, time)).shape == (batch, DIM)


def test_the_length_of_a_vector_does_not_matter(served):
    assert np.allclose(served.predict(contexts()), served.predict(7 * contexts()), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, DIM), (3, 7, DIM + 1), (1, 2, 3, DIM)])
def test_another_shape_is_refused(served, shape):
    with pytest.raises(mlflow.exceptions.MlflowException):
        served.predict(np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x: x[:0], "is empty"),
        (lambda x: x[:, :0], "is empty"),
        (lambda x: np.where(x == x[0, 0, 0], np.nan, x), "NaN or infinite"),
        (lambda x: np.where(x == x[0, 0, 0], np.inf, x), "NaN or infinite"),
        (lambda x: x * (np.arange(7) > 0)[:, None].astype(np.float32), "zero vector"),
        (lambda x: x[0], "is not (batch, time, 16)"),
        (lambda x: x[:, :, 1:], "is not (batch, time, 16)"),
    ],
)
def test_contexts_without_a_direction_are_refused(served, spoil, reason):
    spoilt = spoil(contexts())
    with pytest.raises(ValueError) as refused:
        check_contexts(spoilt, DIM)
    assert reason in str(refused.value)
    if spoilt.ndim == 3 and spoilt.shape[2] == DIM:
        with pytest.raises(ValueError):
            served.predict(spoilt)
