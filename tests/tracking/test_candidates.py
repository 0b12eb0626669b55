"""Which bank a replay is on when none is given, what is said of the versions of others."""

from dataclasses import replace

import pytest

from lvm.bank.bank import Bank
from lvm.models.facts import facts_of
from lvm.tracking.candidates import Registered, choose_bank
from lvm.tracking.registry import Card
from lvm.windows.export import plan_windows

OLD, NEW, WIDER, DEFAULT = "data/old", "data/new", "data/wider", "data/bank"


@pytest.fixture
def banks(tiny_bank) -> dict[str, Bank]:
    """Three banks by their paths, the last of which extends the first, and the default one."""
    sha256s = {OLD: "a" * 64, NEW: "b" * 64, WIDER: "c" * 64, DEFAULT: "d" * 64}
    made = {
        path: replace(tiny_bank, path=path or "data/bank", sha256=sha)
        for path, sha in sha256s.items()
    }
    made[WIDER] = replace(made[WIDER], bases=("a" * 64,))
    return made


@pytest.fixture
def known(tiny_bank, banks):
    """Return what makes a registry of models on banks, in the order of their versions."""
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 20))

    def make(
        *versions: tuple[str, str], named: str = "all", baseline: str | None = None
    ) -> Registered:
        cards = {}
        for number, (model, path) in enumerate(versions, start=1):
            kind = "free" if model == "ema" else "trained"
            own = {"model": model, "kind": kind, "bank": path, "bank_sha256": banks[path].sha256}
            version = str(number)
            cards[version] = Card(f"models:/lvm/{number}", replace(facts, **own), version=version)
        chosen = None if named == "all" else [cards[version] for version in named]
        return Registered(cards, chosen, baseline)

    return make


@pytest.fixture
def opened(banks):
    """Return what opens the bank of a replay among these banks."""

    def choose(path: str | None, registry: Registered, promote: bool) -> Bank:
        return choose_bank(path, registry, promote, banks.__getitem__)

    return choose


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
        ((), {}, DEFAULT, "the default"),
    ],
)
def test_a_version_chooses_the_bank(opened, known, banks, capsys, versions, given, path, why):
    assert opened(None, known(*versions, **given), promote=False) is banks[path]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.partition(";")[0] == f"bank {banks[path].path} ({why})"


def test_versions_of_other_banks_are_named_as_left_out(opened, known, capsys):
    others = (("memory_gru", OLD), ("res_mlp", OLD), ("transformer", NEW), ("ema", OLD))
    left_out = "left out, as of other banks: versions 1, 2; give bank=<path> for those"
    opened(None, known(*others), promote=False)
    assert capsys.readouterr().out.endswith(f"; {left_out}\n")
    opened(NEW, known(*others, baseline="3"), promote=True)
    assert capsys.readouterr().out == f"{left_out}\n"
    opened(NEW, known(*others, baseline="1"), promote=True)
    assert ": version 2;" in capsys.readouterr().out, "a baseline takes part, refused or not"
    opened(NEW, known(*others, named="12"), promote=True)
    opened(OLD, known(*others[:2]), promote=True)
    assert capsys.readouterr().out == ""


def test_versions_of_a_base_take_part_on_what_extends_it(opened, known, capsys):
    wider = known(("memory_gru", OLD), ("transformer", WIDER))
    assert opened(None, wider, promote=True).path == WIDER
    assert "left out" not in capsys.readouterr().out


def test_a_bank_that_was_replaced_by_another_is_refused(opened, known, banks):
    there = known(("memory_gru", OLD), ("transformer", NEW))
    banks[NEW] = replace(banks[NEW], sha256="e" * 64)
    with pytest.raises(ValueError) as refused:
        opened(None, there, promote=False)
    assert str(refused.value) == (
        "bank: version 2, the newest trained, was made from another bank than lies at data/new now "
        "(bbbbbbbbbbbb, not eeeeeeeeeeee); give bank=<path of the one to replay on>"
    )
    assert opened(NEW, there, promote=False) is banks[NEW]
    banks[NEW] = replace(banks[NEW], bases=("b" * 64,))
    assert opened(None, there, promote=False) is banks[NEW]


def test_a_first_baseline_among_several_banks_needs_a_bank(opened, known):
    for named in ("all", "21", ""):
        several = known(*TWO_BANKS, named=named)
        with pytest.raises(
            ValueError, match="^bank: none was given.*, versions? 1 of other banks;"
        ):
            opened(None, several, promote=True)
        opened(NEW, several, promote=True)
        opened(None, several, promote=False)
    opened(None, known(*TWO_BANKS, named="2"), promote=True)
    opened(None, known(*TWO_BANKS, baseline="3"), promote=True)
