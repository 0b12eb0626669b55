"""The serving index against exact search, on a bank whose structure is known.

Shapes: N bank rows, Q queries, D vector dim.
"""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.models.baselines import MovingAverage
from lvm.models.facts import facts_of
from lvm.retrieval.exact import top_rows
from lvm.retrieval.index import (
    FLAT,
    HNSW,
    IVF,
    agreement,
    build_index,
    ensure_index,
    open_index,
    write_index,
)
from lvm.windows.export import plan_windows
from tests.synthetic import make_bank

DIM, CLUSTERS, ROWS, QUERIES, TWINS = 20, 60, 3000, 200, 100


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """60 clusters in 3,000 rows, of which 100 are said twice."""
    random = np.random.default_rng(0)
    centre_CD = random.standard_normal((CLUSTERS, DIM))
    vector_ND = centre_CD[random.integers(CLUSTERS, size=ROWS)]
    vector_ND = vector_ND + 0.3 * random.standard_normal((ROWS, DIM))
    vector_ND[-TWINS:] = vector_ND[:TWINS]
    names = [f"document-{row // 50}" for row in range(ROWS)]
    rows = pd.DataFrame({"sequence": "all", "document": names})
    path = tmp_path_factory.mktemp("clustered") / "bank"
    return write_bank(path, vector_ND, rows, "synthetic", "tests/test_index.py")


