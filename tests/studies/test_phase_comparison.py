"""Figures of the phases against numbers worked out by hand."""

import dataclasses
import json
import math

import pytest

from lvm.bank.bank import Bank
from lvm.evaluation.metrics import POOLS
from lvm.report.phases import phases_table
from lvm.studies.phase_comparison import measure_phases, old_checks
from lvm.studies.phases import read_old_gates
from tests.phase_cases import NUM_ANSWERS, compared, per_query, replay, trained

pytestmark = pytest.mark.slow


def chance(rank: int, pool: int, k: int) -> float:
    """Chance that fewer than k of the pool - 1 others drawn rank before the truth, by counting."""
    better, worse = rank - 1, NUM_ANSWERS - rank
    ways = sum(math.comb(better, drawn) * math.comb(worse, pool - 1 - drawn) for drawn in range(k))
    return ways / math.comb(NUM_ANSWERS - 1, pool - 1)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("k", [1, 5, 10])
def test_pool_equivalents_are_counted_by_hand(tiny_bank: Bank, pool: int, k: int) -> None:
    row, *_ = compared(tiny_bank).rows
    expected = chance(1, pool, k) / 4 + chance(7, pool, k) * 3 / 4
    assert row.measured.pools[pool][f"hit_at_{k}"] == pytest.approx(expected)


def test_one_model_rises_as_its_pool_shrinks(tiny_bank: Bank) -> None:
    pools = compared(tiny_bank).rows[0].measured.pools
    hits = [pools[pool]["hit_at_5"] for pool in sorted(pools, reverse=True)]
    assert hits == sorted(hits) and hits[-1] > hits[0] + 0.5
    assert compared(tiny_bank).rows[0].measured.figures["hit_at_5"] == pytest.approx(1 / 4)


def test_pools_beyond_the_bank_are_left_out(tiny_bank: Bank) -> None:
    small = replay() | {"num_answers": 200}
    found = measure_phases([trained("1", "short")], small, per_query(tiny_bank), tiny_bank)
    assert found.rows[0].measured.pools.keys() == {58, 115}


def test_phases_are_compared_with_the_one_before_and_with_the_free_one(tiny_bank: Bank) -> None:
    found = compared(tiny_bank)
    assert [(pair.later, pair.earlier) for pair in found.successive] == [("2", "1"), ("4", "2")]
    assert [(pair.later, pair.earlier) for pair in found.leads] == [
        ("1", "ema"),
        ("2", "ema"),
        ("4", "ridge"),
    ]
    longer, by_lane = found.successive
    assert longer.hit_at_5.mean == pytest.approx(1 / 3 - 1 / 4)
    assert longer.hit_at_10.mean == pytest.approx(0)
    assert by_lane.hit_at_5.mean == pytest.approx(2 / 3)  # 7 - 3 = 4 is among the first five
    assert longer.p_holm >= longer.hit_at_5.p_value and longer.detectable > 0
    first, _, last = found.leads
    assert first.hit_at_5.mean == pytest.approx(0)
    assert last.hit_at_5.mean == pytest.approx(0)  # ridge by lane: 5, among the first five as well


def test_by_lane_the_free_predictor_that_is_best_by_lane_is_met(tiny_bank: Bank) -> None:
    """Not the one that is best as ranked; one that may have seen the answers is none."""
    found = compared(tiny_bank)
    assert found.free.name == "ema" and found.free_by_lane is not None
    assert found.free_by_lane.name == "ridge"
    assert found.free_by_lane.measured.figures["hit_at_5"] == 1
    seen = replay()
    seen["outcomes"][-1]["leak"] = "trained on leaky windows (split=random)"
    again = measure_phases([trained("4", "long")], seen, per_query(tiny_bank), tiny_bank)
    assert again.free_by_lane is not None and again.free_by_lane.name == "ema"


def test_a_phase_is_compared_with_the_one_that_the_table_names(tiny_bank: Bank) -> None:
    """3 with 2, where that is above it; a grown model with the one that it grew from."""
    table = per_query(tiny_bank)
    grown = dataclasses.replace(trained("3", "ridge"), name="3 grown", label="3 grown")
    runs = [trained("2", "short"), trained("2B", "long"), trained("3", "ema"), grown]
    found = measure_phases(runs, replay(), table, tiny_bank)
    told = [(pair.later, pair.earlier) for pair in found.successive]
    assert told == [("2B", "2"), ("3", "2"), ("3 grown", "3")]
    found = measure_phases(runs[1:], replay(), table, tiny_bank)
    told = [(pair.later, pair.earlier) for pair in found.successive]
    assert told == [("3", "2B"), ("3 grown", "3")]


def test_equal_trainings_are_one(tiny_bank: Bank) -> None:
    found = compared(tiny_bank)
    assert [row.same_as for row in found.rows] == [None, None, "2", None]
    assert [row.order for row in found.rows] == ["none", "none", "none", "lane"]
    assert found.best.name == "4"
    assert found.rows[3].measured.pools == {}, "a list ordered anew has no equivalent in a pool"
    assert found.free_by_lane is not None


