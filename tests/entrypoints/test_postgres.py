"""A team's tracking server over a real PostgreSQL: four trainings at once, then the whole job."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import mlflow
import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput
from mlflow.tracking import MlflowClient

from entrypoints import eval as eval_command
from entrypoints import export, ingest, shadow_eval, train
from lvm.bank.files import file_sha256
from lvm.models.table import FREE_MODELS
from lvm.models.weights import CONFIG, WEIGHTS
from lvm.tracking import datasets
from lvm.tracking.registry import BASELINE_URI, Registry
from lvm.tracking.store import configure, own_experiment
from tests.entrypoints.test_pipeline import ROOT, TINY_MODEL
from tests.postgres import mlflow_server, postgres
from tests.synthetic import make_bank

registry = Registry()

pytestmark = [pytest.mark.slow, pytest.mark.postgres]

TRAIN = ["--bank", "bank", "--ctx", "20", *TINY_MODEL]
NUM_TRAININGS = 4
ENTRIES = {"ingest": 1, "export": 1, "train": NUM_TRAININGS + 1, "eval": 1, "shadow-eval": 1}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A working folder whose runs go to an empty server, which keeps artifacts in `stored`."""
    folder = tmp_path_factory.mktemp("team")
    make_bank(folder / "vectors", num_sequences=8, num_documents=30, num_twins=40)
    with (
        postgres() as store,
        mlflow_server(store, folder / "stored", folder / "server.log") as url,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_URI", url)
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def reports(workplace) -> list[dict]:
    """What `train` reported: four at once, on an empty registry and without windows; one alone.

    The whole job stands around the last one, promotion included.
    """
    assert ingest.main(["--source", "vectors", "--bank", "bank"]) == 0
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "entrypoints.train", *TRAIN, *seeded(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in range(NUM_TRAININGS)
    ]
    for process in started:
        printed = process.communicate(timeout=600)[0]
        assert process.returncode == 0, printed
    assert export.main(["--bank", "bank", "--ctx", "20"]) == 0
    assert train.main([*TRAIN, *seeded(NUM_TRAININGS)]) == 0
    assert eval_command.main(["--model", "models:/lvm/latest"]) == 0
    assert shadow_eval.main(["--promote", "enabled"]) == 0
    seeds = range(NUM_TRAININGS + 1)
    return [json.loads(Path(f"train-{seed}.json").read_text()) for seed in seeds]


def seeded(seed: int) -> list[str]:
    return ["--seed", str(seed), "--report", f"train-{seed}.json"]


def runs() -> list[mlflow.entities.Run]:
    """Return the runs of lvm's experiment, which a server has beside its first one."""
    return MlflowClient().search_runs([own_experiment()])


def run_of_model(model_id: str) -> mlflow.entities.Run:
    client = MlflowClient()
    return client.get_run(client.get_logged_model(model_id).source_run_id)


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder by its path from there."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def test_no_run_is_lost(reports):
    found = runs()
    assert Counter(run.data.tags["entry"] for run in found) == ENTRIES
    assert {run.info.status for run in found} == {"FINISHED"}
    trained = {run.info.run_id for run in found if run.data.tags["entry"] == "train"}
    assert {run_of_model(report["model_id"]).info.run_id for report in reports} == trained


def test_every_figure_of_every_epoch_is_there(reports):
    for report in reports:
        run_id = run_of_model(report["model_id"]).info.run_id
        assert [record["epoch"] for record in report["history"]] == [1, 2]
        for name in report["history"][0].keys() - {"epoch"}:
            history = MlflowClient().get_metric_history(run_id, name)
            logged = sorted(history, key=lambda metric: metric.timestamp)
            figures = [(metric.step, metric.value) for metric in logged]
            wanted = [(record["epoch"], record[name]) for record in report["history"]]
            if name.startswith("best/"):  # logged once more, with the model
                wanted.append((len(report["history"]), figures[-1][1]))
            assert figures == wanted


def test_every_artifact_of_a_run_comes_back_as_it_was_stored(reports, workplace):
    found = runs()
    assert len(found) == sum(ENTRIES.values())
    for run in found:
        stored = hashes(workplace / "stored" / own_experiment() / run.info.run_id / "artifacts")
        got = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id))
        assert stored and hashes(got) == stored
    for report in reports:
        run_id = run_of_model(report["model_id"]).info.run_id
        assert mlflow.artifacts.load_dict(f"runs:/{run_id}/report.json") == report


def test_every_model_comes_back_with_the_hash_that_it_was_saved_with(reports, workplace):
    logged = MlflowClient().search_logged_models([own_experiment()])
    assert len(logged) == len(reports) + len(FREE_MODELS)
    models = workplace / "stored" / own_experiment() / "models"
    for model in logged:
        stored = hashes(models / model.model_id / "artifacts")
        got = Path(mlflow.artifacts.download_artifacts(f"models:/{model.model_id}"))
        found = hashes(got)
        assert stored.items() <= found.items()  # MLflow adds one file of its own to what it loads
        config = json.loads((got / "artifacts" / CONFIG).read_text())
        assert found[f"artifacts/{WEIGHTS}"] == config["weights_sha256"]


def test_every_model_is_registered_once(reports):
    cards = registry.cards()
    assert [card.version for card in cards] == [str(place + 1) for place in range(len(cards))]
    trained = {card.version: card.model_id for card in cards if card.facts.kind == "trained"}
    assert trained == {report["version"]: report["model_id"] for report in reports}
    free = sorted(card.facts.model for card in cards if card.facts.kind == "free")
    assert free == sorted(FREE_MODELS)


def test_the_alias_names_a_version_that_serves(reports):
    assert registry.aliases()["baseline"] in registry.versions()
    assert registry.history()[-1]["version"] == registry.aliases()["baseline"]
    model = mlflow.pyfunc.load_model(BASELINE_URI)
    contexts = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    assert np.allclose(np.linalg.norm(model.predict(contexts), axis=1), 1, atol=1e-5)


def test_a_new_dataset_is_logged_by_all_who_read_it_first(workplace):
    """MLflow looks for a dataset, then adds it: about every second of four at once is refused."""
    configure()
    run_ids = [MlflowClient().create_run("0").info.run_id for _ in range(NUM_TRAININGS)]
    together = Barrier(NUM_TRAININGS)

    def log(run_id: str) -> None:
        for number in range(10):
            together.wait(timeout=60)
            dataset = Dataset(f"race-{number}", "digest", "local", "{}")
            datasets.log_input(run_id, DatasetInput(dataset, []))

    with ThreadPoolExecutor(NUM_TRAININGS) as threads:
        list(threads.map(log, run_ids))
    for run_id in run_ids:
        assert len(MlflowClient().get_run(run_id).inputs.dataset_inputs) == 10
        MlflowClient().delete_run(run_id)
