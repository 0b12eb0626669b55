"""The command line on tiny banks: every entry point, every bad input, every way to be stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import eval as eval_command
from entrypoints import (
    lane_diagnostics,
    predict,
    promote,
    rollback,
    shadow_eval,
    train,
)
from entrypoints._candidates import gather
from lvm import registry, tracking
from lvm.models import FREE_MODELS
from tests.conftest import copy_store
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY_MODEL = "--hidden 8 --layers 2 --chunk 5 --slots 2 --negatives 32 --epochs 2".split()


def runs() -> list[mlflow.entities.Run]:
    """Return the runs of the store, the latest first."""
    return MlflowClient().search_runs(["0"], order_by=["start_time DESC"])


def run_of(entry: str) -> mlflow.entities.Run:
    return next(run for run in runs() if run.info.run_name == entry)


def artifacts(run: mlflow.entities.Run) -> set[str]:
    return {entry.path for entry in MlflowClient().list_artifacts(run.info.run_id)}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with a bank of 4,800 rows; the commands run there one after another."""
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def trained(workplace):
    """The workplace after `train`."""
    arguments = ["--bank", "bank", "--ctx", "20", *TINY_MODEL, "--report", "train.json"]
    assert train.main(arguments) == 0
    return workplace


@pytest.fixture(scope="module")
def promoted(trained):
    """The workplace after `shadow-eval` with promotion."""
    assert shadow_eval.main(["--promote", "enabled", "--report", "shadow.json"]) == 0
    return trained


def test_train_logs_epochs_config_dataset_and_model(trained):
    run = run_of("train")
    assert run.info.status == "FINISHED"
    history = MlflowClient().get_metric_history(run.info.run_id, "val/hit_at_5")
    assert [metric.step for metric in history] == [1, 2]
    config = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.json"))
    assert (config["ctx"], config["epochs"], config["recipe"]) == (20, 2, "dense")
    assert config["lr"] > 0
    digests = {entry.dataset.digest for entry in run.inputs.dataset_inputs}
    assert run.data.tags["bank_sha256"][:36] in digests
    (model,) = MlflowClient().search_logged_models(["0"], f"source_run_id = '{run.info.run_id}'")
    figures = {metric.key: metric.value for metric in model.metrics}
    assert figures["best/hit_at_5"] == run.data.metrics["best/hit_at_5"]
    assert not list((trained / "data" / "training").iterdir()), "no state of a finished run is left"
    assert {"config.json", "training.png", "report.json"} <= artifacts(run)


def test_eval_equals_the_number_that_training_logged(trained):
    run = run_of("train")
    reference = f"runs:/{run.info.run_id}/model"
    arguments = ["--model", reference, "--split", "val", "--report", "eval.json"]
    assert eval_command.main(arguments) == 0
    report = json.loads((trained / "eval.json").read_text())
    assert report["hit_at_5"] == run.data.metrics["best/hit_at_5"]
    history = MlflowClient().get_metric_history(run.info.run_id, "val/hit_at_5")
    assert report["hit_at_5"] == max(metric.value for metric in history)
    evaluated = run_of("eval")
    assert evaluated.data.metrics["val/hit_at_5"] == report["hit_at_5"]
    assert {"per_query.parquet", "predictions.npy", "row_correction.npy"} <= artifacts(evaluated)
    curve = MlflowClient().get_metric_history(evaluated.info.run_id, "controls/hit_at_5_by_ctx")
    assert {metric.step: metric.value for metric in curve}[20] == report["hit_at_5"]
    assert "context.png" in artifacts(evaluated)


def test_eval_reports_what_the_contract_names(trained):
    assert eval_command.main("--model ema --bank bank --ctx 20 --report ema.json".split()) == 0
    report = json.loads((trained / "ema.json").read_text())
    named = "queries bank_rows bank_sha256 ctx hit_at_1 hit_at_5 hit_at_10 mrr_at_10 median_rank"
    named += " ci95 raw corrected pools oracle lanes latency_ms baselines controls index"
    assert set(named.split()) <= report.keys()
    folder = mlflow.artifacts.download_artifacts(run_id=run_of("eval").info.run_id)
    table = pd.read_parquet(Path(folder) / "per_query.parquet")
    predictions = np.load(Path(folder) / "predictions.npy")
    columns = ["query", "target_row", "sequence", "document", "lane", "rank", "rank_raw"]
    assert set(columns) <= set(table.columns)
    assert predictions.shape == (len(table), 16) and predictions.dtype == np.float32
    assert report["hit_at_5"] == pytest.approx((table["rank"] <= 5).mean())


def test_controls_can_be_switched_off(trained):
    arguments = "--model copy-last --bank bank --ctx 20 --max-queries 20 --controls false"
    assert eval_command.main([*arguments.split(), "--report", "plain.json"]) == 0
    assert "controls" not in json.loads((trained / "plain.json").read_text())
    assert "context.png" not in artifacts(run_of("eval"))


