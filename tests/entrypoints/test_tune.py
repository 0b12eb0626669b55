"""A study of trainings: pruned, interrupted, continued, refused; its winner is a version."""

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import tune
from lvm.studies.tuning import Tuning
from lvm.tracking import runs, tuning_runs
from lvm.tracking.registry import Registry
from tests.conftest import copy_store
from tests.entrypoints.test_phase_runs import Killed, Launcher
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

TINY = "--bank bank --ctx 20 --model res_mlp --epochs 3 --negatives 32 --batch-size 8 --trials 6"
SPACE = """
lr: {low: 0.0001, high: 0.05, log: true}
hidden: {choices: [2, 8]}
ctx: {choices: [10, 9999]}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with a bank and a space."""
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "bank", num_documents=24)
    (folder / "space.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        patch.setattr(runs, "launch", Launcher())
        yield folder


def run_tune(*arguments: str) -> dict[str, Any]:
    """Run `tune` in this process; return its report."""
    words = [*TINY.split(), "--space", "space.yaml", *arguments]
    assert tune.main([*words, "--report", "report.json"]) == 0
    return json.loads(Path("report.json").read_text())


def latest(entry: str) -> mlflow.entities.Run:
    found = MlflowClient().search_runs(["0"], f"tags.entry = '{entry}'")
    return found[0]


def test_a_study_registers_its_winner_and_measures_what_is_left_on_test(workplace):
    report = run_tune("--study", "whole")
    trials = report["trials"]
    assert [one["trial"] for one in trials] == list(range(6))
    assert trials[0]["outcome"] == "complete" and trials[0]["ctx"] == 20
    assert {one["outcome"] for one in trials} <= {"complete", "pruned"}
    assert all(one["epochs"] in (2, 3) for one in trials), "none is pruned after its first epoch"
    assert {one["ctx"] for one in trials} <= {10, 20}, "the bank has no context of 9999"
    winner, parent = report["winner"], latest("tune")
    assert winner["version"] in {str(card.version) for card in Registry().cards()}
    names = {one.path for one in MlflowClient().list_artifacts(parent.info.run_id)}
    assert {"importance.png", "best_command.txt", "tuning.md", "report.json"} <= names
    children = MlflowClient().search_runs(
        ["0"], f"tags.mlflow.parentRunId = '{parent.info.run_id}' and tags.study = 'whole'"
    )
    assert {one.info.status for one in children} == {"FINISHED"}
    assert sorted(int(one.data.params["trial"]) for one in children) == list(range(6))
    a_trial_logs_its_epochs(children, trials)
    the_winner_is_the_training_that_its_command_makes(report)


def a_trial_logs_its_epochs(children: list[mlflow.entities.Run], trials: list[Any]) -> None:
    for child in children:
        told = trials[int(child.data.params["trial"])]
        history = MlflowClient().get_metric_history(child.info.run_id, "val/hit_at_5")
        assert max(one.value for one in history) == told["val_hit_at_5"]
        assert len(history) == told["epochs"]
        assert ("pruned" in child.data.tags) == (told["outcome"] == "pruned")


def the_winner_is_the_training_that_its_command_makes(report: dict[str, Any]) -> None:
    """Its run has the figures of its trial, and its parameters are those of the command."""
    winner, train = report["winner"], latest("train")
    best = max(
        (one for one in report["trials"] if one["outcome"] == "complete"),
        key=lambda one: one["val_hit_at_5"],
    )
    assert best["trial"] == winner["trial"] and train.info.run_id == winner["run"]
    history = MlflowClient().get_metric_history(winner["run"], "val/hit_at_5")
    assert max(one.value for one in history) == best["val_hit_at_5"]
    for name, value in winner["settings"].items():
        assert float(train.data.params[name]) == value
        assert f"-P {name}={value}" in report["command"]
    if winner["trial"] != 0:
        for split in ("val", "test"):
            gain = report["gains"][split]["hit_at_5"]
            assert gain["low"] <= gain["mean"] <= gain["high"]


def test_an_interrupted_study_goes_on_to_the_same_end(workplace, monkeypatch, capsys):
    """It dies in an epoch of one trial, then of another; both times it goes on."""
    whole = run_tune("--study", "whole")  # all trials are done: nothing is trained
    assert "== " not in capsys.readouterr().out

    def dying(count: int) -> Any:
        told = Tuning.report

        def report(self: Tuning, *words: Any) -> None:
            nonlocal count
            count -= 1
            if count == 0:
                raise Killed
            told(self, *words)

        return report

    for count in (5, 8):
        with monkeypatch.context() as patch:
            patch.setattr(Tuning, "report", dying(count))
            with pytest.raises(Killed):
                run_tune("--study", "cut")
    cut = run_tune("--study", "cut")
    assert "goes on" in capsys.readouterr().out
    assert cut["trials"] == whole["trials"]
    assert cut["winner"]["settings"] == whole["winner"]["settings"]
    assert cut["gains"] == whole["gains"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--study", "a b"], "study: 'a b' is not a name"),
        (["--space", "none.yaml"], "space none.yaml: not a readable YAML file"),
        (["--space", "batch.yaml"], "batch_size: the space varies it; leave it at auto"),
        (["--space", "narrow.yaml"], "space: lr: 0.01 to 0.05 must include its default 0.002"),
        (["--bank", "nowhere"], "bank nowhere: no such folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(workplace, words, reason, capsys):
    Path("batch.yaml").write_text("batch_size: {choices: [2, 4]}\n")
    Path("narrow.yaml").write_text("lr: {low: 0.01, high: 0.05}\n")
    arguments = [*TINY.split(), "--space", "space.yaml", "--study", "bad", *words]
    assert tune.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {reason}")


@pytest.mark.parametrize(
    ("words", "different"),
    [
        (["--epochs", "4"], "epochs"),
        (["--seed", "1"], "seed"),
        (["--ctx", "30"], "space, windows, ctx"),
        (["--space", "other.yaml"], "space"),
        (["--bank", "other"], "bank, windows"),
    ],
)
def test_another_space_bank_or_training_is_refused(workplace, words, different, capsys):
    if not Path("other").exists():
        make_bank(Path("other"), num_documents=24, seed=1)
        Path("other.yaml").write_text("lr: {low: 0.001, high: 0.05}\n")
    run_tune("--study", "whole")
    arguments = [*TINY.split(), "--space", "space.yaml", "--study", "whole"]
    arguments += ["--registry", "other"] if "other" in words else []
    assert tune.main([*arguments, *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: study: whole was begun with a different {different}; give")


def test_a_trial_that_fails_is_passed_over(workplace, monkeypatch):
    """As one does whose learning rate diverges; the default must not."""
    train = tuning_runs.train

    def diverging(bank: Any, windows: Any, settings: Any, **words: Any) -> Any:
        if settings.lr > limit:
            raise ValueError(f"lr: {settings.lr} diverged")
        return train(bank, windows, settings, **words)

    monkeypatch.setattr(tuning_runs, "train", diverging)
    limit = 0.0
    assert tune.main([*TINY.split(), "--space", "space.yaml", "--study", "failing"]) == 2
    limit = 2e-3
    report = run_tune("--study", "failing")
    outcomes = {one["outcome"] for one in report["trials"] if one["lr"] > limit}
    assert outcomes == {"fail"} and report["trials"][0]["outcome"] == "complete"
    failed = MlflowClient().search_runs(["0"], "tags.study = 'failing' and status = 'FAILED'")
    assert len(failed) >= 1 and all("diverged" in one.data.tags["error"] for one in failed)


def test_a_study_lies_beside_the_store(workplace):
    run_tune("--study", "whole")
    database = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    assert (Path(database).parent / "optuna.db").is_file()
