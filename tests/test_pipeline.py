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
    named = {"per_query.parquet", "decision.json", "report.md", "history.json"}
    assert named | {"forest.png", "hits.png", "lanes.png"} <= artifacts(run)
    for version in registry.versions():
        tags = MlflowClient().get_model_version("lvm", version).tags
        assert tags["decision_run"] == run.info.run_id
        assert tags["shadow_hit_at_5"].endswith("]") and tags["shadow_place"].endswith(
            f"of {len(kinds)}"
        )
    history = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/history.json")["moves"]
    assert history == registry.history() and history[-1]["version"] == aliases["baseline"]


def test_a_second_shadow_eval_changes_nothing_and_runs_no_model(promoted):
    before = registry.aliases(), list(registry.versions())
    first = json.loads((promoted / "shadow.json").read_text())
    arguments = ["--promote", "enabled", "--report", "again.json"]
    assert shadow_eval.main(arguments) == 0
    assert (registry.aliases(), list(registry.versions())) == before
    again = json.loads((promoted / "again.json").read_text())
    for name, origin in ((first, "measured now"), (again, "read from the store")):
        assert {one["origin"] for one in name["outcomes"]} == {origin}
    shared = ("name", "figures", "ci95", "latency_ms", "measured_at")
    tables = [[[one[key] for key in shared] for one in x["outcomes"]] for x in (first, again)]
    assert tables[0] == tables[1]


def test_candidates_are_named_in_every_way_and_taken_once(promoted):
    run_id, baseline = run_of("train").info.run_id, registry.aliases()["baseline"]
    model_id = registry.load(f"runs:/{run_id}/model").model_id
    trained = registry.version_of(model_id)
    ways = f"{trained}, models:/lvm/{trained}, runs:/{run_id}/model, models:/{model_id}"
    with tracking.run("shadow-eval", {}):
        field = gather(f"{ways}, ema, models:/lvm@baseline", None, None, register=False)
    assert sorted(field.predictors) == sorted([*FREE_MODELS, "memory_gru"])
    assert field.versions["memory_gru"] == trained and baseline in field.versions.values()


def test_a_version_that_cannot_be_read_is_left_unscored(promoted, capsys):
    twin = registry.load(f"runs:/{run_of('train').info.run_id}/model")
    with tracking.run("lost", {}):
        lost = registry.log_predictor(twin.model, twin.facts)
    version = registry.register(lost, twin.facts)
    (weights,) = (promoted / "store").rglob(f"{lost}/artifacts/artifacts/model.safetensors")
    weights.write_bytes(b"damaged")
    assert shadow_eval.main(["--report", "lost.json"]) == 0
    outcomes = json.loads((promoted / "lost.json").read_text())["outcomes"]
    (failed,) = (one for one in outcomes if one["version"] == version)
    assert "does not match the sha256" in failed["failure"] and not failed["figures"]
    assert sum(bool(one["figures"]) for one in outcomes) == len(FREE_MODELS) + 1
    MlflowClient().delete_model_version("lvm", version)


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
    asked = table.drop_duplicates("target_row").head(210)
    asked.to_parquet("log.parquet")
    assert shadow_eval.main(["--queries", "log.parquet", "--report", "log.json"]) == 0
    report = json.loads((promoted / "log.json").read_text())
    assert report["num_queries"] == 210
    assert report["source"].endswith("rows by split: 0 train, 0 val, 210 test")
    pd.DataFrame({"sequence": "sequence-0", "target_row": [3, 4]}).to_csv("train.csv")
    assert shadow_eval.main(["--queries", "train.csv", "--report", "train.json"]) == 0
    outcomes = json.loads((promoted / "train.json").read_text())["outcomes"]
    assert {one["leak"] for one in outcomes} == {"2 of 2 answers were among its train rows"}
    capsys.readouterr()
    table.to_parquet("repeated.parquet")
    assert shadow_eval.main(["--queries", "repeated.parquet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "repeats query 1" in line


def test_a_log_of_recorded_contexts_is_asked_as_served(promoted):
    with tracking.run("shadow-eval", {}):
        windows = gather("all", None, None, register=False).inputs.windows
    target_row_Q = windows.queries["test"].target_row_Q[:30]
    lines = [
        {"target_row": int(row), "context_rows": list(range(int(row) - 1 - row % 3, int(row)))}
        for row in target_row_Q
    ]
    Path("served.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shadow_eval.main(["--queries", "served.jsonl", "--report", "served.json"]) == 0
    report = json.loads((promoted / "served.json").read_text())
    assert (report["num_queries"], report["removed_ctx"]) == (30, 3)
    assert "each asked from its recorded context" in report["source"]
    assert all(one["figures"] for one in report["outcomes"])


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
