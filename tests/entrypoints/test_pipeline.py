"""The command line on a tiny bank: from training to prediction, stopped or not."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import eval as eval_command
from entrypoints import lane_diagnostics, predict, promote, train
from lvm.bank.bank import open_bank
from lvm.bank.duplicates import SAME_SCORE
from lvm.serving import batch
from lvm.tracking import evaluation_runs
from lvm.tracking.registry import Registry
from tests.conftest import copy_store
from tests.synthetic import make_bank

registry = Registry()

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TINY_MODEL = "--model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2".split()
TINY_MODEL += "--negatives 32 --epochs 2".split()


def runs() -> list[mlflow.entities.Run]:
    """Return the runs of the store, the latest first."""
    return MlflowClient().search_runs(["0"], order_by=["start_time DESC"])


def run_of(entry: str) -> mlflow.entities.Run:
    return next(run for run in runs() if run.data.tags["entry"] == entry)


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
    """The workplace after `promote`: the trained version is the baseline."""
    assert promote.main(["--version", "1", "--reason", "it is the only one"]) == 0
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
    for prefix, metrics in (("val", evaluated.data.metrics), ("best", run.data.metrics)):
        for name, ci95 in (("", report["ci95"]), ("corrected_", report["corrected"]["ci95"])):
            bounds = [metrics[f"{prefix}/{name}hit_at_5_{end}"] for end in ("low", "high")]
            assert bounds == ci95["hit_at_5"]
    assert {"per_query.parquet", "predictions.npy", "row_correction.npy"} <= artifacts(evaluated)
    curve = MlflowClient().get_metric_history(evaluated.info.run_id, "controls/hit_at_5_by_ctx")
    assert {metric.step: metric.value for metric in curve}[20] == report["hit_at_5"]
    assert "context.png" in artifacts(evaluated)
    assert {one["part"] for one in report["ablations"]["without"]} == {
        "linear",
        "encoder",
        "memory",
    }


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
    assert set(columns) <= set(table.columns) and set(table["split"]) == {"test"}
    assert predictions.shape == (len(table), 16) and predictions.dtype == np.float32
    assert report["hit_at_5"] == pytest.approx((table["rank"] <= 5).mean())


def test_controls_can_be_switched_off(trained):
    arguments = "--model copy-last --bank bank --ctx 20 --max-queries 20 --controls false"
    assert eval_command.main([*arguments.split(), "--report", "plain.json"]) == 0
    assert "controls" not in json.loads((trained / "plain.json").read_text())
    assert "context.png" not in artifacts(run_of("eval"))


def test_an_evaluation_fits_no_predictor_that_it_does_not_show(trained):
    arguments = "--model copy-last --bank bank --ctx 10 --max-queries 20 --baselines false"
    assert eval_command.main(arguments.split()) == 0
    fits = {path.name.partition("-")[0] for path in Path("data/windows/ctx10/fits").iterdir()}
    assert fits == {"hubness"}, "the correction of copy-last itself"


def test_every_run_says_where_its_time_went(trained):
    run_id = run_of("train").info.run_id
    spent = json.loads(
        Path(mlflow.artifacts.download_artifacts(f"runs:/{run_id}/time.json")).read_text()
    )
    parts = spent["parts"]
    assert {"train", "validate", "fit ema", "rank", "hubness"} <= set(parts)
    assert parts["train"]["seconds"] > 0 and parts["train"]["products"] > 0
    assert spent["seconds"] == pytest.approx(sum(one["seconds"] for one in parts.values()))


def test_fits_are_shared_by_all_commands(trained):
    names = [path.name.partition("-")[0] for path in Path("data/windows/ctx20/fits").iterdir()]
    assert names.count("ema") == 1
    assert names.count("ridge") == 2, "one of them reversed"


def test_lane_diagnostics_names_every_lane(promoted, capsys):
    assert lane_diagnostics.main(["--report", "lanes.json"]) == 0
    diagnosis = json.loads((promoted / "lanes.json").read_text())["diagnosis"]
    assert set(diagnosis["lanes"]) == {"lane-0", "lane-1", "lane-2"}
    assert diagnosis["sentence"] in capsys.readouterr().out.replace("\n", " ")


def test_lane_diagnostics_of_an_eval_by_clusters_equals_one_measured_here(promoted):
    named = "--model ema --bank bank --ctx 20 --max-queries 100"
    assert eval_command.main([*named.split(), "--controls", "false"]) == 0
    evaluated = run_of("eval").info.run_id
    for place, arguments in enumerate((named, f"--eval-run {evaluated}")):
        report = ["--lanes", "kmeans", "--report", f"clusters-{place}.json"]
        assert lane_diagnostics.main([*arguments.split(), *report]) == 0
    here, read = (json.loads((promoted / f"clusters-{place}.json").read_text()) for place in (0, 1))
    for key in ("diagnosis", "assignment", "ceilings", "lanes", "failing_queries"):
        assert here[key] == read[key]
    assert here["assignment"]["clusters"] == 3
    assert here["ceilings"]["lanes"].keys() == here["diagnosis"]["lanes"].keys()
    drawn = {"lanes.png", "confusion.png", "larger_k.png", "agreement.png"}
    assert drawn | {"failing_queries.parquet"} <= artifacts(run_of("lane-diagnostics"))
    folder = mlflow.artifacts.download_artifacts(run_id=run_of("lane-diagnostics").info.run_id)
    failing = pd.read_parquet(Path(folder) / "failing_queries.parquet")
    assert len(failing) == here["failing_queries"] and (failing["rank"] > 5).all()
    assert set(failing["split"]) == {"test"}


def test_lane_diagnostics_refuses_an_encoder_that_is_not_the_banks(trained, capsys):
    named = "--model ema --bank bank --ctx 20 --lanes prototypes --encoder wordllama"
    assert lane_diagnostics.main(named.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: encoder 'wordllama': gives 256 dims, bank bank has 16")
    assert lane_diagnostics.main(["--model", "ema", "--encoder", "wordllama"]) == 2
    assert "would not be used with lanes=bank" in capsys.readouterr().err


def test_lane_diagnostics_refuses_what_it_would_not_read(trained, capsys):
    train_run = run_of("train").info.run_id
    for arguments, reason in (
        (f"--eval-run {train_run}", f"eval_run: {train_run} is a run of train; give one of eval"),
        ("--eval-run 0123", "run 0123: there is no such run"),
        ("--eval-run 0123 --model ema", "model: would not be used"),
        ("--eval-run 0123 --split val", "split: would not be used"),
    ):
        assert lane_diagnostics.main(arguments.split()) == 2
        assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_predict_retrieves_passages_from_vectors(promoted, capsys):
    np.save("context.npy", np.random.default_rng(0).standard_normal((9, 16)))
    assert predict.main(["--context", "context.npy", "--k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    passages = [line for line in lines if "Sentence number" in line]
    assert "search: exhaustive search of 4,760 passages" in lines  # of 40 twins one each
    assert predict.main(["--context", "context.npy", "--k", "3", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len({one["row"] for one in found["passages"]}) == 3 == len(passages)
    for line, one in zip(passages, found["passages"], strict=True):
        assert f"{one['row']:,}" in line and one["lane"] in line and one["text"] in line
    run = run_of("predict")
    assert run.info.run_name == "predict memory_gru ctx 20 after context.npy"
    assert all(line in run.data.tags["mlflow.note.content"] for line in passages)


def test_predict_answers_many_contexts_to_a_table(promoted, monkeypatch, capsys):
    """An array, a split, a log with contexts: each answered as one context alone is."""
    bank = open_bank("bank")
    starts, rows, k = [100, 350, 700], np.arange(30), 50  # the model reads 20 of the 30 rows
    np.save("many.npy", bank.unit(np.add.outer(starts, rows)))
    log = {"target_row": [one + 30 for one in starts]}
    log["context_rows"] = [(one + rows).tolist() for one in starts]
    pd.DataFrame(log).to_parquet("log.parquet")
    assert predict.main(["--context", "many.npy", "--k", str(k), "--format", "json"]) == 0
    alone = json.loads(capsys.readouterr().out)["contexts"]
    for asked in ("--context many.npy", "--queries log.parquet"):
        assert predict.main([*asked.split(), "--k", str(k), "--out", "many.parquet"]) == 0
        assert "150 passages after 3 contexts, by cosine" in capsys.readouterr().out
        found = pd.read_parquet("many.parquet")
        assert found["context"].tolist() == np.repeat([0, 1, 2], k).tolist()
        assert found["place"].tolist() == [*range(1, k + 1)] * 3
        told = [one for report in alone for one in report["passages"]]
        for name in ("row", "lane", "sequence", "document", "text"):
            assert found[name].tolist() == [one[name] for one in told]
        assert found["score"].tolist() == pytest.approx([one["score"] for one in told], abs=1e-5)
    assert found["target_row"].tolist() == np.repeat(log["target_row"], k).tolist()
    a_split_is_answered_in_blocks_and_goes_on(monkeypatch)


def a_split_is_answered_in_blocks_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies in the third block; the first two are not answered again, the table is the same."""
    words = "--queries val --k 2 --out val.parquet".split()
    assert predict.main(words) == 0
    whole = pd.read_parquet("val.parquet")
    queries = pd.read_parquet("data/windows/ctx20/queries.parquet")
    assert whole["context"].nunique() == (queries["split"] == 1).sum()
    Path("val.parquet").unlink()
    monkeypatch.setattr(batch, "MAX_BLOCK", 100)
    answer, answered = batch.Batch._answer, []

    def dying(self: batch.Batch, place_B: np.ndarray) -> Any:
        if len(answered) == 2:
            raise ValueError("the machine is switched off")
        answered.append(len(place_B))
        return answer(self, place_B)

    monkeypatch.setattr(batch.Batch, "_answer", dying)
    assert predict.main(words) == 2 and not Path("val.parquet").exists()
    assert len([*Path("data/predictions").glob("*.safetensors")]) == 2
    rest = []
    monkeypatch.setattr(
        batch.Batch, "_answer", lambda self, place_B: rest.append(place_B) or answer(self, place_B)
    )
    assert predict.main(words) == 0
    assert len(rest) == -(-whole["context"].nunique() // 100) - 2
    exact = [name for name in whole if name != "score"]
    again = pd.read_parquet("val.parquet")
    pd.testing.assert_frame_equal(again[exact], whole[exact])
    np.testing.assert_allclose(again["score"], whole["score"], atol=1e-5)
    assert [*Path("data/predictions").iterdir()] == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--queries val", "queries: are answered to a table; give out=<a .parquet file>"),
        ("--queries val --context x.npy --out o.parquet", "text, context, queries: give exactly"),
        ("--text x.txt --out o.parquet", "out: text is one context, which is printed; omit out"),
        ("--queries val --out o.csv", "out: o.csv is not the name of a .parquet file"),
        ("--queries nothing.parquet --out o.parquet", "queries: nothing.parquet"),
        ("--context none.npy --out o.parquet", "context: none.npy is not a readable .npy array"),
        ("--context zero.npy --out o.parquet", "contexts: hold a zero vector"),
    ],
)
def test_a_wrong_batch_is_refused_in_one_line(promoted, words, reason, capsys):
    np.save("zero.npy", np.zeros((3, 4, 16), np.float32))
    assert predict.main(words.split(" ")) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {reason}")
    assert not Path("o.parquet").exists()


