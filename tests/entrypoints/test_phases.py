"""The phase table as runs: what the table decides, what is not done twice."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from entrypoints import _phases as runs
from entrypoints import phases, shadow_eval, train
from entrypoints._inputs import Inputs
from entrypoints._phases import Done, Planner, has_lanes, replay_stands
from entrypoints._validation import Validation
from entrypoints.train import TrainOptions
from lvm import tracking
from lvm.bank.store import Bank
from lvm.metrics import hit_at
from lvm.models.baselines import ContextMean, CopyLast, MovingAverage
from lvm.phases.table import read_phases
from lvm.prediction.predict import predict_queries
from lvm.registry import alias, registered
from lvm.statistics import smallest_detectable
from lvm.windows.export import plan_windows
from tests.conftest import copy_store
from tests.synthetic import make_bank

TINY = ["--bank", "bank", "--size", "tiny", "--max-queries", "300"]
COMMANDS = {"train": train.main, "shadow-eval": shadow_eval.main}


class Killed(Exception):
    """Stands for a process that dies between two runs."""


class Launcher:
    """Stands for `tracking.launch`, without a process a run; dies when `patience` runs are over."""

    def __init__(self, patience: int = 99) -> None:
        self.patience = patience
        self.launched: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, entry: str, parameters: dict[str, Any]) -> str:
        if len(self.launched) == self.patience:
            raise Killed
        self.launched.append((entry, dict(parameters)))
        stack = mlflow.tracking.fluent._active_run_stack.get()
        parents = list(stack)
        stack.clear()
        run_id = str(MlflowClient().create_run("0").info.run_id)
        os.environ["MLFLOW_RUN_ID"] = run_id
        words = [w for k, v in parameters.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        try:
            assert COMMANDS[entry](words) == 0
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)
            stack[:] = parents
        return run_id


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with a bank whose sequences hold a context of 500."""
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "bank", num_sequences=4, num_documents=24, document_rows=38)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield folder


def run_phases(names: str, launcher: Launcher, *arguments: str) -> dict[str, Any]:
    """Run `phases` in this process; return its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "launch", launcher)
        words = ["--phases", names, *TINY, *arguments, "--report", "report.json"]
        assert phases.main(words) == 0
    return json.loads(Path("report.json").read_text())


@pytest.mark.slow
def test_an_interrupted_table_goes_on_where_it_was(workplace, capsys):
    """Phase 1, then death; phase 2 with the replay; then nothing is left to do."""
    with pytest.raises(Killed):
        run_phases("1,2,2B", Launcher(patience=1))
    second = Launcher()
    report = run_phases("1,2,2B", second)
    assert [entry for entry, _ in second.launched] == ["train", "shadow-eval"]
    assert second.launched[0][1]["phase"] == "2"
    third = Launcher()
    assert run_phases("1,2,2B", third) == report
    assert third.launched == []
    assert "nothing to train" in capsys.readouterr().out
    assert [row["name"] for row in report["phases"]] == ["1", "2", "2B"]
    assert report["phases"][2]["same_as"] == "2"
    assert report["decision"]["promote"], "so that the rerun meets a baseline of its own"
    found = MlflowClient().search_runs(["0"], order_by=["start_time ASC"])
    names = [run.data.tags["entry"] for run in found]
    assert names == ["phases", "train", "phases", "train", "shadow-eval", "phases"]
    check_training(found[1])
    check_parent(found[5])
    a_lost_model_is_trained_anew(report)


def check_training(run: mlflow.entities.Run) -> None:
    assert run.data.params["ctx"] == "1000", "what MLflow was told stays"
    assert run.data.params["resolved/ctx"] == "100", "what the table decided stands beside it"
    assert run.data.tags["phase"] == "1" and len(run.data.tags["training_sha256"]) == 64
    assert "optimiser steps are planned" in run.data.tags["warnings"]
    config = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.json"))
    assert (config["ctx"], config["chunk"], config["hidden"]) == (100, 200, 16)


def check_parent(run: mlflow.entities.Run) -> None:
    files = {entry.path for entry in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.md", "phases.png", "phases.txt", "report.json", "config.json"} <= files
    assert "optimiser steps are planned" in run.data.tags["warnings"]
    assert 0 <= run.data.metrics["phases/2B/hit_at_5"] <= 1


def a_lost_model_is_trained_anew(report: dict[str, Any]) -> None:
    """A run whose model is gone counts as not done."""
    lost = report["phases"][0]["run"]
    model = registered.read_card(f"runs:/{lost}/model").model_id
    MlflowClient().delete_logged_model(model)
    again = Launcher(patience=0)
    with pytest.raises(Killed):
        run_phases("1", again)


@pytest.mark.parametrize(
    ("promote", "holder", "stands"),
    [
        ("enabled", "2", True),
        ("enabled", "1", False),
        ("enabled", None, False),
        ("dry_run", "1", True),
        ("dry_run", "2", False),
    ],
)
def test_a_replay_stands_while_the_alias_is_where_it_left_it(monkeypatch, promote, holder, stands):
    monkeypatch.setattr(alias, "aliases", lambda: {} if holder is None else {"baseline": holder})
    outcomes = [{"name": "old", "version": "1"}, {"name": "better", "version": "2"}]
    replay = {"decision": {"winner": "better", "baseline": "old"}, "outcomes": outcomes}
    assert replay_stands(replay, promote) is stands


@pytest.fixture(scope="module")
def planned_bank(tmp_path_factory):
    """A bank in a working folder of its own, for plans alone."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield make_bank(folder / "bank", num_sequences=4, document_rows=75)


