"""Windows cut without leaks, written as row numbers only."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.bank.bank import Bank, write_bank
from lvm.windows.export import (
    VIOLATIONS,
    audit_windows,
    ensure_windows,
    export_windows,
    open_windows,
    plan_windows,
    write_windows,
)
from lvm.windows.planning import (
    SPLITS,
    Windows,
    contents_sha256,
    num_flat_windows,
    split_by_document,
    train_windows,
)
from tests.synthetic import make_bank

CTX = 30


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, CTX)


def small_bank(path: Path, sequence_rows: list[int], document_rows: int, pinned: int = 0) -> Bank:
    """Write a bank of random rows with sequences of the given lengths.

    The last `pinned` sequences are pinned to train, the first where it is negative.
    """
    sequence = np.repeat(np.arange(len(sequence_rows)), sequence_rows)
    place = np.concatenate([np.arange(n) for n in sequence_rows])
    rows = pd.DataFrame(
        {
            "sequence": [f"s{code}" for code in sequence],
            "document": [f"d{number // document_rows}" for number in place],
        }
    )
    if pinned:
        is_pinned = sequence >= len(sequence_rows) - pinned if pinned > 0 else sequence < -pinned
        rows["split"] = np.where(is_pinned, "train", None)
    vectors = np.random.default_rng(0).standard_normal((len(rows), 8))
    return write_bank(path, vectors, rows, "random", "test")


@pytest.mark.parametrize(
    ("ctx", "num_train", "num_val"),
    [(100, 11_482, 1_275), (500, 2_295, 254), (1000, 1_146, 127), (2000, 572, 63)],
)
def test_flat_windows_are_as_many_as_the_old_system_had(ctx: int, num_train: int, num_val: int):
    assert num_flat_windows(637_997, ctx, ctx // 2) == (num_train, num_val)


def test_no_document_is_divided(tiny_bank: Bank):
    split_N = split_by_document(tiny_bank, seed=0)
    pairs = pd.DataFrame({"document": tiny_bank.document_N, "split": split_N})
    assert (pairs.groupby("document")["split"].nunique() == 1).all()


def test_long_sequences_are_cut_80_10_10_in_reading_order(tmp_path: Path):
    bank = small_bank(tmp_path / "bank", [1000, 500], document_rows=10)
    split_N = split_by_document(bank, seed=0)
    expected = [0] * 800 + [1] * 100 + [2] * 100 + [0] * 400 + [1] * 50 + [2] * 50
    assert split_N.tolist() == expected


def test_short_sequences_go_whole_to_one_split_by_seed(tmp_path: Path):
    bank = small_bank(tmp_path / "bank", [12] * 100, document_rows=4)
    split_N = split_by_document(bank, seed=0)
    assert all(len(set(split_N[bank.sequence_N == code])) == 1 for code in range(100))
    assert np.bincount(split_N).tolist() == [80 * 12, 10 * 12, 10 * 12]
    assert (split_by_document(bank, seed=0) == split_N).all()
    assert (split_by_document(bank, seed=1) != split_N).any()


def test_pinned_sequences_are_train_and_leave_the_split_of_the_others_as_it_was(tmp_path: Path):
    lengths = [1000, *[12] * 100]
    base = small_bank(tmp_path / "base", lengths, document_rows=10)
    extended = small_bank(
        tmp_path / "extended", [*lengths, *[11] * 40], document_rows=10, pinned=40
    )
    between = small_bank(tmp_path / "between", [11, *lengths], document_rows=10, pinned=-1)
    split_N = split_by_document(base, seed=3)
    assert set(split_N[1000:]) == {0, 1, 2}
    assert split_by_document(extended, seed=3).tolist() == split_N.tolist() + [0] * 440
    assert split_by_document(between, seed=3)[:11].tolist() == [0] * 11
    assert (np.bincount(split_by_document(between, seed=3)[11:]) == np.bincount(split_N)).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 20), st.data())
def test_train_windows_supervise_every_row_of_a_run_but_its_first(
    lengths: list[int], ctx: int, data: st.DataObject
):
    overlap = data.draw(st.integers(0, ctx - 1))
    run_rows = np.array(lengths)
    run_start = np.cumsum(run_rows + 1) - run_rows  # one foreign row between the runs
    window_W2 = train_windows(run_start, run_rows, ctx, overlap)
    targets = [row for start, rows in window_W2 for row in range(start + 1, start + rows + 1)]
    expected = {s + t for s, n in zip(run_start, lengths, strict=True) for t in range(1, n)}
    assert set(targets) == expected
    assert window_W2[:, 1].max(initial=0) <= ctx
    assert len({tuple(window) for window in window_W2.tolist()}) == len(window_W2)


def test_train_windows_read_only_train_rows_of_one_sequence(tiny_bank: Bank, windows: Windows):
    for start, rows in zip(*windows.train_windows(), strict=True):
        touched = slice(start, start + rows + 1)
        assert (windows.split_N[touched] == 0).all()
        assert len(set(tiny_bank.sequence_N[touched])) == 1
        assert rows <= CTX


def test_held_out_windows_end_before_a_target_of_their_split(windows: Windows):
    for code in (1, 2):
        chosen = windows.window_split_W == code
        assert chosen.any()
        target_W = windows.window_start_W[chosen] + CTX
        assert (windows.window_rows_W[chosen] == CTX).all()
        assert (windows.split_N[target_W] == code).all()


@pytest.mark.parametrize("name", ["val", "test"])
def test_queries_are_all_rows_of_the_split_without_twins_in_train(
    name: str, tiny_bank: Bank, windows: Windows
):
    in_train = set(windows.representative_N[windows.train_rows()].tolist())
    origin_N = tiny_bank.sequence_start_N()
    expected, dropped = set(), 0
    for row in range(tiny_bank.num_rows):
        if SPLITS[windows.split_N[row]] == name and row > origin_N[row]:
            is_twin = int(windows.representative_N[row]) in in_train
            dropped += is_twin
            expected |= set() if is_twin else {row}
    queries = windows.queries[name]
    assert dropped > 0
    assert windows.counts[f"{name}_dropped_twins"] == dropped
    assert set(queries.target_row_Q.tolist()) == expected
    assert len(queries) == len(expected)
    first = np.maximum(queries.target_row_Q - CTX, origin_N[queries.target_row_Q])
    assert (queries.first_row_Q == first).all()


def test_queries_do_not_depend_on_ctx(tiny_bank: Bank, windows: Windows):
    other = plan_windows(tiny_bank, 5, overlap=1)
    for name in ("val", "test"):
        queries = other.queries[name]
        assert (queries.target_row_Q == windows.queries[name].target_row_Q).all()
        again = queries.with_ctx(CTX)
        assert (again.first_row_Q == windows.queries[name].first_row_Q).all()
        assert again.ctx == CTX


def test_queries_stand_in_a_shuffled_frozen_order(tiny_bank: Bank, windows: Windows):
    queries = windows.queries["test"]
    assert (np.diff(queries.target_row_Q) < 0).any()
    assert (plan_windows(tiny_bank, CTX).queries["test"].target_row_Q == queries.target_row_Q).all()
    other = plan_windows(tiny_bank, CTX, seed=1).queries["test"]
    assert (other.target_row_Q != queries.target_row_Q).any()
    head = queries.head(7)
    assert len(head) == 7
    assert (head.target_row_Q == queries.target_row_Q[:7]).all()
    assert head.query_Q.tolist() == list(range(7))
    assert len(queries.head(10**9)) == len(queries)


def test_document_plan_has_a_clean_audit(windows: Windows):
    assert {name: windows.audit[name] for name in VIOLATIONS} == dict.fromkeys(VIOLATIONS, 0)
    assert windows.audit["val_targets_in_train_contexts"] == 0
    assert not windows.leaky


def test_random_plan_is_leaky_as_the_old_system_was(tmp_path: Path):
    bank = small_bank(tmp_path / "bank", [2000, 2000], document_rows=50)
    windows = plan_windows(bank, 20, split="random")
    num_train, num_val = num_flat_windows(4000, 20, 10)
    assert windows.leaky
    assert (windows.counts["train_windows"], windows.counts["val_windows"]) == (num_train, num_val)
    assert windows.audit["val_targets_in_train_contexts_share"] > 0.95
    assert windows.audit["windows_across_sequences"] > 0
    val, test = windows.queries["val"], windows.queries["test"]
    assert len(val) == num_val
    assert (val.target_row_Q == test.target_row_Q).all()
    assert (val.sequence_start_Q == 0).all()


def plant(windows: Windows, leak: str) -> Windows:
    """Return the plan with one leak of the given kind."""
    held_out = int(np.flatnonzero(windows.split_N == 1)[0])
    border = int(np.flatnonzero(np.diff(windows.split_N) == -2)[0])  # a sequence ends with test
    val = windows.queries["val"]
    if leak == "train_windows_with_held_out_inputs":
        return with_window(windows, held_out, 1, 0)
    if leak == "train_windows_with_held_out_targets":
        return with_window(windows, held_out - 2, 2, 0)
    if leak == "held_out_windows_with_foreign_targets":
        return with_window(windows, held_out - CTX, CTX, 2)
    if leak == "windows_across_sequences":
        return with_window(windows, border, 1, 0)
    if leak == "documents_in_two_splits":
        split_N = windows.split_N.copy()
        split_N[held_out + 1] = 0
        return dataclasses.replace(windows, split_N=split_N)
    if leak == "queries_with_twin_in_train":
        representative_N = windows.representative_N.copy()
        representative_N[val.target_row_Q[0]] = windows.train_rows()[0]
        return dataclasses.replace(windows, representative_N=representative_N)
    target_row_Q, first_row_Q = val.target_row_Q.copy(), val.first_row_Q.copy()
    if leak == "queries_of_another_split":
        target_row_Q[0] = windows.queries["test"].target_row_Q[0]
    elif leak == "contexts_across_sequences":
        place = int(np.argmax(target_row_Q))
        first_row_Q[place] = 0
    else:
        first_row_Q[0] = target_row_Q[0]
    planted = dataclasses.replace(val, target_row_Q=target_row_Q, first_row_Q=first_row_Q)
    return dataclasses.replace(windows, queries={**windows.queries, "val": planted})


def with_window(windows: Windows, start: int, rows: int, split: int) -> Windows:
    return dataclasses.replace(
        windows,
        window_start_W=np.append(windows.window_start_W, start),
        window_rows_W=np.append(windows.window_rows_W, rows),
        window_split_W=np.append(windows.window_split_W, np.int8(split)),
    )


@pytest.mark.parametrize("leak", VIOLATIONS)
def test_audit_counts_a_planted_leak(leak: str, tiny_bank: Bank, windows: Windows):
    assert audit_windows(tiny_bank, plant(windows, leak))[leak] > 0


@pytest.mark.parametrize(
    "leak", ["train_windows_with_held_out_targets", "queries_with_twin_in_train"]
)
def test_a_written_leak_is_refused_at_opening(
    leak: str, tiny_bank: Bank, windows: Windows, tmp_path: Path
):
    planted = plant(windows, leak)
    planted = dataclasses.replace(planted, sha256=contents_sha256(planted))
    write_windows(planted, tmp_path / "windows")
    with pytest.raises(ValueError, match="leak audit found 1 "):
        open_windows(tmp_path / "windows", tiny_bank)


def test_opening_gives_back_what_was_written(tiny_bank: Bank, windows: Windows, tmp_path: Path):
    windows = write_windows(windows, tmp_path / "windows")
    opened = open_windows(tmp_path / "windows", tiny_bank)
    for field in dataclasses.fields(Windows):
        if field.name == "queries":
            continue
        written, read = getattr(windows, field.name), getattr(opened, field.name)
        assert np.array_equal(written, read), field.name
        assert getattr(written, "dtype", None) == getattr(read, "dtype", None), field.name
    for name, queries in windows.queries.items():
        for field in dataclasses.fields(queries):
            same = getattr(queries, field.name) == getattr(opened.queries[name], field.name)
            assert np.all(same), field.name


def test_two_plannings_are_byte_identical(tiny_bank: Bank, tmp_path: Path):
    for name in ("first", "second"):
        write_windows(plan_windows(tiny_bank, CTX), tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        first, second = (tmp_path / side / name for side in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.slow
def test_windows_take_less_than_a_hundredth_of_the_bank(tmp_path: Path):
    bank = make_bank(tmp_path / "bank", num_documents=100, document_rows=40, dim=64, num_twins=3000)
    write_windows(plan_windows(bank, 100, overlap=90), tmp_path / "windows")
    size = sum(path.stat().st_size for path in (tmp_path / "windows").iterdir())
    bank_size = sum(path.stat().st_size for path in bank.path.iterdir())
    assert size < 0.01 * bank_size


def test_windows_of_another_bank_are_refused(windows: Windows, tmp_path: Path):
    write_windows(windows, tmp_path / "windows")
    other = make_bank(tmp_path / "bank", seed=1)
    with pytest.raises(ValueError, match="windows of another bank"):
        open_windows(tmp_path / "windows", other)


@pytest.mark.parametrize("name", ["windows.parquet", "queries.parquet", "twins.parquet"])
def test_a_changed_table_is_refused(name: str, tiny_bank: Bank, windows: Windows, tmp_path: Path):
    path = tmp_path / "windows" / name
    write_windows(windows, path.parent)
    table = pd.read_parquet(path)
    table.iloc[0, 0] += 1
    table.to_parquet(path)
    with pytest.raises(ValueError, match="planned again"):
        open_windows(path.parent, tiny_bank)


def test_a_damaged_folder_is_refused(tiny_bank: Bank, windows: Windows, tmp_path: Path):
    folder = tmp_path / "windows"
    with pytest.raises(ValueError, match="no windows here"):
        open_windows(folder, tiny_bank)
    write_windows(windows, folder)
    (folder / "queries.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        open_windows(folder, tiny_bank)
    for contents in ({"format": 99}, [1]):
        (folder / "windows.json").write_text(json.dumps(contents))
        with pytest.raises(ValueError, match="another format"):
            open_windows(folder, tiny_bank)


def test_settings_are_part_of_what_is_hashed(tiny_bank: Bank, windows: Windows, tmp_path: Path):
    folder = tmp_path / "windows"
    write_windows(windows, folder)
    settings = json.loads((folder / "windows.json").read_text())
    counts = settings["counts"] | {"train_rows": 1}
    (folder / "windows.json").write_text(json.dumps(settings | {"counts": counts}))
    with pytest.raises(ValueError, match="windows.json differs from the sha256 in it"):
        open_windows(folder, tiny_bank)
    bare = {k: v for k, v in settings.items() if k not in ("files", "contents_sha256")}
    (folder / "windows.json").write_text(json.dumps(bare))
    assert open_windows(folder, tiny_bank).sha256 == windows.sha256, "those of before have no hash"


def test_writing_replaces_windows_alone(tiny_bank: Bank, windows: Windows, tmp_path: Path):
    write_windows(windows, tmp_path / "windows")
    other = plan_windows(tiny_bank, 5)
    write_windows(other, tmp_path / "windows")
    assert open_windows(tmp_path / "windows", tiny_bank).ctx == 5
    assert [path.name for path in tmp_path.iterdir()] == ["windows"]
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a windows folder"):
        write_windows(windows, foreign)
    assert (foreign / "keep.txt").read_text() == "mine"


def test_ensure_windows_reuses_equal_plans(
    tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    stamped = tmp_path / "data/windows" / f"ctx{CTX}" / "windows.json"
    first = export_windows(tiny_bank, CTX, overlap=3)
    stamp = stamped.stat().st_mtime_ns
    assert ensure_windows(tiny_bank, CTX).sha256 == first.sha256
    assert stamped.stat().st_mtime_ns == stamp
    assert export_windows(tiny_bank, CTX, overlap=4).overlap == 4
    assert ensure_windows(tiny_bank, CTX).overlap == 4
    other = make_bank(tmp_path / "bank", seed=1)
    assert ensure_windows(other, CTX).bank_sha256 == other.sha256
    assert ensure_windows(tiny_bank, CTX).overlap == 4, "another bank's have a folder of their own"


def test_a_plan_that_an_evaluation_needs_is_not_what_training_reads(
    tiny_bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    leaky = ensure_windows(tiny_bank, CTX, split="random")
    assert leaky.leaky and leaky.folder is not None
    assert leaky.folder.name == f"ctx{CTX}-random-seed0-{tiny_bank.sha256[:8]}"
    plain = ensure_windows(tiny_bank, CTX)
    assert not plain.leaky and str(plain.folder) == f"data/windows/ctx{CTX}"
    assert ensure_windows(tiny_bank, CTX, split="random").sha256 == leaky.sha256
    chosen = export_windows(tiny_bank, CTX, seed=3)
    replayed = ensure_windows(tiny_bank, CTX, split="document", seed=0)
    assert replayed.sha256 == plain.sha256 and replayed.folder != chosen.folder
    assert ensure_windows(tiny_bank, CTX).sha256 == chosen.sha256


@pytest.mark.parametrize("change", ["overlap", "ctx", "bank"])
def test_a_named_folder_of_other_windows_is_refused(tiny_bank: Bank, tmp_path: Path, change: str):
    path = tmp_path / "windows"
    first = ensure_windows(tiny_bank, CTX, path, overlap=3)
    bank = make_bank(tmp_path / "bank", seed=1) if change == "bank" else tiny_bank
    plan = {"overlap": 4} if change == "overlap" else {}
    with pytest.raises(ValueError, match="holds other windows"):
        ensure_windows(bank, CTX + (change == "ctx"), path, **plan)
    assert open_windows(path, tiny_bank).sha256 == first.sha256
    assert export_windows(tiny_bank, CTX, path, overlap=2).overlap == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ctx": 1}, "ctx: 1 is too short"),
        ({"ctx": 240}, "choose ctx of at most 239"),
        ({"ctx": 10, "overlap": 10}, "overlap: 10 is outside"),
        ({"ctx": 10, "overlap": -1}, "overlap: -1 is outside"),
        ({"ctx": 10, "split": "shuffled"}, "split: 'shuffled' is unknown"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str, tiny_bank: Bank):
    with pytest.raises(ValueError, match=message):
        plan_windows(tiny_bank, **settings)


def test_a_bank_without_held_out_queries_is_refused(tmp_path: Path):
    few = small_bank(tmp_path / "few", [60], document_rows=10)
    with pytest.raises(ValueError, match="needs 220 rows or more at ctx 20"):
        plan_windows(few, 20, split="random")
    bank = small_bank(tmp_path / "bank", [40], document_rows=10)
    with pytest.raises(ValueError, match="no val query is left; a bank needs sequences of 10 doc"):
        plan_windows(bank, 10)


def test_a_bank_of_duplicates_is_refused_by_its_cause(tmp_path: Path):
    rows = pd.DataFrame({"sequence": ["s"] * 120, "document": [f"d{n // 10}" for n in range(120)]})
    vectors = np.tile(np.random.default_rng(0).standard_normal((6, 8)), (20, 1))
    bank = write_bank(tmp_path / "bank", vectors, rows, "random", "test")
    with pytest.raises(ValueError, match="all 10 val rows with a context are duplicates of train"):
        plan_windows(bank, 10)


@pytest.mark.parametrize("sequence_rows", [[1], [2], [2] * 50])
def test_a_bank_without_a_context_is_refused_by_its_cause(tmp_path: Path, sequence_rows: list[int]):
    bank = small_bank(tmp_path / "bank", sequence_rows, document_rows=10)
    with pytest.raises(ValueError, match="has no sequence of three rows or more"):
        plan_windows(bank, 2)