def test_predict_leaves_out_what_a_context_beyond_ctx_holds(promoted, capsys):
    bank = open_bank("bank")
    np.save("context.npy", bank.unit(slice(200, 260)))
    asked = "--context context.npy --k 1000 --format json --keep-context"
    found = {}
    for kept in ("true", "false"):
        assert predict.main([*asked.split(), kept]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["context_rows"] == 20
        found[kept] = {one["row"] for one in answer["passages"]}
    unread_KD, context_TD = bank.unit(np.sort([*found["true"]])), bank.unit(slice(200, 240))
    assert (unread_KD @ context_TD.T >= SAME_SCORE).any()
    assert not (bank.unit(np.sort([*found["false"]])) @ context_TD.T >= SAME_SCORE).any()


def test_a_promotion_by_hand_is_logged(promoted):
    assert registry.aliases() == {"baseline": "1"}
    run = run_of("promote")
    assert (run.data.tags["decision"], run.data.tags["baseline"]) == ("promoted by hand", "1")
    (move,) = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/history.json")["moves"]
    assert (move["how"], move["reason"]) == ("by hand", "by hand: it is the only one")


def test_eval_on_another_bank_tunes_the_index_on_its_own_windows(promoted, monkeypatch):
    """The sequences there are shorter than the model's context; inverted lists are tuned on val."""
    inverted = functools.partial(evaluation_runs.ensure_index, sizes=(9, 9))
    monkeypatch.setattr(evaluation_runs, "ensure_index", inverted)
    make_bank(promoted / "other", num_sequences=40, num_documents=15, document_rows=1)
    arguments = (
        "--model 1 --bank other --ctx 4 --max-queries 9 --controls false --report other.json"
    )
    before = planned()
    assert eval_command.main(arguments.split()) == 0
    report = json.loads(Path("other.json").read_text())
    assert report["leaky"] is True and report["index"]["tuning_queries"] > 0
    assert planned() - before == {"ctx4"}


def planned() -> set[str]:
    return {path.name for path in Path("data/windows").iterdir() if path.is_dir()}


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