def sha(bank: Bank, name: str, recipe: str = "dense", **given: Any) -> str:
    parameters = {"bank": "bank"} | given
    return Planner(bank).job(name, read_phases()[name], recipe, parameters).sha256


def test_a_training_is_told_by_its_inputs(planned_bank):
    first = sha(planned_bank, "1")
    assert first == sha(planned_bank, "1")
    others = [
        sha(planned_bank, "2"),
        sha(planned_bank, "1", "seed"),
        sha(planned_bank, "1", seed=1),
        sha(planned_bank, "1", hidden=16),
        sha(planned_bank, "1", max_steps=7),
    ]
    assert len({first, *others}) == 6
    assert sha(planned_bank, "2") == sha(planned_bank, "2B"), "dense has no use for alpha"
    assert sha(planned_bank, "2", "seed") != sha(planned_bank, "2B", "seed")
    other = make_bank(Path("other"), num_sequences=4, document_rows=75, seed=1)
    assert sha(other, "1") != first


def test_a_grown_model_starts_from_what_its_phase_trained(planned_bank, monkeypatch):
    short = replace(read_phases()["4"], ctx=100)
    monkeypatch.setattr(train, "read_phases", lambda: {"4": short})
    own, grown = Planner(planned_bank).jobs(short, "dense", {"bank": "bank"}, " dense")
    assert (own.name, grown.name, grown.label) == (
        "4 dense",
        "4 tmd_experts dense",
        "4 tmd_experts",
    )
    weights = {
        "runs:/first/model": torch.nn.Linear(2, 2),
        "runs:/other/model": torch.nn.Linear(2, 2),
    }
    monkeypatch.setattr(registered, "load", lambda uri: SimpleNamespace(model=weights[uri]))
    begun = []

    def train_or_find(job):
        begun.append(job)
        return Done("first", "m-1", "1", {})

    monkeypatch.setattr(runs, "train_or_find", train_or_find)
    assert len(runs.train_all([own, grown])) == 2
    first, second = begun
    assert first == own and "init" not in first.parameters
    assert second.parameters["init"] == "runs:/first/model"
    assert second.parameters["model"] == "tmd_experts"
    other = runs.grow(grown, Done("other", "m-2", "2", {}))
    assert len({grown.sha256, second.sha256, other.sha256}) == 3, "other weights, other training"
    weights["runs:/other/model"] = weights["runs:/first/model"]
    again = runs.grow(grown, Done("other", "m-2", "2", {}))
    assert again.sha256 == second.sha256, "weights count, not their name"


def test_a_bank_of_one_lane_is_shown_as_ranked(planned_bank, tmp_path, capsys):
    assert has_lanes(planned_bank, plan_windows(planned_bank, 20))
    single = make_bank(tmp_path / "single", num_lanes=1)
    assert not has_lanes(single, plan_windows(single, 20))
    assert "phases are shown as ranked: rerank: bank" in capsys.readouterr().out


def test_a_validation_tells_what_it_cannot_see(tiny_bank, tmp_path):
    windows = plan_windows(tiny_bank, 20)
    validation = Validation(Inputs(tiny_bank, windows, tmp_path, None))
    models = [
        CopyLast(tiny_bank.dim),
        ContextMean(tiny_bank.dim),
        MovingAverage(tiny_bank.dim, 0.5),
    ]
    best = sorted(validation.measure(model)["hit_at_5"] for model in models)[-2:]
    (sentence,) = validation.doubts()
    assert sentence.startswith("validation is too small") and best[0] > 0
    asked = [predict_queries(models[place], tiny_bank, validation.queries) for place in (0, 2)]
    hit_Q, other_Q = (hit_at(validation._ranks(prediction_QD), 5) for prediction_QD in asked)
    document_Q = tiny_bank.document_N[validation.queries.target_row_Q]
    seen = 100 * smallest_detectable(hit_Q - other_Q, document_Q)
    assert (
        f"{len(validation.queries):,} queries see a difference of Hit@5 from {seen:.1f}" in sentence
    )


def test_torch_and_the_way_of_training_belong_to_it(planned_bank, monkeypatch):
    first = sha(planned_bank, "1")
    for name in (
        "torch.__version__",
        "lvm.training.identity.VERSION",
        "lvm.checkpoint.fits.VERSION",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, "another")
            assert sha(planned_bank, "1") != first, name


def test_an_impossible_phase_is_refused_before_any_is_trained(planned_bank, empty_store, tmp_path):
    launcher = Launcher()
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, tmp_path / "store", patch)
        patch.setattr(tracking, "launch", launcher)
        assert phases.main(["--phases", "1,3.5", *TINY]) == 2
    assert launcher.launched == []


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ({"phase": "3.5"}, {"ctx": 2000, "chunk": 200, "batch_size": None, "alpha": None}),
        ({"phase": "3.5", "ctx": 600}, {"ctx": 600}),
        ({"phase": "3.5", "chunk": 50}, {"ctx": 2000, "chunk": 50}),
        (
            {"phase": "3.5", "recipe": "seed"},
            {"ctx": 2000, "batch_size": 4, "accumulation": 64, "alpha": 0.03},
        ),
        (
            {"phase": "2B", "recipe": "seed", "alpha": 0.2, "batch_size": 2},
            {"ctx": 500, "batch_size": 2, "accumulation": 16, "alpha": 0.2},
        ),
        ({"phase": "my own"}, {"ctx": 1000, "chunk": 200, "phase": "my own"}),
        ({"phase": None}, {"ctx": 1000, "phase": None}),
    ],
)
def test_what_is_given_wins_over_the_table(given, decided):
    options = TrainOptions(**given).with_phase()
    assert {name: getattr(options, name) for name in decided} == decided
