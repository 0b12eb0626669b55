"""The scaling command on a tiny bank: verdict, nested runs, figure; a second run trains nothing."""

import json

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import scaling
from lvm.studies.scaling_cells import Trainer
from lvm.system.settings import GATES_FILE
from tests.conftest import copy_store
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

TINY = "--bank bank --ctx 20 --fractions 0.25,0.5,1 --widths 2,4,6 --seeds 0,1 --model res_mlp"
TINY = f"{TINY} --layers 2 --negatives 16 --batch-size 20 --max-steps 8".split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with a bank of 7,200 rows, with gates that eight steps can pass."""
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "bank", num_documents=60)
    gates = GATES_FILE.read_text()
    for strict, lenient in (
        ("min_steps: 300", "min_steps: 1"),
        ("min_passes: 2.0", "min_passes: 0.0"),
        ("step_gain: 0.01", "step_gain: 1.0"),
    ):
        gates = gates.replace(strict, lenient)
    (folder / "gates.yaml").write_text(gates)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield folder


def test_a_grid_is_logged_with_its_verdict_and_trained_once(workplace, monkeypatch):
    rules = scaling.read_scaling_rules(workplace / "gates.yaml")
    monkeypatch.setattr(scaling, "read_scaling_rules", lambda: rules)
    trained = []
    train = Trainer._train
    monkeypatch.setattr(Trainer, "_train", lambda *words: trained.append(1) or train(*words))
    assert scaling.main([*TINY, "--report", "scaling.json"]) == 0
    report = json.loads((workplace / "scaling.json").read_text())
    first, *_ = MlflowClient().search_runs(["0"], "params.bank = 'bank'")
    assert first.data.tags["verdict"] == report["verdict"]
    children = MlflowClient().search_runs(["0"], f"tags.mlflow.parentRunId = '{first.info.run_id}'")
    assert len(children) == len(trained) == 18 + 3 + 1
    assert {child.data.params["kind"] for child in children} == {
        "grid",
        "half the steps",
        "other lr",
    }
    assert all("measured/hit_at_5" in child.data.metrics for child in children)
    page = mlflow.artifacts.load_text(f"runs:/{first.info.run_id}/scaling.md")
    assert page.startswith(f"**{report['sentence']}**")
    names = {entry.path for entry in MlflowClient().list_artifacts(first.info.run_id)}
    assert {"scaling.md", "scaling.png", "report.json", "config.json"} <= names
    assert scaling.main([*TINY, "--report", "again.json"]) == 0
    assert len(trained) == 22
    again = json.loads((workplace / "again.json").read_text())
    assert (again["sentence"], again["gains"]) == (report["sentence"], report["gains"])


def test_a_training_cut_short_is_named_so(workplace):
    assert scaling.main([*TINY, "--report", "short.json"]) == 0
    report = json.loads((workplace / "short.json").read_text())
    assert report["verdict"] == "not optimised" and "max_steps=300" in report["sentence"]
    assert "gains" not in report
