"""SIGKILL at random moments: the same command again ends as if nothing had happened."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lvm.registry import alias
from lvm.seeding import generator
from tests.faults.commands import (
    artifact,
    check_store,
    copy_project,
    files_sha256,
    finish,
    latest,
    read_report,
    restore,
    start,
)
from tests.faults.conftest import Tally
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults

KILLS = 20
CHAINS = 4  # of `phases`: five kills, one after the other, then the good end
MODEL = "--hidden 8 --layers 2 --chunk 5 --slots 2 --negatives 32".split()
TRAIN = ["--bank", "bank", "--ctx", "20", *MODEL, "--epochs", "4"]
SENTENCES = "The sum has {} terms. Each of the {} terms is taken once. Then {} remains."


@dataclass(frozen=True)
class Case:
    """A command, what must be there before, what it leaves that must be the same ever again."""

    entry: str
    words: list[str]
    before: tuple[tuple[str, list[str]], ...]
    left: Callable[[Path], Any]


def ingested(folder: Path) -> Any:
    return files_sha256(folder / "data" / "mine")


def exported(folder: Path) -> Any:
    return files_sha256(folder / "data" / "windows")


def trained(folder: Path) -> Any:
    run = latest(folder, "train")
    history = MlflowClient().get_metric_history(run.info.run_id, "val/hit_at_5")
    (model,) = MlflowClient().search_logged_models(["0"], f"source_run_id = '{run.info.run_id}'")
    weights = files_sha256(Path(model.artifact_location) / "artifacts")
    assert not list((folder / "data" / "training").glob("*.safetensors"))
    return weights, [(one.step, one.value) for one in history], read_report(folder, "train")


def evaluated(folder: Path) -> Any:
    return read_report(folder, "eval"), artifact(folder, "eval", "predictions.npy")


def replayed(folder: Path) -> Any:
    """Return the baseline with the ranks that it stands on."""
    holder = MlflowClient().get_model_version(alias.NAME, alias.aliases()["baseline"])
    figures = read_report(folder, "shadow-eval")["outcomes"]
    return holder.tags["model"], [(one["name"], one["figures"]) for one in figures]


ONCE_TRAINED = (("train", TRAIN),)
CASES = {
    case.entry: case
    for case in (
        Case("ingest", "--source text --bank data/mine".split(), (), ingested),
        Case("export", "--bank bank --ctx 20".split(), (), exported),
        Case("train", TRAIN, (), trained),
        Case("eval", "--model models:/lvm/1 --bank bank".split(), ONCE_TRAINED, evaluated),
        Case("shadow_eval", "--bank bank --promote enabled".split(), ONCE_TRAINED, replayed),
    )
}


def workplace(folder: Path) -> None:
    """Make a bank, a folder of text."""
    make_bank(folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    (folder / "text").mkdir()
    for number in range(40):
        lines = [SENTENCES.format(i, number, i + number) for i in range(200)]
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_killed_command_is_run_again(case: Case, tmp_path: Path, tally: Tally) -> None:
    folder, snapshot = tmp_path / "work", tmp_path / "snapshot"
    folder.mkdir()
    workplace(folder)
    for entry, words in case.before:
        finish(folder, entry, words)
    restore(snapshot, folder)
    finish(folder, case.entry, case.words)  # the forks' python is there from here on
    restore(folder, snapshot)
    seconds = finish(folder, case.entry, case.words)
    undisturbed = case.left(folder)
    moments = generator(0, f"kills of {case.entry}").uniform(0, seconds, KILLS)
    for moment in sorted(moments):
        restore(folder, snapshot)
        with tally.injecting(f"SIGKILL in {case.entry}"):
            kill_after(moment, folder, case)
            finish(folder, case.entry, case.words)
            check_store(folder)
            assert case.left(folder) == undisturbed
            remains = [path for path in (folder / "data").rglob(".*") if path.is_dir()]
            assert not remains, "nothing that a killed process had begun is left"


def kill_after(seconds: float, folder: Path, case: Case) -> None:
    """Kill a command after so many seconds of work; its children have to notice by themselves."""
    started = start(folder, case.entry, case.words)
    if not started.ends_within(seconds):
        started.hit(signal.SIGKILL)
        started.wait(10)
    assert started.remains() == [], "children have ended, too"


def test_phases_killed_again_and_again_end_in_the_same_page(tmp_path: Path, tally: Tally) -> None:
    folder, snapshot = tmp_path / "work", tmp_path / "snapshot"
    folder.mkdir()
    copy_project(folder)
    make_bank(folder / "bank", num_sequences=4, num_documents=24, document_rows=38)
    words = "--phases 1,2 --size tiny --bank bank --max-queries 300".split()
    case = Case("phases", words, (), lambda there: artifact(there, "phases", "report.md"))
    restore(snapshot, folder)
    seconds = finish(folder, "phases", words)
    undisturbed = case.left(folder)
    random = generator(0, "kills of phases")
    for _ in range(CHAINS):
        restore(folder, snapshot)
        kills = KILLS // CHAINS
        with tally.injecting("SIGKILL in phases", kills):
            for moment in random.uniform(0, seconds, kills):
                kill_after(moment, folder, case)
            finish(folder, "phases", words)
            check_store(folder)
            assert case.left(folder) == undisturbed
