"""Whether a predictor may know the answers; how what it retrieves is shown."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import write_bank
from lvm.models.baselines import CopyLast
from lvm.models.facts import facts_of
from lvm.models.table import FREE_MODELS
from lvm.report.evaluation import passages_table, shorten
from lvm.retrieval.index import build_index
from lvm.serving.batch import read_contexts, score_name
from lvm.serving.predictor import Retriever
from lvm.tracking import runs
from lvm.tracking.candidates import Wanted, gather
from lvm.tracking.datasets import DEFAULT_CTX, Inputs
from lvm.tracking.logged_models import Predictor, Subject, open_subject
from lvm.windows.export import longest_context, plan_windows
from tests.conftest import copy_store
from tests.synthetic import make_bank


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


def test_the_definition_of_an_older_row_correction_is_told(tiny_bank):
    pair_N2 = np.ones((tiny_bank.num_rows, 2), np.float32)
    corrected, plain = (
        Retriever(build_index(tiny_bank, lambda: None, pair), 20, None) for pair in (pair_N2, None)
    )
    now = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 20))
    before = dataclasses.replace(now, fit_version=1)
    assert "own document" in score_name(corrected, "none", before)
    assert score_name(corrected, "none", now) == "cosine with row correction"
    assert score_name(plain, "none", before) == "cosine"


def test_long_cells_are_cut_with_a_mark():
    assert shorten("abc", 3) == "abc" and shorten("abcd", 3) == "ab…"


def test_one_context_or_a_batch_of_them_is_read(tmp_path, tiny_bank):
    context_BTD = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    np.save(tmp_path / "batch.npy", context_BTD)
    np.save(tmp_path / "one.npy", context_BTD[0])
    np.save(tmp_path / "flat.npy", context_BTD[0, 0])
    batch, one = (
        read_contexts(None, str(tmp_path / name), tiny_bank)[0] for name in ("batch.npy", "one.npy")
    )
    assert batch.shape == (3, 5, 16) and np.array_equal(one, batch[:1])
    with pytest.raises(ValueError, match=r"shape \(16,\) is not \(batch, time, 16\)"):
        read_contexts(None, str(tmp_path / "flat.npy"), tiny_bank)


def test_a_text_is_read_in_any_unicode_encoding(tmp_path):
    rows = pd.DataFrame({"sequence": ["s"] * 3})
    vectors = np.random.default_rng(0).standard_normal((3, 256))
    bank = write_bank(tmp_path / "bank", vectors, rows, "wordllama", "test")
    text = "The caf\u00e9 adds all elements of an array.\nIt returns their sum over one axis.\n"
    found = []
    for encoding, newline in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n")):
        path = tmp_path / f"{encoding}.txt"
        path.write_text(text, encoding=encoding, newline=newline)
        found.append(read_contexts(str(path), None, bank))
    vector_BTD, texts = found[0]
    assert vector_BTD.shape == (1, 2, 256) and np.shape(texts) == (1, 2)
    assert all(np.array_equal(one, vector_BTD) and own == texts for one, own in found)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for name, reason in (("bytes.txt", "not UTF-8 or UTF-16 text"), ("no.txt", "cannot be read")):
        with pytest.raises(ValueError, match=reason):
            read_contexts(str(tmp_path / name), None, bank)


def test_the_default_context_is_no_longer_than_the_bank_has(tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)
    copy_store(empty_store, tmp_path / "store", monkeypatch)
    bank = make_bank(tmp_path / "bank", num_sequences=8, num_documents=30, num_twins=0)
    longest = longest_context(bank)
    assert longest < DEFAULT_CTX
    with runs.run("eval", {}):
        subject = open_subject("ema", "bank", None)
        field = gather(Wanted("all", "bank", register=False))
    assert subject.inputs.windows.ctx == field.windows.ctx == longest
