"""What limits a lane, on a bank of which an index of little effort misses a part."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, write_bank
from lvm.bank.duplicates import duplicate_groups
from lvm.evaluation.lane_ceilings import (
    INDEX_LIMITED,
    KS,
    MODEL_LIMITED,
    UNKNOWN,
    Ceilings,
    failing_queries,
    lane_ceilings,
    limit,
    search_table,
)
from lvm.evaluation.metrics import Difference
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.index import ServingIndex, build_index
from lvm.system.seeding import generator
from lvm.system.settings import LaneRules, read_lane_rules
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows

RULES = dataclasses.replace(read_lane_rules(), min_queries=20, min_documents=2)
DIM = 16


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two lanes of 1,200 independent directions each, in documents of 20 rows."""
    rows = [
        (f"s{sequence}", f"d{row // 20}", f"lane-{sequence % 2}")
        for sequence in range(4)
        for row in range(600)
    ]
    table = pd.DataFrame(rows, columns=["sequence", "document", "lane"])
    vectors_ND = generator(0, "ceilings").standard_normal((len(rows), DIM))
    path = tmp_path_factory.mktemp("ceilings") / "bank"
    return write_bank(path, vectors_ND, table, "synthetic", "test")


@pytest.fixture(scope="module")
def windows(bank: Bank) -> Windows:
    return plan_windows(bank, 10)


def ceilings(
    bank: Bank, windows: Windows, effort: int | None, rules: LaneRules = RULES
) -> Ceilings:
    """Judge predictions that lie near the truth, through lists of which `effort` are read."""
    queries = windows.queries["test"]
    noise_QD = 0.5 * generator(1, "ceilings").standard_normal((len(queries), DIM)) / np.sqrt(DIM)
    prediction_QD = (bank.unit(queries.target_row_Q) + noise_QD).astype(np.float32)
    plain_N2 = np.tile(np.float32([1, 0]), (bank.num_rows, 1))
    index = build_index(bank, lambda: prediction_QD, plain_N2, sizes=(9, 9))
    if effort is not None:
        index = ServingIndex(
            dataclasses.replace(index.facts, effort=effort), index._index, index._row_K, bank
        )
    groups = duplicate_groups(bank)
    (ranks,) = exact_ranks(prediction_QD, queries, bank, groups)
    per_query = pd.DataFrame(
        {
            "target_row": queries.target_row_Q,
            "rank": ranks.rank_Q,
            "rank_corrected_raw": ranks.rank_raw_Q,
        }
    )
    searched = search_table(index, prediction_QD, queries, bank, groups, plain_N2)
    return lane_ceilings(str(index.facts), per_query, searched, bank, rules)


def test_a_tuned_index_leaves_the_limit_to_the_model(bank: Bank, windows: Windows) -> None:
    found = ceilings(bank, windows, None)
    assert [lane.limited_by for lane in found.lanes] == [MODEL_LIMITED] * 2
    assert found.sentence().startswith("Search: the model limits all 2 judged lanes")
    for lane in found.lanes:
        assert lane.oracle_hit_at_5 == lane.oracle_exact_hit_at_10 == 1.0
        assert lane.oracle_index_hit_at_10 >= 0.98 and lane.agreement >= 0.95
        assert abs(lane.served_difference.mean) <= 0.05


def test_an_index_of_effort_1_limits(bank: Bank, windows: Windows) -> None:
    found = ceilings(bank, windows, 1)
    assert [lane.limited_by for lane in found.lanes] == [INDEX_LIMITED] * 2
    assert found.sentence().startswith("Search: the index limits lane-0, lane-1; let it read more")
    tuned = ceilings(bank, windows, None)
    for lane, other in zip(found.lanes, tuned.lanes, strict=True):
        assert lane.agreement < other.agreement and lane.served_difference.high < 0
        assert lane.hits == other.hits, "figures of record never come from the index"
        lost = lane.hits_served["10"] - lane.hits_corrected["10"]
        assert lane.served_difference.mean == pytest.approx(lost)


def test_few_queries_give_no_verdict(bank: Bank, windows: Windows) -> None:
    rules = dataclasses.replace(RULES, min_queries=10_000)
    found = ceilings(bank, windows, 1, rules)
    assert {lane.limited_by for lane in found.lanes} == {UNKNOWN}
    assert found.sentence().startswith("Search: not known yet")


@pytest.mark.parametrize(
    ("oracle_index", "loss", "high", "expected"),
    [
        (1.0, -0.02, -0.01, INDEX_LIMITED),
        (1.0, -0.02, 0.01, MODEL_LIMITED),
        (1.0, -0.005, -0.001, MODEL_LIMITED),
        (0.97, 0.0, 0.0, INDEX_LIMITED),
        (0.99, 0.0, 0.0, MODEL_LIMITED),
    ],
)
def test_the_rule_at_its_thresholds(
    oracle_index: float, loss: float, high: float, expected: str
) -> None:
    difference = Difference(loss, loss - 0.01, high, 0.01, 30)
    assert limit(1.0, oracle_index, 0.2, difference, RULES) == expected


@pytest.mark.slow
def test_a_larger_k_is_read_from_the_ranks(bank: Bank, windows: Windows) -> None:
    found = ceilings(bank, windows, None)
    for lane in (*found.lanes, found.all_lanes):
        assert list(lane.hits) == [str(k) for k in KS]
        assert list(lane.hits.values()) == sorted(lane.hits.values())
        assert list(lane.hits_served.values()) == sorted(lane.hits_served.values())
        gain = lane.hits["200"] - lane.hits["5"]
        assert lane.larger_k_helps == (gain >= RULES.larger_k_gain)
    always = dataclasses.replace(RULES, larger_k_gain=0.0)
    never = dataclasses.replace(RULES, larger_k_gain=1.0)
    assert "helps in every judged lane" in ceilings(bank, windows, None, always).sentence()
    assert "helps in no lane" in ceilings(bank, windows, None, never).sentence()


def test_the_report_is_json(bank: Bank, windows: Windows) -> None:
    report = json.loads(json.dumps(ceilings(bank, windows, None).report()))
    assert set(report) == {"index", "all_lanes", "lanes", "sentence"}
    assert set(report["lanes"]) == {"lane-0", "lane-1"}
    assert {"agreement", "hits", "hits_served", "limited_by"} <= report["lanes"]["lane-0"].keys()


def test_failing_queries_are_those_of_weak_lanes(bank: Bank, windows: Windows) -> None:
    target_row_Q = windows.queries["test"].target_row_Q
    per_query = pd.DataFrame({"target_row": target_row_Q, "rank": 1.0 + target_row_Q % 9})
    table = failing_queries(per_query, bank, ("lane-1",))
    assert list(table.columns) == ["sequence", "target_row", "rank", "lane", "document"]
    assert bank.lane_N is not None
    expected = [row for row in target_row_Q if row % 9 >= 5 and bank.lane_N[row] == 1]
    assert table["target_row"].tolist() == expected
    assert set(table["lane"]) == {"lane-1"} and (table["rank"] > 5).all()
    row = table["target_row"][0]
    assert table["document"][0] == bank.documents[bank.document_N[row]]
    everywhere = failing_queries(per_query, bank, ())
    assert len(everywhere) == (target_row_Q % 9 >= 5).sum()
