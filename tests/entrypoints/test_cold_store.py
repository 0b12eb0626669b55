"""Commands started at one moment where nothing is there: no store, no windows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.synthetic import make_bank

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def test_commands_that_create_store_and_windows_together_all_finish(tmp_path):
    make_bank(tmp_path / "bank")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    environment |= {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "entrypoints.export", "--bank", "bank", "--ctx", "20"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(3)]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], printed
    found = MlflowClient(store).search_runs(["0"])
    assert [run.info.status for run in found] == ["FINISHED"] * 3
    assert len({run.data.tags["windows_sha256"] for run in found}) == 1
    artifacts = {run.info.artifact_uri for run in found}
    assert artifacts == {f"{tmp_path}/mlruns/0/{run.info.run_id}/artifacts" for run in found}
