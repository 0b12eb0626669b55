"""Stored measurements: what comes back, what expires, what is damaged."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lvm.shadow import replay
from lvm.shadow.replay import (
    MEASURED_NOW,
    READ_BACK,
    Measurement,
    Questions,
    measurement_key,
    measurement_path,
    query_parts,
    read_measurement,
    write_measurement,
)
from lvm.system.atomic import cache_key
from lvm.windows.planning import context_queries, make_queries

KEY = "ab" * 32
RANKS = pd.DataFrame(
    {
        "query": [0, 1, 2],
        "target_row": [7, 3, 9],
        "rank": [1.0, 2.5, 30.0],
        "rank_raw": [1.0, 3.5, 31.0],
        "rank_corrected": [np.nan] * 3,
        "rank_reranked": [1.0, 2.0, 30.0],
        "rank_corrected_reranked": [np.nan] * 3,
        "top_row": [7, 1, 2],
    }
)
FOUND = Measurement(RANKS, 0, {"p50": 1.5, "p95": 2.25}, 0.5, "2026-01-02T03:04:05+00:00", 0.25)


@pytest.fixture
def path(tmp_path):
    where = measurement_path(tmp_path, KEY)
    write_measurement(where, KEY, FOUND)
    return where


def test_a_measurement_comes_back_as_it_was(path):
    back = read_measurement(path, KEY)
    assert back is not None and back.origin == READ_BACK != FOUND.origin == MEASURED_NOW
    pd.testing.assert_frame_equal(back.ranks, RANKS)
    shared = ("num_non_finite", "latency_ms", "seconds", "at", "val_hit_at_5")
    assert all(getattr(back, name) == getattr(FOUND, name) for name in shared)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_count_of_broken_predictions_comes_back(tmp_path):
    write_measurement(tmp_path / "nan", KEY, Measurement(None, 3, {}, 0.1, "now"))
    back = read_measurement(tmp_path / "nan", KEY)
    assert back is not None and back.ranks is None and back.num_non_finite == 3


def test_what_is_not_there_is_none(path, tmp_path):
    assert read_measurement(tmp_path / "nothing", KEY) is None
    assert read_measurement(path, "cd" * 32) is None


@pytest.mark.parametrize("size", [0, 10, 700])
def test_a_cut_file_is_damaged(path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert read_measurement(path, KEY) is None


def test_a_changed_rank_is_damaged(path):
    contents = bytearray(path.read_bytes())
    (place,) = (n for n in range(len(contents)) if contents[n : n + 8] == np.float64(2.5).tobytes())
    contents[place : place + 8] = np.float64(1.0).tobytes()
    path.write_bytes(contents)
    assert read_measurement(path, KEY) is None


def test_the_key_depends_on_every_part_and_on_the_way_of_measuring(tiny_bank, monkeypatch):
    queries = make_queries(np.arange(2), np.array([5, 9]), np.array([0, 0]), 4)
    asked = Questions(tiny_bank, np.arange(tiny_bank.num_rows), queries, queries)
    assert measurement_key("a", "b", asked) == measurement_key("a", "b", asked.read_by(4))
    keys = {measurement_key(*one, asked) for one in (("a", "b"), ("x", "b"), ("a", "x"))}
    keys |= {measurement_key("a", "b", asked.read_by(3))}
    keys |= {measurement_key("a", "b", dataclasses.replace(asked, removed=queries.head(1)))}
    keys |= {measurement_key("a", "b", dataclasses.replace(asked, val=queries))}
    monkeypatch.setattr(replay, "MEASUREMENT", 0)
    assert len(keys | {measurement_key("a", "b", asked)}) == 7


def test_queries_are_told_apart_by_everything_in_them():
    target, start = np.array([5, 9]), np.array([0, 0])
    base = make_queries(np.arange(2), target, start, 4)
    contexts = [np.array([1, 2]), np.array([3])]
    recorded = [
        context_queries(target, start, contexts),
        context_queries(target, start, [np.array([1]), np.array([2, 3])]),
        context_queries(target, start, [np.array([2, 1]), np.array([3])]),
    ]
    others = [base.with_ctx(3), base.take(np.array([1, 0])), base.head(1), *recorded]
    assert len({cache_key(*query_parts(one)) for one in (base, *others)}) == 7
    assert cache_key(*query_parts(base)) == cache_key(*query_parts(base.head(2)))
