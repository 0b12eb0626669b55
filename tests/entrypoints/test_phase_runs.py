"""The phase table as runs that are cut off, repeated, or found done."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_PROJECT_ENTRY_POINT

from entrypoints import phases, shadow_eval, train
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import NAME
from lvm.tracking.study_runs import TRAINING_TAG
from tests.conftest import copy_store
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

TINY = ["--bank", "bank", "--size", "tiny", "--max-queries", "300"]
COMMANDS = {"train": train.main, "shadow-eval": shadow_eval.main}


class Killed(Exception):
    """Stands for a process that dies before a run is launched, or when one has just ended."""


class Launcher:
    """Stands for `runs.launch`, without a process a run.

    It dies instead of one more run than `patience`, or after the run of number `dies_after`.
    """

    def __init__(self, patience: int = 99, dies_after: int = 99) -> None:
        self.patience, self.dies_after = patience, dies_after
        self.launched: list[tuple[str, dict[str, Any]]] = []

    @property
    def entries(self) -> list[str]:
        return [entry for entry, _ in self.launched]

    def __call__(self, entry: str, parameters: dict[str, Any]) -> str:
        if len(self.launched) == self.patience:
            raise Killed
        self.launched.append((entry, dict(parameters)))
        stack = mlflow.tracking.fluent._active_run_stack.get()
        parents = list(stack)
        stack.clear()
        tags = {MLFLOW_PARENT_RUN_ID: parents[-1].info.run_id, MLFLOW_PROJECT_ENTRY_POINT: entry}
        run_id = str(MlflowClient().create_run("0", tags=tags).info.run_id)
        os.environ["MLFLOW_RUN_ID"] = run_id
        words = [w for k, v in parameters.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        try:
            assert COMMANDS[entry](words) == 0
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)
            stack[:] = parents
        if len(self.launched) == self.dies_after:
            raise Killed
        return run_id


@contextmanager
def workplace_in(folder: Path, store: Path) -> Iterator[None]:
    """Work in a folder with a store, and a bank whose sequences hold a context of 500."""
    make_bank(folder / "bank", num_sequences=4, num_documents=24, document_rows=38)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(store, folder / "store", patch)
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, empty_store):
    """The report, the page of phases that were trained and replayed in one go."""
    with workplace_in(tmp_path_factory.mktemp("uninterrupted"), empty_store):
        return run_phases("1,2,2B", Launcher()), page()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store, uninterrupted):
    """A working folder of its own, with nothing trained yet."""
    with workplace_in(tmp_path_factory.mktemp("workplace"), empty_store):
        yield


def run_phases(names: str, launcher: Launcher, *arguments: str) -> dict[str, Any]:
    """Run `phases` in this process; return its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "launch", launcher)
        words = ["--phases", names, *TINY, *arguments, "--report", "report.json"]
        assert phases.main(words) == 0
    return json.loads(Path("report.json").read_text())