@pytest.fixture(scope="module")
def correction() -> np.ndarray:
    """A row correction (N, 2) that is strong enough to reorder passages."""
    random = np.random.default_rng(1)
    columns = [random.uniform(0.7, 1.3, ROWS), random.uniform(-0.3, 0.1, ROWS)]
    return np.stack(columns, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def inverted(bank: Bank, correction: np.ndarray):
    """A corrected index with inverted lists, which a bank of this size would not get."""
    return build_index(bank, lambda: queries(bank, 2), correction, sizes=(500, 500))


def queries(bank: Bank, seed: int = 3) -> np.ndarray:
    """Return vectors between two rows, as predictions are."""
    random = np.random.default_rng(seed)
    left_QD, right_QD = (bank.unit(random.integers(ROWS, size=QUERIES)) for _ in range(2))
    return left_QD + 0.4 * right_QD


def exact(bank: Bank, correction: np.ndarray | None, k: int = 10):
    groups = duplicate_groups(bank)
    return top_rows(queries(bank), bank, k, correction, representative_N=groups)


@pytest.mark.parametrize("is_corrected", [False, True])
def test_a_small_bank_is_searched_exhaustively_in_corrected_order(bank, correction, is_corrected):
    pair_N2 = correction if is_corrected else None
    built = build_index(bank, no_predictions, pair_N2)
    assert (built.facts.kind, built.facts.agreement) == (FLAT, 1.0)
    row_QK, score_QK = built.search(queries(bank), 10)
    exact_row_QK, exact_score_QK = exact(bank, pair_N2)
    assert np.array_equal(row_QK, exact_row_QK)
    np.testing.assert_allclose(score_QK, exact_score_QK, rtol=0, atol=1e-6)


def no_predictions() -> np.ndarray:
    raise AssertionError("an exhaustive index needs no tuning")


def test_inverted_lists_agree_with_exact_search_on_new_predictions(bank, correction, inverted):
    facts = inverted.facts
    assert facts.kind == IVF and 1 <= facts.effort < facts.num_lists
    assert facts.agreement >= 0.98 and facts.tuning_queries == QUERIES
    exact_row_QK, exact_score_QK = exact(bank, correction)
    row_QK, score_QK = inverted.search(queries(bank), 10)
    assert agreement(row_QK, exact_row_QK).mean() >= 0.96
    same = row_QK == exact_row_QK
    np.testing.assert_allclose(score_QK[same], exact_score_QK[same], rtol=0, atol=1e-6)
    few_QK, _ = inverted.search(queries(bank), 10, effort=1)
    assert agreement(few_QK, exact_row_QK).mean() < facts.agreement


@pytest.mark.slow
def test_a_graph_agrees_with_exact_search_and_is_the_same_each_time(bank, correction, tmp_path):
    graphs = [
        build_index(bank, lambda: queries(bank, 2), correction, sizes=(500, ROWS)) for _ in range(2)
    ]
    assert graphs[0].facts == graphs[1].facts and graphs[0].facts.kind == HNSW
    assert graphs[0].facts.agreement >= 0.98
    write_index(graphs[0], tmp_path / "graph")
    opened = open_index(tmp_path / "graph", bank, correction)
    found = [one.search(queries(bank), 10) for one in (*graphs, opened)]
    for row_QK, score_QK in found[1:]:
        assert np.array_equal(row_QK, found[0][0]) and np.array_equal(score_QK, found[0][1])
    assert agreement(found[0][0], exact(bank, correction)[0]).mean() >= 0.96


def test_probing_every_list_is_exact_search(bank, correction, inverted):
    row_QK, _ = inverted.search(queries(bank), 10, effort=inverted.facts.num_lists)
    assert agreement(row_QK, exact(bank, correction)[0]).mean() == 1.0


def test_many_candidates_of_one_query_are_scored_in_blocks(bank, correction, monkeypatch):
    built = build_index(bank, no_predictions, correction)
    query_1D = queries(bank)[:1]
    row_1K, score_1K = built.search(query_1D, ROWS - TWINS)
    monkeypatch.setattr("lvm.retrieval.index.CANDIDATES", 64)
    monkeypatch.setattr(Bank, "unit", at_most(64, Bank.unit))
    found_1K, found_score_1K = built.search(query_1D, ROWS - TWINS)
    assert np.array_equal(found_1K, row_1K) and np.array_equal(found_score_1K, score_1K)


def at_most(most: int, unit):
    """Return a `Bank.unit` that reads no more than `most` rows at once."""

    def counted(bank: Bank, rows):
        assert np.size(rows) <= most
        return unit(bank, rows)

    return counted


def test_one_query_finds_what_a_batch_finds(bank, inverted):
    row_QK, _ = inverted.search(queries(bank), 5)
    alone_QK = [inverted.search(query_1D, 5)[0][0] for query_1D in queries(bank)[:20, None]]
    assert np.array_equal(row_QK[:20], alone_QK)


def test_no_passage_is_found_twice(bank, inverted):
    assert inverted.facts.num_passages == ROWS - TWINS
    row_QK, _ = inverted.search(bank.unit(slice(0, TWINS)), 5)
    assert row_QK.max() < ROWS - TWINS
    both_QK, _ = top_rows(bank.unit(slice(0, TWINS)), bank, 2)
    assert (both_QK[:, 1] >= ROWS - TWINS).all(), "without groups the twin follows"


def test_more_passages_than_the_probed_lists_hold_are_filled_up(bank, inverted):
    row_QK, score_QK = inverted.search(queries(bank), 500, effort=1)
    missing = row_QK < 0
    assert missing[:, -1].all() and not missing[:, 0].any()
    assert np.array_equal(missing, np.isneginf(score_QK))


@pytest.mark.parametrize("k", [0, ROWS - TWINS + 1])
def test_an_impossible_k_is_refused(bank, inverted, k):
    with pytest.raises(ValueError, match=f"k: {k} is outside"):
        inverted.search(queries(bank), k)


def test_a_written_index_finds_the_same(bank, correction, inverted, tmp_path):
    write_index(inverted, tmp_path / "index")
    opened = open_index(tmp_path / "index", bank, correction)
    assert opened.facts == inverted.facts
    found, expected = (one.search(queries(bank), 10) for one in (opened, inverted))
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert {path.name for path in tmp_path.iterdir()} == {"index"}, "no scratch is left"


def test_the_index_of_another_bank_is_refused(tiny_bank, inverted, tmp_path):
    write_index(inverted, tmp_path / "index")
    with pytest.raises(ValueError, match="belongs to a bank with sha256"):
        open_index(tmp_path / "index", tiny_bank)


@pytest.mark.parametrize("spoilt", ["index.faiss", "rows.npy", "index.json"])
def test_a_damaged_index_is_built_anew(tiny_bank, tmp_path, spoilt):
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 50))
    arguments = (tiny_bank, MovingAverage(tiny_bank.dim), facts, None, tmp_path)
    expected = ensure_index(*arguments).search(tiny_bank.unit(slice(0, 9)), 5)
    (file,) = tmp_path.glob(f"*/{spoilt}")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="build it again"):
        open_index(file.parent, tiny_bank)
    found = ensure_index(*arguments).search(tiny_bank.unit(slice(0, 9)), 5)
    assert np.array_equal(found[0], expected[0])
    open_index(file.parent, tiny_bank)


