"""Two banks in one store, each with a registry of its own: nothing is moved by hand."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import eval as eval_command
from entrypoints import phases, predict, promote, rollback, shadow_eval, train
from lvm.bank.bank import open_bank
from lvm.tracking import logged_models
from lvm.tracking.registry import Registry
from tests.conftest import copy_store
from tests.entrypoints.test_pipeline import TINY_MODEL
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow
FIRST, SECOND = Registry(), Registry("second")
TRAINING = ["--ctx", "20", *TINY_MODEL]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with two banks of different vectors and widths, and one store."""
    folder = tmp_path_factory.mktemp("two-banks")
    make_bank(folder / "first", num_sequences=8, num_documents=30, num_twins=40)
    make_bank(folder / "second", num_sequences=8, num_documents=30, num_twins=0, dim=24, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def trained(workplace):
    """A version of each bank in its own registry."""
    assert train.main(["--bank", "first", *TRAINING]) == 0
    assert train.main(["--bank", "second", "--registry", "second", *TRAINING]) == 0
    return workplace


@pytest.fixture(scope="module")
def decided(trained):
    """A baseline of each bank, as two replays decided."""
    for bank, registry in (("first", "lvm"), ("second", "second")):
        words = ["--bank", bank, "--registry", registry, "--promote", "enabled"]
        assert shadow_eval.main(words) == 0
    return trained


def refusal(capsys, main, *words: str) -> str:
    """Return the line by which a command refuses."""
    capsys.readouterr()
    assert main([*words]) == 2
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("error: "))
    return line


def test_each_bank_has_its_own_baseline(decided):
    for registry, bank in ((FIRST, "first"), (SECOND, "second")):
        card = logged_models.read_card(registry.baseline_uri)
        assert card.facts.bank_sha256 == open_bank(Path(bank)).sha256
        assert (card.registry, card.version) == (registry.name, registry.aliases()["baseline"])
        assert {one.facts.bank_sha256 for one in registry.cards()} == {card.facts.bank_sha256}
        assert {move["how"] for move in registry.history()} == {"decided"}, "nothing by hand"


def test_one_is_served_beside_the_other(decided):
    served = [mlflow.pyfunc.load_model(one.baseline_uri) for one in (FIRST, SECOND)]
    for model, bank in zip(served, ("first", "second"), strict=True):
        context = open_bank(Path(bank)).unit(slice(0, 12))[None]
        found = model.predict(context, params={"k": 3})
        assert len(found["rows"][0]) == 3
    for registry, bank in (("lvm", "first"), ("second", "second")):
        np.save("context.npy", open_bank(Path(bank)).unit(slice(0, 12)))
        assert predict.main(["--context", "context.npy", "--registry", registry]) == 0
        words = ["--registry", registry, "--controls", "false", "--report", "report.json"]
        assert eval_command.main([*words, "--max-queries", "50"]) == 0
        report = json.loads(Path("report.json").read_text())
        assert report["bank_sha256"] == open_bank(Path(bank)).sha256


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["--bank", "second", *TRAINING]),
        (shadow_eval.main, ["--bank", "second"]),
        (phases.main, ["--bank", "second", "--size", "tiny"]),
    ],
)
def test_a_bank_of_another_registry_is_refused_with_what_to_type(decided, capsys, main, words):
    before = FIRST.versions()
    line = refusal(capsys, main, *words)
    assert "registry: lvm holds versions of bank" in line and "first" in line
    assert line.endswith("give this bank a registry of its own, such as registry=second")
    assert FIRST.versions() == before


def test_the_default_model_of_another_bank_is_refused(decided, capsys):
    line = refusal(capsys, eval_command.main, "--bank", "second")
    assert line.endswith("such as registry=second")


def test_a_registry_named_wrongly_is_refused(workplace, capsys):
    line = refusal(capsys, shadow_eval.main, "--registry", "a/b")
    assert line == "error: registry: 'a/b' is not a name; use letters, digits, '_', '.' and '-'"


def test_a_move_in_one_registry_leaves_the_other(decided):
    before, held = FIRST.aliases(), SECOND.aliases()["baseline"]
    other = next(version for version in SECOND.versions() if version != held)
    words = ["--version", other, "--reason", "a test", "--registry", "second"]
    assert promote.main(words) == 0
    assert SECOND.aliases() == {"baseline": other, "previous": held}
    assert rollback.main(["--registry", "second"]) == 0
    assert SECOND.aliases()["baseline"] == held and FIRST.aliases() == before


def test_an_old_store_with_two_banks_in_one_registry_reads_as_before(decided, capsys):
    """An earlier lvm put versions of every bank into `lvm`."""
    card = SECOND.cards()[0]
    version = FIRST.register(str(card.model_id), card.facts)
    assert shadow_eval.main(["--bank", "second"]) == 0
    assert "left out, as of other banks" in capsys.readouterr().out
    MlflowClient().delete_model_version("lvm", version)
