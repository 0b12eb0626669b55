"""Which predictors a training may start from."""

import dataclasses
from pathlib import Path

import pytest

from entrypoints._initial import read_initial
from entrypoints._inputs import Inputs
from lvm.checkpoint.facts import facts_of
from lvm.models.baselines import CopyLast
from lvm.registry import registered
from lvm.registry.registered import Predictor
from lvm.windows.export import plan_windows


@pytest.fixture
def asked(tiny_bank, monkeypatch):
    """Inputs with a registry of one predictor, whose facts the test may change."""
    windows = plan_windows(tiny_bank, 20)
    asked = {"facts": facts_of("memory_gru", "none", tiny_bank, windows), "references": []}

    def load(reference: str) -> Predictor:
        asked["references"].append(reference)
        return Predictor(reference, asked["facts"], model=CopyLast(16))

    monkeypatch.setattr(registered, "load", load)
    asked["inputs"] = Inputs(tiny_bank, windows, Path("windows"), None)
    return asked


def test_a_number_is_a_version(asked):
    assert read_initial(None, asked["inputs"]) is None
    assert asked["references"] == []
    for reference in ("3", "models:/lvm@baseline", "runs:/abc/model"):
        assert isinstance(read_initial(reference, asked["inputs"]), CopyLast)
    assert asked["references"] == ["models:/lvm/3", "models:/lvm@baseline", "runs:/abc/model"]


def test_a_trunk_of_another_context_length_may_be_grown(asked, tiny_bank):
    asked["facts"] = facts_of("memory_gru", "none", tiny_bank, plan_windows(tiny_bank, 10))
    asked["facts"] = dataclasses.replace(asked["facts"], ctx=10)
    assert read_initial("1", asked["inputs"]) is not None


def test_a_model_of_the_bank_that_this_one_extends_may_be_grown(asked, tiny_bank):
    asked["facts"] = dataclasses.replace(asked["facts"], bank_sha256="1" * 64)
    bank = dataclasses.replace(tiny_bank, bases=("1" * 64,))
    inputs = dataclasses.replace(asked["inputs"], bank=bank)
    assert read_initial("1", inputs) is not None


@pytest.mark.parametrize("changed", [{"bank_sha256": "0" * 64}, {"seed": 7}, {"split": "random"}])
def test_what_may_have_seen_val_rows_is_refused(asked, monkeypatch, changed):
    facts = dataclasses.replace(asked["facts"], **changed)
    monkeypatch.setattr(
        registered, "load", lambda reference: Predictor(reference, facts, model=CopyLast(16))
    )
    with pytest.raises(ValueError, match="init: 1 was trained on bank") as caught:
        read_initial("1", asked["inputs"])
    assert "\n" not in str(caught.value)
