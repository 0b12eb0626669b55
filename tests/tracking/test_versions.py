"""The registered model in a real sqlite store: versions, aliases, predictors read back."""

from dataclasses import asdict
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from lvm.models.facts import facts_from_tags, facts_of
from lvm.models.predict import predict_contexts
from lvm.models.table import build_model
from lvm.models.weights import load_model
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import Registry, description, metric_tags
from lvm.windows.export import plan_windows
from tests.conftest import copy_store

registry = Registry()


@pytest.fixture(scope="module")
def facts(tiny_bank):
    return facts_of("ema", "2B", tiny_bank, plan_windows(tiny_bank, 50))


@pytest.fixture(scope="module")
def registered_store(empty_store, tmp_path_factory, facts):
    """A store with three versions of lvm, no alias."""
    folder = tmp_path_factory.mktemp("registered") / "store"
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder, patch)
        with runs.run("train", {}):
            for decay in (0.2, 0.5, 0.8):
                model = build_model({"model": "ema", "dim": 16, "decay": decay})
                registry.register(logged_models.log_predictor(model, facts), facts)
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


def test_a_version_of_another_registered_model_is_none_of_ours(three_versions):
    client = MlflowClient()
    client.create_registered_model("other")
    ours = client.get_model_version("lvm", "2")
    made = client.create_model_version("other", ours.source, model_id=ours.model_id)
    card = logged_models.read_card(f"models:/other/{made.version}")
    assert made.version in (1, "1") and (card.registry, card.version) == ("other", "1")
    assert registry.version_of(card.model_id) == "2"


def test_a_full_disk_is_no_fault_of_the_model(three_versions, monkeypatch):
    def full(*words, **named):
        raise MlflowException("while downloading: [Errno 28] No space left on device: '/tmp/x'")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", full)
    with pytest.raises(MlflowException, match="No space left"):
        logged_models.load("models:/lvm/1")


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
    with runs.run("train", {}) as run_id:
        trained = facts_of_kind(facts, "trained")
        model_id = logged_models.log_predictor(model, trained, correction, step=3)
        version = registry.register(model_id, trained)
    registry.promote(version, None, {})
    references = ("models:/lvm@baseline", "models:/lvm/1", f"runs:/{run_id}/model")
    for reference in (*references, f"models:/{model_id}"):
        predictor = logged_models.load(reference)
        expected = predict_contexts(model, contexts())
        assert np.array_equal(predict_contexts(predictor.model, contexts()), expected)
        assert np.array_equal(predictor.row_correction, correction)
        assert predictor.facts == trained
        assert (predictor.model_id, predictor.run_id) == (model_id, run_id)
    assert logged_models.load("models:/lvm/1").version == "1"
    assert logged_models.load(f"models:/{model_id}").version is None


def facts_of_kind(facts, kind):
    return type(facts)(**{**asdict(facts), "kind": kind})


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("banana", "unknown 'banana'; give copy-last, ema"),
        ("models:/lvm@champion", "models:/lvm@champion does not exist; registered: 1, 2, 3"),
        ("models:/lvm@baseline", "registered: 1, 2, 3; give model=<version>, or run shadow-eval"),
        ("models:/lvm/9", "models:/lvm/9 does not exist; registered: 1, 2, 3"),
        ("models:/lvm/one", "models:/lvm/one does not exist"),
        ("models:/other/1", "models:/other/1 does not exist"),
        ("models:/m-0123", "models:/m-0123 cannot be read by lvm"),
        ("runs:/0123/model", "runs:/0123/model cannot be read by lvm"),
    ],
)
def test_an_unknown_reference_is_refused_in_one_line(three_versions, reference, reason):
    with pytest.raises(ValueError) as refused:
        logged_models.load(reference)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_version_from_elsewhere_is_left_out_with_its_reason(three_versions, facts):
    MlflowClient().create_model_version("lvm", "file:///nowhere")
    assert list(registry.versions()) == three_versions
    (reason,) = registry.unreadable_versions().items()
    assert reason[0] == "4" and "KeyError: 'model'" in reason[1]
    assert registry.version_of("m-0") is None


def test_facts_without_a_later_field_are_read(facts):
    tags = {key: str(value) for key, value in asdict(facts).items()}
    assert facts_from_tags({k: v for k, v in tags.items() if k != "fit_version"}).fit_version == 0
    with pytest.raises(KeyError):
        facts_from_tags({k: v for k, v in tags.items() if k != "leaky"})


def test_all_pages_of_versions_are_read(three_versions, monkeypatch):
    monkeypatch.setattr("lvm.tracking.registry.PAGE_SIZE", 2)
    assert list(registry.versions()) == three_versions


def test_a_first_registration_that_another_forestalls_is_no_error(store, facts, monkeypatch):
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(
            build_model({"model": "copy-last", "dim": 16}), facts
        )
    make = MlflowClient.create_registered_model

    def forestalled(self, name, **others):
        monkeypatch.undo()
        make(self, name)
        return make(self, name, **others)

    monkeypatch.setattr(MlflowClient, "create_registered_model", forestalled)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    assert registry.register(model_id, facts) == "1"


