"""Real `mlflow run`s in a fresh copy of the project, as a newcomer starts them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from lvm.tracking import runs
from lvm.tracking.registry import BASELINE_URI, Registry
from tests.checkout import copy_project

registry = Registry()

pytestmark = pytest.mark.slow

STEPS = ["ingest", "export", "train", "eval", "lane-diagnostics", "shadow-eval"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project with its own store, in which nothing was run before."""
    folder = tmp_path_factory.mktemp("clone")
    copy_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture(scope="module")
def piped(clone):
    """What `mlflow run . -P size=tiny` printed."""
    return finish(start(clone, "main", size="tiny"), 0)


def start(clone: Path, entry: str, **parameters: str) -> subprocess.Popen:
    """Start `mlflow run`, without any of MLflow's variables, with the environment activated."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    arguments = [word for k, v in parameters.items() for word in ("-P", f"{k}={v}")]
    command = ["mlflow", "run", ".", "-e", entry, *arguments, "--env-manager", "local"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=clone, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def latest_run() -> mlflow.entities.Run:
    return MlflowClient().search_runs(["0"], order_by=["start_time DESC"], max_results=1)[0]


def test_main_runs_every_step_below_itself(piped, clone):
    runs.configure()
    found = MlflowClient().search_runs(["0"], order_by=["start_time ASC"])
    parent, *children = found
    assert [run.data.tags["entry"] for run in children] == STEPS
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert parent.data.params == {"size": "tiny", "registry": "lvm", "report": "none"}
    assert (clone / "mlruns").is_dir()


def test_main_ends_with_table_decision_and_the_way_to_the_ui(piped, clone):
    end = piped[piped.rindex("Shadow replay:") :]
    free = ("copy-last", "ema", "context-mean", "ridge", "nn-successor", "context-ridge")
    for predictor in ("delta_memory", *free):
        assert predictor in end
    for word in ("Hit@1", "Hit@5", "Hit@10", "queries", "bank rows", "Decision: baseline is"):
        assert word in end
    assert f"mlflow ui --backend-store-uri sqlite:///{clone}/mlflow.db" in end


def test_the_baseline_is_served(piped):
    runs.configure()
    model = mlflow.pyfunc.load_model(BASELINE_URI)
    contexts = np.random.default_rng(0).standard_normal((3, 5, 256)).astype(np.float32)
    assert np.allclose(np.linalg.norm(model.predict(contexts), axis=1), 1, atol=1e-5)


def test_promote_rollback_and_predict_run(piped, clone):
    runs.configure()
    before = registry.aliases()["baseline"]
    other = next(version for version in registry.versions() if version != before)
    reason = "it's a test; {not} a $decision"
    finish(start(clone, "promote", version=other, reason=reason), 0)
    assert registry.aliases()["baseline"] == other
    assert MlflowClient().get_model_version("lvm", other).tags["reason"] == f"by hand: {reason}"
    finish(start(clone, "rollback"), 0)
    assert registry.aliases()["baseline"] == before
    (clone / "text.txt").write_text("The array has two axes. Return the sum of all elements.")
    output = finish(start(clone, "predict", text="text.txt", k="3"), 0)
    passages = re.findall(r"^ *-?\d\.\d{3} +[\d,]+ +\S", output, re.MULTILINE)
    assert len(passages) == 3


def test_a_wrong_word_fails_the_launched_run_with_its_reason(piped, clone):
    runs.configure()
    output = finish(start(clone, "train", lr="banana"), 1)
    reason = "Invalid value for '--lr': 'banana' is not a valid float, nor the word 'auto'."
    assert f"error: {reason}\n" in output
    assert "Traceback" not in output
    assert (latest_run().info.status, latest_run().data.tags["error"]) == ("FAILED", reason)


def test_no_training_outlives_its_launcher(piped, clone):
    """SIGTERM to `mlflow run` alone: MLflow just dies; the command notices, ends its run."""
    runs.configure()
    endless = {"epochs": "100000", "patience": "100000", "hidden": "8", "layers": "2"}
    process = start(clone, "train", bank="data/bank-tiny", ctx="50", negatives="8", **endless)
    assert any(line.startswith("epoch 1:") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert latest_run().info.status == "KILLED"
    assert latest_run().data.tags["error"] == "stopped by SIGTERM"
