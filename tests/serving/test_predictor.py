"""The served predictor, loaded by MLflow from a real sqlite store."""

import dataclasses
import errno
import io
import json
import os
import shutil
import tracemalloc
from pathlib import Path

import mlflow
import numpy as np
import pytest

from lvm.bank.bank import open_bank
from lvm.bank.duplicates import SAME_SCORE
from lvm.models.baselines import ContextMean, MovingAverage
from lvm.models.facts import facts_of
from lvm.models.predict import check_contexts, predict_contexts
from lvm.retrieval.exact import top_rows
from lvm.retrieval.lanes import means_of
from lvm.retrieval.rerank import Weights, fit_reranker
from lvm.serving import predictor
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import Registry
from lvm.windows.export import plan_windows
from tests.conftest import copy_store
from tests.synthetic import make_bank

registry = Registry()

DIM = 16


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a bank of its own, which a test may take away."""
    folder = tmp_path_factory.mktemp("served")
    make_bank(folder / "bank")
    return folder


@pytest.fixture(scope="module")
def correction(workplace):
    """A row correction (N, 2) that changes the order of passages."""
    random = np.random.default_rng(1)
    num_rows = open_bank(workplace / "bank").num_rows
    scale_N, bias_N = random.uniform(0.8, 1.2, num_rows), random.uniform(-0.3, 0, num_rows)
    return np.stack([scale_N, bias_N], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def served(empty_store, workplace, correction):
    """The baseline as a user loads it, with pickle switched off."""
    bank = open_bank(workplace / "bank")
    facts = facts_of("ema", "none", bank, plan_windows(bank, 50))
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, workplace / "store", patch)
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        patch.chdir(workplace)
        with runs.run("train", {}):
            model_id = logged_models.log_predictor(MovingAverage(DIM), facts, correction)
            version = registry.register(model_id, facts)
        registry.promote(version, None, {})
        yield mlflow.pyfunc.load_model("models:/lvm@baseline")


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
    """Contexts are vectors or texts, for which MLflow has no type: lvm checks their shapes."""
    signature, outputs = served.metadata.signature, served.metadata.signature.outputs
    assert signature.inputs is None
    assert np.shape(served.input_example) == (1, 2, DIM)
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


def expected_passages(workplace, correction, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    bank = open_bank(workplace / "bank")
    unit_BTD = contexts() / np.linalg.norm(contexts(), axis=-1, keepdims=True)
    vector_BD = predict_contexts(MovingAverage(DIM), unit_BTD)
    groups = plan_windows(bank, 50).representative_N
    return top_rows(vector_BD, bank, k, correction, representative_N=groups)


def test_k_asks_for_passages_with_corrected_scores(served, workplace, correction):
    answer = served.predict(contexts(), params={"k": 4})
    assert list(answer) == ["passages", "rows", "scores", "vectors"], "a reader wants the passages"
    assert np.array_equal(answer["vectors"], served.predict(contexts()))
    row_BK, score_BK = expected_passages(workplace, correction)
    assert np.array_equal(answer["rows"], row_BK)
    np.testing.assert_allclose(answer["scores"], score_BK, rtol=0, atol=1e-6)


def test_vectors_can_be_left_out(served):
    whole = served.predict(contexts(), params={"k": 2})
    found = served.predict(contexts(), params={"k": 2, "vectors": False})
    assert set(whole) - set(found) == {"vectors"}
    assert np.array_equal(found["rows"], whole["rows"])
    with pytest.raises(ValueError, match="vectors: false leaves no answer where k = 0; give k too"):
        served.predict(contexts(), params={"vectors": False})


def test_passages_that_the_context_holds_are_left_out(served, workplace):
    """Vectors that lie between bank rows are answered by these very rows first."""
    bank = open_bank(workplace / "bank")
    context_1TD = bank.unit(slice(200, 300))[None]
    kept = served.predict(context_1TD, params={"k": 60, "keep_context": True})
    found = served.predict(context_1TD, params={"k": 60})
    cosine_KT = bank.unit(kept["rows"][0]) @ context_1TD[0].T
    is_held_K = (cosine_KT >= SAME_SCORE).any(axis=1)
    assert is_held_K.any()
    others = kept["rows"][0][~is_held_K]
    assert found["rows"][0][: len(others)].tolist() == others.tolist()
    assert (found["rows"] >= 0).all() and len(set(found["rows"][0])) == 60
    assert not (bank.unit(found["rows"][0]) @ context_1TD[0].T >= SAME_SCORE).any()


def test_where_the_context_holds_all_but_some_the_rest_is_padded(served, workplace):
    bank = open_bank(workplace / "bank")
    found = served.predict(bank.unit(slice(0, bank.num_rows - 600))[None], params={"k": 1000})
    is_found_K = found["rows"][0] >= 0
    assert 500 < is_found_K.sum() <= 600 and len(found["passages"][0]) == is_found_K.sum()
    assert (found["scores"][0][~is_found_K] == np.finfo(np.float32).min).all()


def test_a_long_context_is_compared_in_blocks(served, workplace, monkeypatch):
    bank = open_bank(workplace / "bank")
    context_1TD = bank.unit(slice(0, bank.num_rows - 600))[None]
    whole = served.predict(context_1TD, params={"k": 300})
    monkeypatch.setattr(predictor, "COSINES", 2**14)
    tracemalloc.start()
    try:
        found = served.predict(context_1TD, params={"k": 300})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found["rows"], whole["rows"])
    assert peak < 300 * context_1TD.shape[1] * 4, "less than all cosines with the first answers"


def test_vectors_of_extreme_length_are_scaled(served):
    for scale in (1e-30, 1e30):
        scaled = served.predict(contexts() * np.float32(scale))
        assert np.allclose(scaled, served.predict(contexts()), atol=1e-5)


def test_an_answer_with_passages_is_json(served):
    from mlflow.pyfunc.scoring_server import predictions_to_json

    written = io.StringIO()
    predictions_to_json(served.predict(contexts(), params={"k": 2}), written)
    answer = json.loads(written.getvalue())["predictions"]
    assert np.shape(answer["rows"]) == np.shape(answer["scores"]) == (3, 2)


def test_a_warm_stream_answers_like_the_whole_context(served, workplace, correction):
    model = served.unwrap_python_model()
    stream = model.stream()
    stream.warm(contexts()[0, :-1])
    row_1K, score_1K = model.retrieve(stream.append(contexts()[0, -1])[None], 4)
    row_BK, score_BK = expected_passages(workplace, correction)
    assert np.array_equal(row_1K[0], row_BK[0])
    np.testing.assert_allclose(score_1K[0], score_BK[0], rtol=0, atol=1e-6)


def test_without_a_cache_whole_contexts_are_answered_and_sessions_refused(served):
    cacheless = mlflow.pyfunc.load_model("models:/lvm@baseline", model_config={"cache_bytes": 0})
    for _ in range(2):
        found = cacheless.predict(contexts(1), params={"k": 4})
        assert np.array_equal(found["rows"], served.predict(contexts(1), params={"k": 4})["rows"])
    with pytest.raises(ValueError, match="session: this server holds none, because LVM_CACHE_BYT"):
        cacheless.predict(contexts(1), params={"session": "one"})
    assert np.allclose(cacheless.predict(contexts(1)), found["vectors"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [-1, 10**6])
def test_an_impossible_k_is_refused(served, k):
    with pytest.raises(ValueError, match="k: "):
        served.predict(contexts(), params={"k": k})


def test_more_passages_than_can_be_held_are_refused(served):
    reason = "k: 1,000 passages for each of 101 contexts are more than 100,000 in all; send at most"
    with pytest.raises(ValueError, match=f"{reason} 100 contexts together"):
        served.predict(contexts(101, 1), params={"k": 1000})
    assert served.predict(contexts(101, 1), params={"k": 9})["rows"].shape == (101, 9)
    with pytest.raises(ValueError, match="at most 500 contexts together"):
        served.predict(contexts(501, 1), params={"k": 1, "rerank": "lane"})


def test_passages_of_another_bank_are_refused_while_vectors_are_served(served, workplace):
    fresh = mlflow.pyfunc.load_model("models:/lvm@baseline")
    shutil.move(workplace / "bank", workplace / "away")
    try:
        with pytest.raises(ValueError, match="no such folder"):
            fresh.predict(contexts(), params={"k": 2})
        make_bank(workplace / "bank", seed=1)
        with pytest.raises(ValueError, match="is another one"):
            fresh.predict(contexts(), params={"k": 2})
        assert fresh.predict(contexts()).shape == (3, DIM)
    finally:
        shutil.rmtree(workplace / "bank")
        shutil.move(workplace / "away", workplace / "bank")


def test_a_bank_that_cannot_be_read_is_a_refusal(served, monkeypatch):
    def denied(*parts: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "bank/bank.json")

    fresh = mlflow.pyfunc.load_model("models:/lvm@baseline")
    monkeypatch.setattr("lvm.serving.predictor.open_bank", denied)
    with pytest.raises(
        ValueError, match="k: the model's bank .* cannot be read .*Permission denied"
    ):
        fresh.predict(contexts(), params={"k": 2})
    assert fresh.predict(contexts()).shape == (3, DIM)


def test_the_code_of_a_logged_model_is_that_of_the_installed_lvm(served):
    """What is logged names one class: moves of other files leave old models loadable."""
    (code,) = Path("store").rglob("artifacts/logged.py")
    lines = code.read_text().splitlines()
    assert [line for line in lines if "lvm." in line] == [
        "from lvm.serving.predictor import ServedPredictor"
    ]


@pytest.fixture(scope="module")
def with_lanes(served, workplace, correction):
    """A model that was logged with a re-ranker, as it is served."""
    bank = open_bank(workplace / "bank")
    windows = plan_windows(bank, 50)
    facts = facts_of("ema", "none", bank, windows)
    reranker = fit_reranker(MovingAverage(DIM), bank, windows, correction)
    weights = {"lane": dict.fromkeys(("plain", "corrected"), Weights(0.05, beta=0.5))}
    reranker = dataclasses.replace(reranker, weights=weights)  # lanes tell nothing of this bank
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(MovingAverage(DIM), facts, reranker=reranker)
    return mlflow.pyfunc.load_model(f"models:/{model_id}"), reranker


def test_passages_are_ordered_by_lane_on_demand(with_lanes, workplace):
    model, reranker = with_lanes
    bank = open_bank(workplace / "bank")
    weights = reranker.weights["lane"]["plain"]
    weight = np.float32(weights.tau * weights.beta)
    assert weight > 0
    num_moved = 0
    for last in range(300, 720, 40):
        context = bank.unit(slice(int(bank.sequence_start_N()[last]), last))[None]
        plain = model.predict(context, params={"k": 6})
        found = model.predict(context, params={"k": 6, "rerank": "lane"})
        assert np.array_equal(found["vectors"], plain["vectors"])
        whole = model.predict(context, params={"k": 200})
        log_p_L = reranker.classifier.log_probability(means_of(context[:, -50:]))[0]
        expected = whole["scores"][0] + weight * log_p_L[bank.lane_N[whole["rows"][0]]]
        order = np.argsort(-expected, kind="stable")[:6]
        assert found["rows"][0].tolist() == whole["rows"][0][order].tolist()
        assert np.allclose(found["scores"][0], expected[order])
        num_moved += found["rows"].tolist() != plain["rows"].tolist()
    assert num_moved > 2


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (
            {"k": 3, "rerank": "banana"},
            "unknown 'banana'; choose one of none, lane, lexical",
        ),
        ({"rerank": "lane"}, "give k too"),
    ],
)
def test_an_order_that_cannot_be_is_refused(with_lanes, params, reason):
    with pytest.raises(ValueError, match=reason):
        with_lanes[0].predict(contexts(), params=params)


def test_a_model_without_lanes_cannot_order_by_them(served):
    with pytest.raises(ValueError, match="rerank: the model was logged without lanes"):
        served.predict(contexts(), params={"k": 3, "rerank": "lane"})


def test_a_context_beyond_ctx_is_read_as_its_stream_reads_it(served, workplace):
    """Its last ctx rows are read, all of its rows are left out of the answer."""
    bank, ctx = open_bank(workplace / "bank"), 50
    facts = facts_of("context-mean", "none", bank, plan_windows(bank, ctx))
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(ContextMean(DIM), facts)
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    context_1TD = bank.unit(slice(200, 200 + 3 * ctx))[None]
    prediction_1D = model.predict(context_1TD)
    assert np.array_equal(prediction_1D, model.predict(context_1TD[:, -ctx:]))
    streamed_D = model.unwrap_python_model().stream().warm(context_1TD[0])
    np.testing.assert_allclose(prediction_1D[0], streamed_D, rtol=0, atol=4e-6)
    found = model.predict(context_1TD, params={"k": 60})
    assert np.array_equal(found["vectors"], prediction_1D)
    assert not (bank.unit(found["rows"][0]) @ context_1TD[0].T >= SAME_SCORE).any()