def test_a_bank_without_lanes_shows_phase_4_as_the_phase_before(tiny_bank: Bank) -> None:
    table = per_query(tiny_bank).assign(rank_reranked=math.nan)
    runs = [trained("3.5", "long"), trained("4", "long")]
    found = measure_phases(runs, replay(), table, tiny_bank)
    assert [(row.order, row.same_as) for row in found.rows] == [("none", None), ("none", "3.5")]
    assert found.successive == () and found.free_by_lane is None


def test_a_phase_that_was_not_scored_is_an_error(tiny_bank: Bank) -> None:
    with pytest.raises(ValueError, match="shadow: lost has no figures"):
        measure_phases([trained("1", "lost")], replay(), per_query(tiny_bank), tiny_bank)


def test_nothing_is_detectable_between_equal_answers(tiny_bank: Bank) -> None:
    table = per_query(tiny_bank)
    ranks = table.loc[table["candidate"] == "short", "rank"].to_numpy()
    table.loc[table["candidate"] == "long", "rank"] = ranks
    runs = [trained("1", "short"), trained("2", "long")]
    (pair,) = measure_phases(runs, replay(), table, tiny_bank).successive
    assert math.isnan(pair.detectable) and pair.hit_at_5.p_value == 1


def test_phases_asked_different_queries_are_not_compared(tiny_bank: Bank) -> None:
    table = per_query(tiny_bank)
    table.loc[(table["candidate"] == "long") & (table["target_row"] == 3), "target_row"] = 4
    runs = [trained("1", "short"), trained("2", "long")]
    with pytest.raises(ValueError, match="shadow: 2 was replayed on other queries than 1"):
        measure_phases(runs, replay(), table, tiny_bank)


def test_the_report_holds_old_and_new_figures(tiny_bank: Bank) -> None:
    report = json.loads(json.dumps(compared(tiny_bank).report()))
    first = report["phases"][0]
    assert first["published"]["hit_at_5"] == 0.5932
    assert first["figures"]["hit_at_5"] == 0.25
    assert (first["optimiser_steps"], first["plan"]["examples_per_epoch"]) == (30, 4000)
    assert report["best"] == "4" and report["queries"] == 240


def test_figures_of_the_served_order_stand_below_the_plain_ones(tiny_bank: Bank) -> None:
    assert "as served" not in phases_table(compared(tiny_bank))
    table = per_query(tiny_bank).assign(rank_served=1.0)
    found = measure_phases([trained("1", "short")], replay(), table, tiny_bank)
    assert found.rows[0].measured.served == (1.0, [1.0, 1.0])
    told = phases_table(found).splitlines()[-1]
    assert told.startswith("Hit@5 % as served (corrected): 1 100.0 [100.0, 100.0]; ")


def test_old_gates_pass_and_fail(tiny_bank: Bank) -> None:
    rules = read_old_gates()
    found = {(one.phase, one.gate): one.passed for one in old_checks(compared(tiny_bank), rules)}
    assert found["1", "gain"] is None
    assert found["2", "gain"] is False, "Hit@10 stands still"
    assert found["2B", "gain"] is False, "it has the answers of phase 2"
    (twin,) = (
        one
        for one in old_checks(compared(tiny_bank), rules)
        if (one.phase, one.gate) == ("2B", "gain")
    )
    assert twin.detail == "Hit@5 +0.0, Hit@10 +0.0 points over 2"
    assert found["4", "gain"] is False
    assert {found[phase, "converged"] for phase in ("1", "2")} == {True}
    assert {found[phase, "latency"] for phase in ("1", "2")} == {True}
    strict = dataclasses.replace(rules, latency_p95_ms=4.0, loss_rise=0.0)
    found = {(one.phase, one.gate): one.passed for one in old_checks(compared(tiny_bank), strict)}
    assert (found["1", "converged"], found["1", "latency"]) == (False, False)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"best_epoch": 1}, False),
        ({"history": [{"epoch": 1, "train/loss": 3.0}]}, False),
        ({"history": [{"epoch": e, "train/loss": x} for e, x in ((1, 2.0), (2, 2.1))]}, False),
        ({"history": [{"epoch": e, "train/loss": x} for e, x in ((1, 2.0), (2, 2.03))]}, True),
        ({"history": [{"epoch": e, "train/loss": x} for e, x in ((1, 2.0), (2, 1.0))]}, True),
    ],
)
def test_convergence_is_a_late_best_with_a_loss_that_does_not_rise(
    tiny_bank: Bank, changes: dict, passed: bool
) -> None:
    run = trained("1", "short", **changes)
    found = measure_phases([run], replay(), per_query(tiny_bank), tiny_bank)
    by_gate = {one.gate: one for one in old_checks(found, read_old_gates())}
    assert by_gate["converged"].passed is passed, by_gate["converged"].detail
