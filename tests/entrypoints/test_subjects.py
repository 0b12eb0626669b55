"""Whether a predictor may know the answers; how what it retrieves is shown."""

import dataclasses

import numpy as np
import pytest

from entrypoints.predict import passages_table, shorten
from lvm.models.baselines import CopyLast
from lvm.models.facts import facts_of
from lvm.models.table import FREE_MODELS
from lvm.retrieval.index import build_index
from lvm.serving.passages import Retriever
from lvm.tracking.datasets import Inputs
from lvm.tracking.logged_models import Predictor, Subject
from lvm.windows.export import plan_windows


@pytest.mark.parametrize("name", [*FREE_MODELS, "memory_gru"])
def test_all_that_was_fitted_on_another_bank_is_marked(name, tiny_bank):
    windows = plan_windows(tiny_bank, 20)
    inputs = Inputs(tiny_bank, windows, None)
    own = facts_of(name, "none", tiny_bank, windows)
    foreign = dataclasses.replace(own, bank_sha256="0" * 64)
    marked = [
        Subject(name, Predictor(name, facts, model=CopyLast(16)), inputs).is_leaky()
        for facts in (own, foreign)
    ]
    assert marked == [False, name not in ("copy-last", "context-mean")]


def test_rows_that_no_list_held_are_not_shown_as_passages(tiny_bank):
    retriever = Retriever(build_index(tiny_bank, lambda: None), 20, None)
    (found,) = retriever.describe(np.array([7, -1]), np.array([0.5, -np.inf], np.float32))
    texts = tiny_bank.texts()
    assert found["row"] == 7 and found["text"] == texts[7] and found["score"] == 0.5
    assert found["lane"] == tiny_bank.lanes[tiny_bank.lane_N[7]]
    report = {"model": "ema", "context_rows": 3, "score": "cosine", "search": "exhaustive"}
    shown = passages_table(report | {"passages": [found]}, 2)
    assert "sequence-0" in shown and found["lane"] in shown
    assert shown.splitlines()[-1] == "1 of 2 found: the lists that were read hold no more"


def test_long_cells_are_cut_with_a_mark():
    assert shorten("abc", 3) == "abc" and shorten("abcd", 3) == "ab…"
