"""SIGKILL at random moments: the same command again ends as if nothing had happened."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lvm.system.seeding import generator
from lvm.tracking.registry import NAME, Registry
from tests.checkout import copy_project
from tests.faults.conftest import Tally
from tests.faults.workplace import Workplace, files_sha256
from tests.synthetic import make_bank

registry = Registry()

pytestmark = pytest.mark.faults

KILLS = 20
CHAINS = 4  # of `phases`: five kills, one after the other, then the good end
MODEL = "--model memory_gru --hidden 8 --layers 2 --chunk 5 --slots 2 --negatives 32".split()
TRAIN = ("train", "--bank", "bank", "--ctx", "20", *MODEL, "--epochs", "4")
SENTENCES = "The sum has {} terms. Each of the {} terms is taken once. Then {} remains."


@dataclass(frozen=True)
class Case:
    """A command, those that must have run before, what it leaves that must never differ."""

    words: tuple[str, ...]
    left: Callable[[Workplace], Any]
    before: tuple[tuple[str, ...], ...] = ()


def ingested(place: Workplace) -> Any:
    return files_sha256(place.folder / "data" / "mine")


def exported(place: Workplace) -> Any:
    return files_sha256(place.folder / "data" / "windows")


def trained(place: Workplace) -> Any:
    run, client = place.latest("train"), place.open_store()
    history = client.get_metric_history(run.info.run_id, "val/hit_at_5")
    (model,) = client.search_logged_models(["0"], f"source_run_id = '{run.info.run_id}'")
    weights = files_sha256(Path(model.artifact_location) / "artifacts")
    assert not list((place.folder / "data" / "training").glob("*.safetensors"))
    return weights, [(one.step, one.value) for one in history], place.report("train")


def evaluated(place: Workplace) -> Any:
    return place.report("eval"), place.artifact("eval", "predictions.npy")


def replayed(place: Workplace) -> Any:
    """Return the baseline with the figures that it stands on."""
    client = place.open_store()
    holder = client.get_model_version(NAME, registry.aliases()["baseline"])
    outcomes = place.report("shadow-eval")["outcomes"]
    return holder.tags["model"], [(one["name"], one["figures"]) for one in outcomes]


def paged(place: Workplace) -> Any:
    return place.artifact("phases", "report.md")


CASES = {
    "ingest": Case(tuple("ingest --source text --bank data/mine".split()), ingested),
    "export": Case(tuple("export --bank bank --ctx 20".split()), exported),
    "train": Case(TRAIN, trained),
    "eval": Case(tuple("eval --model models:/lvm/1 --bank bank".split()), evaluated, (TRAIN,)),
    "shadow-eval": Case(
        tuple("shadow_eval --bank bank --promote enabled".split()), replayed, (TRAIN,)
    ),
}


def prepared(root: Path, case: Case) -> Workplace:
    """Return a workplace with a bank, a folder of text, what the commands before left."""
    place = Workplace(root)
    place.folder.mkdir()
    make_bank(place.folder / "bank", num_sequences=8, num_documents=30, num_twins=40)
    (place.folder / "text").mkdir()
    for number in range(40):
        lines = [SENTENCES.format(i, number, i + number) for i in range(200)]
        (place.folder / "text" / f"{number}.txt").write_text("\n".join(lines))
    for words in case.before:
        place.finish(*words)
    place.keep()
    return place


def undisturbed(place: Workplace, case: Case) -> tuple[Any, float]:
    """Return what the command leaves, after how many seconds; it runs twice for its caches."""
    place.finish(*case.words)
    place.restore()
    begun = time.monotonic()
    place.finish(*case.words)
    seconds = time.monotonic() - begun
    return case.left(place), seconds


def kill_after(seconds: float, place: Workplace, case: Case) -> None:
    """Kill a command after so many seconds; its children have to notice by themselves."""
    started = place.start(*case.words)
    if not started.ends_within(seconds):
        os.kill(started.pid, signal.SIGKILL)
        started.ended()
    assert started.remains() == [], "children have ended, too"


@pytest.mark.parametrize("name", CASES)
def test_a_killed_command_is_run_again(name: str, tmp_path: Path, tally: Tally) -> None:
    case = CASES[name]
    place = prepared(tmp_path, case)
    expected, seconds = undisturbed(place, case)
    for moment in sorted(generator(0, f"kills of {name}").uniform(0, seconds, KILLS)):
        place.restore()
        with tally.injecting(f"SIGKILL in {name}"):
            kill_after(moment, place, case)
            place.finish(*case.words)
            place.check()
            assert case.left(place) == expected
            remains = [path for path in place.folder.rglob(".*") if path.is_dir()]
            assert not remains, "nothing that a killed process had begun is left"


def test_phases_killed_again_and_again_end_in_the_same_page(tmp_path: Path, tally: Tally) -> None:
    place = Workplace(tmp_path)
    place.folder.mkdir()
    copy_project(place.folder)
    make_bank(place.folder / "bank", num_sequences=4, num_documents=24, document_rows=38)
    place.keep()
    words = "phases --phases 1,2 --size tiny --bank bank --max-queries 300".split()
    case = Case(tuple(words), paged)
    begun = time.monotonic()
    place.finish(*case.words)
    seconds, expected = time.monotonic() - begun, case.left(place)
    random = generator(0, "kills of phases")
    for _ in range(CHAINS):
        place.restore()
        kills = KILLS // CHAINS
        with tally.injecting("SIGKILL in phases", kills):
            for moment in random.uniform(0, seconds, kills):
                kill_after(moment, place, case)
            place.finish(*case.words)
            place.check()
            assert case.left(place) == expected