@pytest.mark.parametrize("sizes", [(ROWS, ROWS), (9, 9)])
@pytest.mark.parametrize("fails", ["mkdir", "write"])
def test_where_nothing_can_be_written_the_index_is_kept_in_memory(
    tiny_bank, tmp_path, monkeypatch, caplog, sizes, fails
):
    """A file stands where the folders would; or the disk is full."""
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 50))
    model = MovingAverage(tiny_bank.dim)
    monkeypatch.chdir(tmp_path)
    asked_QD = tiny_bank.unit(slice(0, 9))
    expected = ensure_index(tiny_bank, model, facts, folder="elsewhere", sizes=sizes)
    shutil.rmtree("data", ignore_errors=True)
    if fails == "mkdir":
        Path("data").touch()
    else:
        monkeypatch.setattr("lvm.retrieval.index.write_array", full_disk)
    index = ensure_index(tiny_bank, model, facts, sizes=sizes)
    assert index.facts == expected.facts
    assert np.array_equal(index.search(asked_QD, 5)[0], expected.search(asked_QD, 5)[0])
    (line,) = caplog.messages
    assert "cannot be written" in line and "kept in memory" in line and "\n" not in line
    assert not list(tmp_path.glob("data/index/*/index*")), "nothing is left"


def full_disk(*parts: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rows.npy")


def test_an_index_on_a_read_only_disk_is_opened_without_a_lock(
    tiny_bank, tmp_path, monkeypatch, caplog
):
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 50))
    arguments = (tiny_bank, MovingAverage(tiny_bank.dim), facts, None, tmp_path)
    expected = ensure_index(*arguments)
    monkeypatch.setattr("lvm.system.atomic.FileLock", read_only)
    monkeypatch.setattr("lvm.retrieval.index.build_index", no_predictions)
    assert ensure_index(*arguments).facts == expected.facts
    assert not caplog.messages


def read_only(path: Path) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_no_index_is_built_from_a_bank_that_changed(tmp_path):
    bank = make_bank(tmp_path / "bank", num_sequences=4)
    facts = facts_of("ema", "none", bank, plan_windows(bank, 50))
    vectors = np.load(bank.path / "vectors.npy", mmap_mode="r+")
    vectors[3] = -vectors[3]
    vectors.flush()
    with pytest.raises(ValueError, match="vectors.npy: its sha256 differs"):
        ensure_index(bank, MovingAverage(bank.dim), facts, None, tmp_path / "index")
    assert not list((tmp_path / "index").glob("*/index.faiss"))


def test_an_index_is_built_once_for_each_model_and_correction(
    tiny_bank, tmp_path, monkeypatch, correction
):
    windows = plan_windows(tiny_bank, 50)
    facts = facts_of("ema", "none", tiny_bank, windows)
    num_val = len(windows.queries["val"])
    monkeypatch.chdir(tmp_path)
    for decay in (0.2, 0.2, 0.8):
        index = ensure_index(tiny_bank, MovingAverage(tiny_bank.dim, decay), facts, sizes=(9, 9))
        assert (index.facts.kind, index.facts.tuning_queries) == (IVF, num_val)
    assert len(list((tmp_path / "data" / "index").glob("*/index.faiss"))) == 2
    pair_N2 = correction[: tiny_bank.num_rows]
    ensure_index(tiny_bank, MovingAverage(tiny_bank.dim, 0.2), facts, pair_N2, sizes=(9, 9))
    assert len(list((tmp_path / "data" / "index").glob("*/index.faiss"))) == 3