def page() -> str:
    """Return the page of the latest `phases`, without what a rerun measures anew."""
    (run,) = MlflowClient().search_runs(
        ["0"], "tags.entry = 'phases'", order_by=["start_time DESC"], max_results=1
    )
    return str(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.md"))


def test_an_interrupted_table_goes_on_where_it_was(workplace, uninterrupted, capsys):
    """Death when phase 1 is trained; when all is replayed; then nothing is left to do."""
    first, second, third = Launcher(dies_after=1), Launcher(dies_after=2), Launcher()
    for launcher in (first, second):
        with pytest.raises(Killed):
            run_phases("1,2,2B", launcher)
    assert (first.entries, second.entries) == (["train"], ["train", "shadow-eval"])
    assert second.launched[0][1]["phase"] == "2"
    report = run_phases("1,2,2B", third)
    assert third.launched == []
    assert "nothing to train" in capsys.readouterr().out
    whole, whole_page = uninterrupted
    assert page() == whole_page
    assert [row["figures"] for row in report["phases"]] == [
        row["figures"] for row in whole["phases"]
    ]
    assert [row["name"] for row in report["phases"]] == ["1", "2", "2B"]
    assert report["phases"][2]["same_as"] == "2"
    assert report["decision"]["promote"] == whole["decision"]["promote"] != []
    found = MlflowClient().search_runs(["0"], order_by=["start_time ASC"])
    names = [run.data.tags["entry"] for run in found]
    assert names == ["phases", "train", "phases", "train", "shadow-eval", "phases"]
    check_training(found[1])
    check_parent(found[5])
    a_run_without_a_model_is_passed_over(found[1])
    a_replay_without_figures_of_a_phase_is_done_anew(found[4], report)
    damaged_weights_are_trained_anew(report)
    a_lost_table_of_ranks_is_measured_anew(found[4])
    a_deleted_version_is_replaced(report)
    a_lost_model_is_trained_anew(report)


def a_run_without_a_model_is_passed_over(trained: mlflow.entities.Run) -> None:
    """Though it is the latest of these inputs, an older one is whole."""
    with runs.run("train", {}):
        runs.set_tags({TRAINING_TAG: trained.data.tags[TRAINING_TAG]})
    again = run_phases("1,2,2B", Launcher(patience=0))
    assert again["phases"][0]["run"] == trained.info.run_id


def a_replay_without_figures_of_a_phase_is_done_anew(
    shadow: mlflow.entities.Run, report: dict[str, Any]
) -> None:
    """As one whose child was killed for want of memory leaves it, though it ended FINISHED."""
    path = Path("store/mlruns/0") / shadow.info.run_id / "artifacts/report.json"
    whole = path.read_text()
    replay = json.loads(whole)
    for one in replay["outcomes"]:
        if one["version"] == report["phases"][0]["version"]:
            one["figures"] = {}
    path.write_text(json.dumps(replay))
    with pytest.raises(Killed):
        run_phases("1,2,2B", Launcher(patience=0))
    path.write_text(whole)


def damaged_weights_are_trained_anew(report: dict[str, Any]) -> None:
    """Their card can be read, the model cannot."""
    model = logged_models.read_card(f"runs:/{report['phases'][0]['run']}/model").model_id
    (weights,) = Path("store").rglob(f"{model}/artifacts/artifacts/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(b"damaged")
    with pytest.raises(Killed):
        run_phases("1,2,2B", Launcher(patience=0))
    weights.write_bytes(whole)


def a_lost_table_of_ranks_is_measured_anew(shadow: mlflow.entities.Run) -> None:
    """A replay that cannot be read counts as not done."""
    (Path("store/mlruns/0") / shadow.info.run_id / "artifacts/per_query.parquet").unlink()
    with pytest.raises(Killed):
        run_phases("1,2,2B", Launcher(patience=0))


def a_deleted_version_is_replaced(report: dict[str, Any]) -> None:
    """Its model is registered once more, and replayed as the version that it is now."""
    version = report["phases"][0]["version"]
    MlflowClient().delete_model_version(NAME, version)
    again = Launcher()
    now = run_phases("1,2,2B", again)
    assert again.entries == ["shadow-eval"]
    assert now["phases"][0]["version"] != version
    assert now["phases"][0]["figures"] == report["phases"][0]["figures"]


def check_training(run: mlflow.entities.Run) -> None:
    assert run.data.params["ctx"] == "auto", "what MLflow was told stays"
    assert run.data.params["resolved/ctx"] == "100", "what the table decided stands beside it"
    assert run.data.tags["phase"] == "1" and len(run.data.tags["training_sha256"]) == 64
    assert "optimizer steps are planned" in run.data.tags["warnings"]
    config = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.json"))
    assert (config["ctx"], config["chunk"], config["hidden"]) == (100, 200, 16)


def check_parent(run: mlflow.entities.Run) -> None:
    files = {entry.path for entry in MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.md", "phases.png", "phases.txt", "report.json", "config.json"} <= files
    assert "optimizer steps are planned" in run.data.tags["warnings"]
    assert 0 <= run.data.metrics["phases/2B/hit_at_5"] <= 1


def a_lost_model_is_trained_anew(report: dict[str, Any]) -> None:
    """A run whose model is gone counts as not done."""
    lost = report["phases"][0]["run"]
    model = logged_models.read_card(f"runs:/{lost}/model").model_id
    MlflowClient().delete_logged_model(model)
    with pytest.raises(Killed):
        run_phases("1", Launcher(patience=0))


def test_an_impossible_phase_is_refused_before_any_is_trained(tmp_path, empty_store):
    launcher = Launcher()
    with workplace_in(tmp_path, empty_store), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "launch", launcher)
        assert phases.main(["--phases", "1,3.5", *TINY]) == 2
    assert launcher.launched == []
