"""Several processes under a real torchrun against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lvm.system.distributed import World, joined, launched_rank, launched_size
from tests.conftest import copy_store
from tests.synthetic import make_bank
from tests.training.shared_training import CONFIGS, histories

pytestmark = [pytest.mark.slow, pytest.mark.battery]

ROOT = Path(__file__).parents[2]
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m".split()
ARGUMENTS = (
    "--bank bank --ctx 20 --model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2 "
    "--negatives 32 --epochs 2 --batch-size 5 --report report.json"
).split()
# Sums of float32 in another order. Without dropout: its masks are each process's own.
TOLERANCE = 1e-4
SECONDS = 240


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "bank", num_sequences=6, num_documents=30, document_rows=11)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, *TORCHRUN, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def both(workplace):
    """The histories of two processes and of one, by recipe."""
    shared = run("tests.training.shared_training", "bank", "shared.json")
    assert shared.returncode == 0, shared.stderr
    return json.loads(Path("shared.json").read_text()), histories(Path("bank"), World())


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one(both, name):
    shared, alone = (found[name] for found in both)
    assert len(shared) == len(alone) == 3
    for one, other in zip(alone, shared, strict=True):
        assert other.keys() == one.keys()
        assert one["train/skipped_steps"] == other["train/skipped_steps"] == 0
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=TOLERANCE)
        assert other["val/hit_at_5"] == pytest.approx(one["val/hit_at_5"], abs=0.011)
    assert abs(alone[-1]["train/loss"] - alone[0]["train/loss"]) > 100 * TOLERANCE


def test_two_processes_go_on_from_the_state_of_a_killed_run(workplace, both):
    arguments = ["tests.training.shared_training", "bank", "resumed.json", "state"]
    assert run(*arguments).returncode != 0
    assert Path("state").is_file() and not Path("resumed.json").exists()
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    undisturbed, found = both[0]["hard"], json.loads(Path("resumed.json").read_text())["hard"]
    for record in (*undisturbed, *found):
        del record["train/seconds"]
    assert found == undisturbed


def test_rank_0_alone_opens_a_run(workplace):
    trained = run("entrypoints.train", *ARGUMENTS)
    assert trained.returncode == 0, trained.stderr
    (logged,) = MlflowClient().search_runs(["0"])
    assert logged.info.status == "FINISHED"
    assert (
        logged.data.metrics["train/loss"]
        == json.loads(Path("report.json").read_text())["history"][-1]["train/loss"]
    )
    assert not list((workplace / "data" / "training").iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--lr", "banana"], "'banana' is not a valid float"),
        (["--resume", "true"], "resume: no interrupted run"),
    ],
    ids=["every rank refuses", "rank 0 refuses while rank 1 waits"],
)
def test_a_refusal_ends_all_processes(workplace, arguments, reason):
    refused = run("entrypoints.train", *ARGUMENTS, *arguments)
    assert refused.returncode != 0
    assert reason in refused.stderr


def test_without_torchrun_a_process_is_alone():
    assert (launched_rank(), launched_size()) == (0, 1)
    with joined("cpu") as world:
        assert world == World()
        assert (world.from_main(3), world.gathered(3), world.mean(0.5)) == (3, [3], 0.5)
