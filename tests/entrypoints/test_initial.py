"""Which predictors a training may start from."""

import dataclasses

import pytest
import torch
from mlflow.tracking import MlflowClient

from entrypoints import train
from lvm.models.facts import facts_of
from lvm.models.table import FREE_MODELS, build_model
from lvm.tracking import initial, logged_models
from lvm.tracking.datasets import Inputs
from lvm.tracking.initial import read_initial
from lvm.tracking.logged_models import Predictor
from lvm.windows.export import plan_windows

MODEL = build_model({"model": "memory_gru", "dim": 16, "hidden": 8, "layers": 2})


@pytest.fixture
def asked(tiny_bank, monkeypatch):
    """Inputs with a registry of one predictor, whose facts the test may change."""
    windows = plan_windows(tiny_bank, 20)
    asked = {"facts": facts_of("memory_gru", "none", tiny_bank, windows), "references": []}

    def load(reference: str) -> Predictor:
        asked["references"].append(reference)
        return Predictor(reference, asked["facts"], model=MODEL)

    monkeypatch.setattr(initial, "load", load)
    asked["inputs"] = Inputs(tiny_bank, windows, None)
    return asked


def test_a_number_is_a_version(asked):
    assert read_initial(None, asked["inputs"]) is None
    assert asked["references"] == []
    for reference in ("3", "models:/lvm@baseline", "runs:/abc/model"):
        assert read_initial(reference, asked["inputs"]).model is MODEL
    assert asked["references"] == ["models:/lvm/3", "models:/lvm@baseline", "runs:/abc/model"]


def test_what_has_no_weights_is_no_init(asked):
    with pytest.raises(ValueError, match="init: unknown 'ema'; give a version's number"):
        read_initial("ema", asked["inputs"])


@pytest.mark.parametrize("name", FREE_MODELS)
def test_a_free_predictor_is_no_init(asked, tiny_bank, name):
    asked["facts"] = facts_of(name, "none", tiny_bank, asked["inputs"].windows)
    reason = f"init: models:/lvm/1 is a free predictor .{name}., from which no training can start"
    with pytest.raises(ValueError, match=reason) as caught:
        read_initial("1", asked["inputs"])
    assert "\n" not in str(caught.value)


def test_a_trunk_of_another_context_length_may_be_grown(asked, tiny_bank):
    asked["facts"] = facts_of("memory_gru", "none", tiny_bank, plan_windows(tiny_bank, 10))
    asked["facts"] = dataclasses.replace(asked["facts"], ctx=10)
    assert read_initial("1", asked["inputs"]) is not None


def test_a_model_of_the_bank_that_this_one_extends_may_be_grown(asked, tiny_bank):
    asked["facts"] = dataclasses.replace(asked["facts"], bank_sha256="1" * 64)
    bank = dataclasses.replace(tiny_bank, bases=("1" * 64,))
    inputs = dataclasses.replace(asked["inputs"], bank=bank)
    assert read_initial("1", inputs) is not None


@pytest.mark.parametrize("changed", [{"seed": 7}, {"split": "random"}])
def test_what_may_have_seen_val_rows_is_refused(asked, monkeypatch, changed):
    facts = dataclasses.replace(asked["facts"], **changed)
    monkeypatch.setattr(initial, "load", lambda reference: Predictor(reference, facts, model=MODEL))
    with pytest.raises(ValueError, match="init: 1 was trained on split") as caught:
        read_initial("1", asked["inputs"])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_experts_grow_from_a_registered_model(store, tiny_bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"--bank {tiny_bank.path} --ctx 20 --hidden 8 --layers 2 --chunk 5 --slots 2 --epochs 1"
    shared = [*words.split(), "--negatives", "32"]
    grown = [*shared, "--model", "tmd_experts", "--experts", "4", "--expert-rank", "3"]
    shared += ["--model", "memory_gru"]
    assert train.main(shared) == 0
    assert train.main([*grown, "--init", "1"]) == 0
    assert train.main([*grown, "--init", "7"]) == 2
    assert train.main([*shared, "--init", "2"]) == 2
    failed, unknown, run, _ = MlflowClient().search_runs(["0"])
    assert failed.data.tags["error"].startswith("init: 2 is a tmd_experts")
    assert unknown.data.tags["error"].startswith("init: models:/lvm/7 does not exist")
    assert (run.data.tags["init"], run.data.tags["experts_control"]) == ("1", "none")
    names = {"train/expert_load_max", "train/expert_load_entropy", "train/dead_experts"}
    assert names | {"val/gate_lane_mi"} <= run.data.metrics.keys()
    artifacts = {one.path for one in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"experts.png", "training.png"} <= artifacts
    first, second = (logged_models.load(f"models:/lvm/{version}").model for version in (1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