def test_a_card_and_the_small_files_come_without_the_weights(three_versions, facts, tmp_path):
    card = logged_models.read_card("models:/lvm/2")
    assert (card.facts, card.version) == (facts, "2")
    assert card == registry.cards()[1]
    files = logged_models.LoggedFiles(card)
    folder = tmp_path / "files"
    folder.mkdir()
    files.describe(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    files.fetch(folder)
    assert load_model(folder).decay == 0.5


def test_an_empty_row_correction_is_refused_in_one_line(store, facts):
    model = build_model({"model": "copy-last", "dim": 16})
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(model, facts, np.ones((4, 2), np.float32))
    place = Path(MlflowClient().get_logged_model(model_id).artifact_location)
    (place / "artifacts" / "row_correction.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=f"models:/{model_id} cannot be read by lvm"):
        logged_models.load(f"models:/{model_id}")


FACTS = {
    "model": "memory_gru",
    "kind": "trained",
    "ctx": "500",
    "recipe": "dense",
    "phase": "2B",
    "bank": "data/bank",
    "bank_sha256": "0c848776b00d1234",
    "split": "document",
    "leaky": "False",
}
METRICS = ("hit_at_1", "hit_at_5", "hit_at_10", "mrr_at_10")
HITS = dict.fromkeys(METRICS, 0.25)
TAGS = metric_tags(HITS, dict.fromkeys(HITS, [0.2, 0.3]), {}, {})


def test_a_version_is_told_with_what_was_measured() -> None:
    told = {f"shadow_{key}": text for key, text in TAGS.items()}
    told |= {"shadow_run": "abcdef0123", "shadow_place": "2 of 7", "shadow_queries": "474"}
    text = description(FACTS | told)
    assert text.startswith("memory_gru (trained), ctx 500, recipe dense, phase 2B; bank data/bank")
    assert "25.0 [20.0, 30.0]" in text and "place 2 of 7 on 474 queries" in text
    assert "[run abcdef01](#/runs/abcdef0123)" in text
    assert "val queries" not in text and "LEAKY" not in text


def test_a_promotion_is_told_with_its_reason() -> None:
    by_hand = {"decision_run": "abcdef0123", "reason": "by hand: it is the only one"}
    text = description(FACTS | by_hand | {"leaky": "True"})
    assert "Took the alias by [run abcdef01](#/runs/abcdef0123): by hand" in text
    assert "LEAKY" in text


@pytest.mark.parametrize(("interval", "cell"), [([None, None], "0.25 [unknown]")])
def test_an_interval_of_one_document_is_unknown(interval: list[None], cell: str) -> None:
    assert metric_tags(HITS, dict.fromkeys(HITS, interval), {}, {})["hit_at_5"] == cell
    assert TAGS["corrected_hit_at_5"] == "none"


def test_a_page_rounds_once() -> None:
    """Of a tag with four digits, 20.95 % may have been 20.949 %."""
    values = np.random.default_rng(0).uniform(0, 1, (500, 3)).tolist() + [[0.20951, 0.15495, 0.3]]
    for value, low, high in [*values, [np.float64(1e-7), 0.0, 1.0]]:
        measured = dict.fromkeys(METRICS, value)
        tags = metric_tags(measured, dict.fromkeys(METRICS, [low, high]), {}, {})
        page = description(FACTS | {f"val_{key}": text for key, text in tags.items()})
        percents = [f"{100 * number:.1f}" for number in (value, low, high)]
        assert page.count("{} [{}, {}]".format(*percents)) == len(METRICS)


@pytest.mark.parametrize(("fit_version", "is_told"), [(0, True), (1, True), (2, False)])
def test_a_page_tells_the_older_hubness_correction(fit_version: int, is_told: bool) -> None:
    found = metric_tags(
        HITS, dict.fromkeys(HITS, [0.2, 0.3]), HITS, dict.fromkeys(HITS, [0.2, 0.3])
    )
    tags = FACTS | {"fit_version": str(fit_version)}
    page = description(tags | {f"shadow_{key}": text for key, text in found.items()})
    assert ("older definition" in page) == is_told
    assert "older definition" not in description(tags)


def test_a_tag_of_four_digits_is_still_shown() -> None:
    """Versions that were registered before have these."""
    tags = {f"val_{key}": "0.1750 [0.1549, 0.2090]" for key in METRICS}
    text = description(FACTS | tags | {"val_corrected_hit_at_5": "none"})
    assert text.count("17.5 [15.5, 20.9]") == len(METRICS)


def test_a_model_that_an_earlier_lvm_logged_is_served(monkeypatch) -> None:
    """`old_model` was logged by commit c8f7202; its code imports lvm.serving.predictor."""
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    served = mlflow.pyfunc.load_model(str(Path(__file__).parent / "old_model"))
    model = build_model({"model": "ema", "dim": 16, "decay": 0.5})
    expected = predict_contexts(model, contexts())
    assert np.allclose(served.predict(contexts()), expected, rtol=0, atol=1e-6)
    assert served.unwrap_python_model().facts.model == "ema"