def test_fits_are_shared_by_all_commands(trained):
    names = [path.name.partition("-")[0] for path in Path("data/windows/ctx20/fits").iterdir()]
    assert names.count("ema") == 1
    assert names.count("ridge") == 2, "one of them reversed"


def test_shadow_eval_makes_the_first_baseline(promoted):
    decision = json.loads((promoted / "shadow.json").read_text())["decision"]
    assert decision["winner"] is not None
    aliases = registry.aliases()
    winner = registry.versions()[aliases["baseline"]]
    assert winner.model == decision["winner"]
    kinds = [facts.kind for facts in registry.versions().values()]
    assert sorted(kinds) == ["free"] * len(FREE_MODELS) + ["trained"]
    run = run_of("shadow-eval")
    assert {"per_query.parquet", "decision.json", "shadow.md", "forest.png"} <= artifacts(run)
    tags = MlflowClient().get_model_version("lvm", aliases["baseline"]).tags
    assert tags["decision_run"] == run.info.run_id


def test_a_second_shadow_eval_changes_nothing_and_registers_nothing(promoted):
    before = registry.aliases(), list(registry.versions())
    assert shadow_eval.main(["--promote", "enabled"]) == 0
    assert (registry.aliases(), list(registry.versions())) == before


def test_a_rival_of_the_same_name_gets_a_name_of_its_own(promoted):
    assert sorted(names_of_the_field()) == sorted([*FREE_MODELS, "memory_gru"])
    twin = registry.load(f"runs:/{run_of('train').info.run_id}/model")
    version = registry.register(twin.model_id, twin.facts)
    rivals = ["memory_gru-v1", f"memory_gru-v{version}"]
    assert sorted(names_of_the_field()) == sorted([*FREE_MODELS, *rivals])
    MlflowClient().delete_model_version("lvm", version)


def names_of_the_field() -> list[str]:
    with tracking.run("shadow-eval", {}):
        field = gather("all", "bank", None, register=False)
    assert field.baseline_version == field.predictors[field.baseline_name].version
    return list(field.predictors)


def test_a_dry_run_changes_nothing(trained, capsys):
    before = registry.aliases(), list(registry.versions())
    assert shadow_eval.main(["--max-queries", "250"]) == 0
    assert (registry.aliases(), list(registry.versions())) == before
    assert "dry run" in capsys.readouterr().out


def test_a_query_log_chooses_the_queries(promoted, capsys):
    folder = mlflow.artifacts.download_artifacts(run_id=run_of("shadow-eval").info.run_id)
    table = pd.read_parquet(Path(folder) / "per_query.parquet")
    table.drop_duplicates("target_row").head(210).to_parquet("log.parquet")
    assert shadow_eval.main(["--queries", "log.parquet", "--report", "log.json"]) == 0
    assert json.loads((promoted / "log.json").read_text())["num_queries"] == 210
    pd.DataFrame({"target_row": [3]}).to_csv("train.csv")
    assert shadow_eval.main(["--queries", "train.csv"]) == 2
    assert "1 rows that are no test queries" in capsys.readouterr().err


def test_lane_diagnostics_names_every_lane(promoted, capsys):
    assert lane_diagnostics.main(["--report", "lanes.json"]) == 0
    diagnosis = json.loads((promoted / "lanes.json").read_text())["diagnosis"]
    assert set(diagnosis["lanes"]) == {"lane-0", "lane-1", "lane-2"}
    assert diagnosis["sentence"] in capsys.readouterr().out.replace("\n", " ")


def test_predict_retrieves_passages_from_vectors(promoted, capsys):
    np.save("context.npy", np.random.default_rng(0).standard_normal((9, 16)))
    assert predict.main(["--context", "context.npy", "--k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    passages = [line for line in lines if "Sentence number" in line]
    assert len(passages) == 3 and len({line.split("[")[1] for line in passages}) == 3
    assert "search: exhaustive search of 4,760 passages" in lines  # of 40 twins one each


def test_promotion_by_hand_and_rollback_are_logged(promoted):
    before = registry.aliases()["baseline"]
    other = next(version for version in registry.versions() if version != before)
    assert promote.main(["--version", other, "--reason", "a test"]) == 0
    assert registry.aliases()["baseline"] == other
    assert run_of("promote").data.tags["decision"] == "promoted by hand"
    assert rollback.main([]) == 0
    assert registry.aliases() == {"baseline": before, "previous": other}


def test_a_stopped_training_is_killed_and_can_go_on(workplace, capsys):
    arguments = ["--bank", "bank", "--ctx", "20", *TINY_MODEL, "--seed", "7"]
    assert train.main([*arguments, "--resume", "true"]) == 2
    assert "no interrupted run" in capsys.readouterr().err
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "entrypoints.train", *arguments, "--epochs", "3000"]
    with subprocess.Popen(
        [*command, "--patience", "3000"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(line.startswith("epoch 2:") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    stopped = runs()[0]
    assert (stopped.info.status, stopped.data.tags["error"]) == ("KILLED", "stopped by SIGTERM")
    assert len(list((workplace / "data" / "training").glob("*.safetensors"))) == 1
