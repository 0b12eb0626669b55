"""A logged model away from home: without lvm, without its bank, with its bank at another place."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest

from lvm.models.baselines import MovingAverage
from lvm.models.facts import facts_of
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import BASELINE_URI
from lvm.windows.export import plan_windows
from tests.served import baseline_of, text_bank
from tests.synthetic import make_bank

TEXT = "The routine adds the elements. The axis may be negative!"
CONTEXT_BTD = np.random.default_rng(0).standard_normal((1, 5, 256)).astype(np.float32)
ASK = """
import json, sys
import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"bank": sys.argv[2]})
found = model.predict(numpy.load(sys.argv[3]), params={"k": 3, "rerank": "none"})
of_text = model.predict([sys.argv[4]], params={"k": 3})
modules = {name: module.__file__ for name, module in sys.modules.items() if name.startswith("lvm")}
print(json.dumps([found["rows"].tolist(), of_text["rows"].tolist(), modules]))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folder where the model was trained."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def bank(home):
    return text_bank(home / "bank")


@pytest.fixture(scope="module")
def patch(bank, empty_store):
    with baseline_of(bank, empty_store) as patch:
        yield patch


@pytest.fixture
def moved(patch, bank, tmp_path):
    """The place to which the bank was moved."""
    shutil.move(bank.path, tmp_path / "elsewhere")
    yield tmp_path / "elsewhere"
    shutil.rmtree(bank.path, ignore_errors=True)
    shutil.move(tmp_path / "elsewhere", bank.path)


def passages(**more: object) -> list[int]:
    model = mlflow.pyfunc.load_model(BASELINE_URI, **more)
    return model.predict(CONTEXT_BTD, params={"k": 3})["rows"][0].tolist()


@pytest.mark.slow
def test_a_model_needs_its_requirements_and_nothing_else(patch, bank, moved, tmp_path):
    """Modules of other distributions cannot be imported, lvm is the copy in the model."""
    model = Path(mlflow.artifacts.download_artifacts(BASELINE_URI, dst_path=str(tmp_path / "m")))
    listed = (model / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in listed)
    assert not {"click", "matplotlib", "nltk"} & {line.partition("==")[0] for line in listed}
    empty = tmp_path / "empty"
    empty.mkdir()
    script, context = tmp_path / "ask.py", tmp_path / "context.npy"
    script.write_text(ASK)
    np.save(context, CONTEXT_BTD)
    alone = str(Path(__file__).with_name("alone.py"))
    words = [alone, model / "requirements.txt", script, model, moved, context, TEXT]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=empty, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows, of_text, modules = json.loads(run.stdout.splitlines()[-1])
    assert rows[0] == passages(model_config={"bank": str(moved)})
    assert np.shape(of_text) == (1, 3)
    for name, file in modules.items():
        assert Path(file).is_relative_to(model / "code"), name
    assert not {"lvm.training", "lvm.tracking", "lvm.evaluation"} & modules.keys()


def test_the_place_of_the_bank_can_be_given(patch, bank, moved):
    assert mlflow.pyfunc.load_model(BASELINE_URI).predict(CONTEXT_BTD).shape == (1, 256)
    at_argument = passages(model_config={"bank": str(moved)})
    with pytest.MonkeyPatch.context() as there:
        there.setenv("LVM_BANK", str(moved))
        assert passages() == at_argument
        with pytest.raises(ValueError, match="no such folder"):
            passages(model_config={"bank": str(bank.path)})


def test_without_its_bank_passages_are_refused_with_the_ways_to_give_it(patch, bank, moved):
    model = mlflow.pyfunc.load_model(BASELINE_URI)
    with pytest.raises(ValueError) as refused:
        model.predict(CONTEXT_BTD, params={"k": 3})
    (line,) = str(refused.value).splitlines()
    assert f"k: the model's bank {bank.sha256[:12]} cannot be read" in line
    assert "LVM_BANK" in line and "model_config={'bank': ...}" in line
    assert model.predict([TEXT]).shape == (1, 256)
    shutil.copytree(moved, bank.path)
    assert model.predict(CONTEXT_BTD, params={"k": 3})["rows"].shape == (1, 3)


def test_a_bank_of_another_digest_is_refused(patch, bank, tmp_path):
    other = make_bank(tmp_path / "other")
    model = mlflow.pyfunc.load_model(BASELINE_URI, model_config={"bank": str(other.path)})
    with pytest.raises(ValueError) as refused:
        model.predict(CONTEXT_BTD, params={"k": 3})
    (line,) = str(refused.value).splitlines()
    digests = rf"\(sha256 {other.sha256[:12]}\) than the model's \({bank.sha256[:12]}\)"
    assert re.search(rf"k: bank .* is another one {digests}; give its folder as LVM_BANK", line)
    assert model.predict(CONTEXT_BTD).shape == (1, 256)


def test_a_bank_that_was_logged_travels_with_the_model(patch, bank, tmp_path):
    facts = facts_of("ema", "none", bank, plan_windows(bank, 50))
    with runs.run("train", {}):
        model_id = logged_models.log_predictor(MovingAverage(256), facts, log_bank=True)
    expected = passages()
    model = mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(tmp_path / "m"))
    shutil.move(bank.path, tmp_path / "away")
    try:
        found = mlflow.pyfunc.load_model(model).predict(CONTEXT_BTD, params={"k": 3})
    finally:
        shutil.move(tmp_path / "away", bank.path)
    assert found["rows"][0].tolist() == expected
    assert found["passages"][0][0]["text"]
