"""Eight processes at once on one store and one bank: no error, no lost figure, one valid alias."""

import json
from pathlib import Path

import pytest

from tests.faults.commands import Ended
from tests.faults.test_storage import SIZES, Place
from tests.faults.test_tracking_store import logged_epochs
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults
EPOCHS = 3
BANK = ("--bank", "../bank", "--ctx", "20")
PROMOTING = ("shadow_eval", "--bank", "../bank", "--promote", "enabled")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A working folder beside a bank, and nothing else: no store, no windows."""
    root = tmp_path_factory.mktemp("eight")
    make_bank(root / "bank", num_sequences=3)
    (root / "work").mkdir()
    return Place(root / "work", root / "work")


def at_once(place: Place, commands: list[tuple[str, ...]]) -> list[Ended]:
    """Run the commands together; each may take its part of two cores."""
    started = [place.start(*words) for words in commands]
    return [one.ended(900) for one in started]


def train(seed: int) -> tuple[str, ...]:
    report = ("--report", f"train-{seed}.json", "--epochs", str(EPOCHS))
    return ("train", *BANK, *SIZES, "--seed", str(seed), *report)


@pytest.fixture(scope="module")
def cold(place: Place) -> list[Ended]:
    """Four trainings, two evaluations, two promotions, where nothing is there."""
    evaluations = [("eval", "--model", name, *BANK) for name in ("ema", "copy-last")]
    shadows = [(*PROMOTING, "--ctx", "20")] * 2
    return at_once(place, [*map(train, range(4)), *evaluations, *shadows])


def test_a_cold_start_of_eight(tally, place, cold):
    with tally.injecting("eight processes at once: cold start", 8):
        assert [one.code for one in cold] == [0] * 8, [one for one in cold if one.code]
        assert runs(place) == [("FINISHED", 8)]
        assert [path.name for path in place.folder.glob("data/windows/ctx*")] == ["ctx20"]
        digests = place.rows("SELECT DISTINCT value FROM tags WHERE key = 'windows_sha256'")
        assert len(digests) == 1


def test_no_figure_of_an_epoch_is_lost(tally, place, cold):
    with tally.injecting("eight processes at once: figures of epochs", 4 * EPOCHS):
        assert logged_epochs(place) == [list(range(1, EPOCHS + 1))] * 4
        by_run: dict[str, set[tuple[str, int, float]]] = {}
        for run, *figure in place.rows("SELECT run_uuid, key, step, value FROM metrics"):
            by_run.setdefault(run, set()).add(tuple(figure))
        for seed in range(4):
            report = json.loads((place.folder / f"train-{seed}.json").read_text())
            wanted = {
                (name, int(record["epoch"]), value)
                for record in report["history"]
                for name, value in record.items()
                if name != "epoch"
            }
            assert any(wanted <= kept for kept in by_run.values())


def test_promotions_at_once(tally, place, cold):
    """Some find the alias moved by another, which is a refusal in one line, not an error."""
    assert len(place.rows("SELECT version FROM model_versions")) >= 5
    asked = [("promote", "--version", str(version), "--reason", "by hand") for version in (1, 2, 3)]
    asked += [("rollback",)] * 2 + [PROMOTING, PROMOTING]
    asked += [("eval", "--model", "models:/lvm/1")]
    with tally.injecting("eight processes at once: promotions", 8):
        for words, one in zip(asked, at_once(place, asked), strict=True):
            if one.code != 0:
                assert words[0] in ("promote", "rollback"), one
                assert any(known in one.line() for known in REFUSALS), one.line()
        check_alias(place)


REFUSALS = ("is the baseline already", "baseline moved from", "no previous baseline is recorded")


def check_alias(place: Place) -> None:
    """The alias names a version, the last one that the history says; no move is half done."""
    aliases = dict(place.rows("SELECT alias, version FROM registered_model_aliases"))
    known = {version for (version,) in place.rows("SELECT version FROM model_versions")}
    assert set(aliases.values()) <= known and "baseline" in aliases
    tags = dict(place.rows("SELECT key, value FROM registered_model_tags"))
    assert "pending_move" not in tags
    moves = [json.loads(tags[key]) for key in sorted(tags) if key.startswith("move/")]
    assert moves[-1]["version"] == str(aliases["baseline"])
    for before, after in zip(moves, moves[1:], strict=False):
        assert after["replaced"] == before["version"]


def runs(place: Place) -> list[tuple[str, int]]:
    return place.rows("SELECT status, count(*) FROM runs GROUP BY 1")


def test_eight_make_one_bank(tally, tmp_path: Path, place, cold):
    """Three ingest texts to one folder that the others wait for."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        lines = [
            f"# Part {part}\n\nThe river number {part} of {number} is long." for part in range(40)
        ]
        (texts / f"{number}.md").write_text("\n\n".join(lines))
    asked = [("ingest", "--source", str(texts), "--bank", "made")] * 8
    with tally.injecting("eight processes at once: one bank", 8):
        ended = at_once(place, asked)
        assert [one.code for one in ended] == [0] * 8, [one for one in ended if one.code]
        assert sum("written in" in one.printed for one in ended) == 1
        assert len({one.printed.split("sha256 ")[1][:64] for one in ended}) == 1
