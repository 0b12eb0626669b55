"""The whole way over HTTP, as docs/loop.py goes it: serve, ask, log, replay, promote."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from entrypoints import shadow_eval
from lvm.models.facts import facts_of
from lvm.tracking.registry import Registry
from lvm.windows.export import ensure_windows
from tests.conftest import copy_store
from tests.entrypoints.test_pipeline import run_of
from tests.entrypoints.test_shadow_store import (
    BEST_ON_VAL,
    CTX,
    DIM,
    changing_bank,
    linear,
    register,
)
from tests.synthetic import rotation

ROOT = Path(__file__).parents[2]
registry = Registry()


@pytest.mark.slow
def test_what_was_asked_decides_who_is_served(tmp_path, empty_store, monkeypatch):
    """The alias moves to a model that fits the rows of the readers, which the baseline does not."""
    bank = changing_bank(tmp_path / "bank")
    copy_store(empty_store, tmp_path / "store", monkeypatch)
    monkeypatch.chdir(tmp_path)
    windows = ensure_windows(bank, CTX)
    assert shadow_eval.main(["--bank", "bank", "--ctx", str(CTX), "--promote", "enabled"]) == 0
    facts = facts_of("memory_gru", "none", bank, windows)
    better = register(linear(rotation(DIM, 1)), facts, BEST_ON_VAL)
    before = registry.aliases()["baseline"]
    assert before != better

    run = subprocess.run(
        [sys.executable, "-m", "docs.loop", "--bank", "bank", "--ctx", str(CTX)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert registry.aliases() == {"baseline": better, "previous": before}, run.stdout
    replay = run_of("shadow-eval")
    table = mlflow.artifacts.download_artifacts(f"runs:/{replay.info.run_id}/queries.parquet")
    asked = pd.read_parquet(table)
    test_rows = [int(row) for row in windows.queries["test"].target_row_Q]
    assert len(asked) >= 200 and set(asked["target_row"]) <= set(test_rows)
    for target, context in zip(asked["target_row"], asked["context_rows"], strict=True):
        assert context[-1] == target - 1 and len(context) >= CTX
    assert f"{len(asked)} queries of 12 sessions" in run.stdout
