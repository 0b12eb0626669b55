"""Parts of the train rows: nested, of whole documents, otherwise alike."""

import numpy as np
import pytest

from lvm.studies.scaling_cells import NO_BLOCK, num_documents, part_of, train_blocks
from lvm.windows.export import plan_windows
from lvm.windows.planning import TRAIN

FRACTIONS = (0.125, 0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def windows(tiny_bank):
    return plan_windows(tiny_bank, 50)


def test_parts_are_nested_whole_and_of_the_size_asked_for(tiny_bank, windows):
    rows = [set(part_of(tiny_bank, windows, f, 3).train_rows().tolist()) for f in FRACTIONS]
    whole = set(windows.train_rows().tolist())
    assert all(small < large for small, large in zip(rows[:-1], rows[1:], strict=True))
    assert rows[-1] == whole
    for fraction, part in zip(FRACTIONS, rows, strict=True):
        assert 0 <= len(part) - fraction * len(whole) < 120  # a block, with what joined it
        documents = tiny_bank.document_N[sorted(part)]
        others = tiny_bank.document_N[sorted(whole - part)]
        assert not set(documents) & set(others)


def test_blocks_are_neighbouring_documents_of_more_than_ctx_rows(tiny_bank, windows):
    block_N = train_blocks(tiny_bank, windows)
    assert ((block_N == NO_BLOCK) == (windows.split_N != TRAIN)).all()
    for block in range(block_N.max() + 1):
        rows = np.flatnonzero(block_N == block)
        assert len(rows) > windows.ctx and (np.diff(rows) == 1).all()
        assert len(set(tiny_bank.sequence_N[rows])) == 1


def test_a_run_shorter_than_ctx_is_one_block(tiny_bank):
    windows = plan_windows(tiny_bank, 230)
    assert train_blocks(tiny_bank, windows).max() + 1 == 6  # one a sequence


def test_another_seed_chooses_other_documents(tiny_bank, windows):
    first, other = (part_of(tiny_bank, windows, 0.25, seed).split_N for seed in (0, 1))
    assert (first != other).any()


def test_windows_of_a_part_read_its_rows_alone_and_are_as_long(tiny_bank, windows):
    part = part_of(tiny_bank, windows, 0.25, 0)
    start_W, rows_W = part.train_windows()
    for start, rows in zip(start_W, rows_W, strict=True):
        assert (part.split_N[start : start + rows + 1] == TRAIN).all()
    assert (rows_W == windows.ctx).mean() > 0.8


def test_queries_candidates_and_groups_are_those_of_the_whole(tiny_bank, windows):
    part = part_of(tiny_bank, windows, 0.25, 0)
    assert part.queries is windows.queries
    assert part.representative_N is windows.representative_N
    assert part.sha256 != windows.sha256 and part.folder is None


def test_repeats_lengthen_an_epoch_and_change_nothing_else(tiny_bank, windows):
    once, thrice = (part_of(tiny_bank, windows, 0.25, 0, repeats) for repeats in (1, 3))
    assert len(thrice.window_start_W) == 3 * len(once.window_start_W)
    assert (once.split_N == thrice.split_N).all()
    assert once.sha256 != thrice.sha256


def test_documents_are_counted(tiny_bank, windows):
    assert num_documents(tiny_bank, windows) == len(
        set(tiny_bank.document_N[windows.split_N == TRAIN])
    )
