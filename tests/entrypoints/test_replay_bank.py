"""Which bank a replay is on when none is given, what is said of the versions of others."""

from dataclasses import replace

import pytest

from entrypoints import _replay_bank
from entrypoints._replay_bank import Known, open_replay_bank
from lvm.bank.store import Bank
from lvm.models.facts import facts_of
from lvm.tracking.datasets import DEFAULT_BANK
from lvm.tracking.versions import Card
from lvm.windows.export import plan_windows

OLD, NEW, WIDER = "data/old", "data/new", "data/wider"


@pytest.fixture
def banks(tiny_bank, monkeypatch) -> dict[str, Bank]:
    """Three banks by their paths, the last of which extends the first, and the default one."""
    sha256s = {OLD: "a" * 64, NEW: "b" * 64, WIDER: "c" * 64, DEFAULT_BANK: "d" * 64}
    made = {path: replace(tiny_bank, path=path, sha256=sha) for path, sha in sha256s.items()}
    made[WIDER] = replace(made[WIDER], bases=("a" * 64,))
    monkeypatch.setattr(_replay_bank, "read_bank", lambda path: made[path])
    return made


@pytest.fixture
def known(tiny_bank, banks):
    """Return what makes a registry of models on banks, in the order of their versions."""
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 20))

    def make(*versions: tuple[str, str], named: str = "all", baseline: str | None = None) -> Known:
        cards = {}
        for number, (model, path) in enumerate(versions, start=1):
            kind = "free" if model == "ema" else "trained"
            own = {"model": model, "kind": kind, "bank": path, "bank_sha256": banks[path].sha256}
            version = str(number)
            cards[version] = Card(f"models:/lvm/{number}", replace(facts, **own), version=version)
        chosen = None if named == "all" else [cards[version] for version in named]
        return Known(cards, chosen, baseline)

    return make


TWO_BANKS = (("memory_gru", OLD), ("transformer", NEW), ("ema", OLD))


@pytest.mark.parametrize(
    ("versions", "given", "path", "why"),
    [
        (TWO_BANKS, {}, NEW, "of version 2, the newest trained"),
        (TWO_BANKS, {"baseline": "1"}, NEW, "of version 2, the newest trained"),
        (TWO_BANKS, {"named": "12"}, OLD, "of version 1, the first named"),
        (TWO_BANKS, {"named": "3"}, OLD, "of version 3, the first named"),
        (TWO_BANKS, {"named": ""}, NEW, "of version 2, the newest trained"),
        ((("ema", OLD), ("ema", NEW)), {"baseline": "1"}, OLD, "of version 1, the baseline"),
        ((("ema", OLD), ("ema", NEW)), {}, NEW, "of version 2, the newest"),
        ((("ema", OLD), ("ema", NEW)), {"baseline": "9"}, NEW, "of version 2, the newest"),
        ((), {}, DEFAULT_BANK, "the default"),
    ],
)
def test_a_version_chooses_the_bank(known, banks, capsys, versions, given, path, why):
    assert open_replay_bank(None, known(*versions, **given), promote=False) is banks[path]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.partition(";")[0] == f"bank {path} ({why})"


def test_versions_of_other_banks_are_named_as_left_out(known, capsys):
    others = (("memory_gru", OLD), ("res_mlp", OLD), ("transformer", NEW), ("ema", OLD))
    left_out = "left out, as of other banks: versions 1, 2; give bank=<path> for those"
    open_replay_bank(None, known(*others), promote=False)
    assert capsys.readouterr().out.endswith(f"; {left_out}\n")
    open_replay_bank(NEW, known(*others, baseline="3"), promote=True)
    assert capsys.readouterr().out == f"{left_out}\n"
    open_replay_bank(NEW, known(*others, baseline="1"), promote=True)
    assert ": version 2;" in capsys.readouterr().out, "a baseline takes part, refused or not"
    open_replay_bank(NEW, known(*others, named="12"), promote=True)
    open_replay_bank(OLD, known(*others[:2]), promote=True)
    assert capsys.readouterr().out == ""


def test_versions_of_a_base_take_part_on_what_extends_it(known, capsys):
    wider = known(("memory_gru", OLD), ("transformer", WIDER))
    assert open_replay_bank(None, wider, promote=True).path == WIDER
    assert "left out" not in capsys.readouterr().out


def test_a_bank_that_was_replaced_by_another_is_refused(known, banks):
    there = known(("memory_gru", OLD), ("transformer", NEW))
    banks[NEW] = replace(banks[NEW], sha256="e" * 64)
    with pytest.raises(ValueError) as refused:
        open_replay_bank(None, there, promote=False)
    assert str(refused.value) == (
        "bank: version 2, the newest trained, was made from another bank than lies at data/new now "
        "(bbbbbbbbbbbb, not eeeeeeeeeeee); give bank=<path of the one to replay on>"
    )
    assert open_replay_bank(NEW, there, promote=False) is banks[NEW]
    banks[NEW] = replace(banks[NEW], bases=("b" * 64,))
    assert open_replay_bank(None, there, promote=False) is banks[NEW]


def test_a_first_baseline_among_several_banks_needs_a_bank(known):
    for named in ("all", "21", ""):
        several = known(*TWO_BANKS, named=named)
        with pytest.raises(
            ValueError, match="^bank: none was given.*, versions? 1 of other banks;"
        ):
            open_replay_bank(None, several, promote=True)
        open_replay_bank(NEW, several, promote=True)
        open_replay_bank(None, several, promote=False)
    open_replay_bank(None, known(*TWO_BANKS, named="2"), promote=True)
    open_replay_bank(None, known(*TWO_BANKS, baseline="3"), promote=True)
