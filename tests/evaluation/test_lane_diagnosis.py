"""The lane rules in cases whose verdict is known."""

import dataclasses
import json

import pandas as pd
import pytest

from lvm.bank.bank import Bank
from lvm.evaluation.lane_diagnosis import INGEST, PROCEED, UNKNOWN, Diagnosis, diagnose
from lvm.system.settings import LaneRules, read_lane_rules
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows

RULES = dataclasses.replace(read_lane_rules(), min_queries=20, min_documents=2)


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 10)


def ranks_by_lane(
    bank: Bank, windows: Windows, good_per_ten: dict[str, int], offset: int = 0
) -> pd.DataFrame:
    """Every ten queries of a lane, so many have rank 1, the others rank 50."""
    target_row_Q = windows.queries["test"].target_row_Q
    assert bank.lane_N is not None
    lane_Q = pd.Series([bank.lanes[code] for code in bank.lane_N[target_row_Q]])
    place_Q = lane_Q.groupby(lane_Q).cumcount() + offset
    is_hit_Q = place_Q % 10 < lane_Q.map(good_per_ten)
    rank_Q = is_hit_Q.map({True: 1.0, False: 50.0})
    return pd.DataFrame({"target_row": target_row_Q, "rank": rank_Q, "top_row": target_row_Q})


def judge(
    bank: Bank,
    windows: Windows,
    model: dict[str, int],
    baseline: dict[str, int] | None = None,
    rules: LaneRules = RULES,
) -> Diagnosis:
    measured = {"model": ranks_by_lane(bank, windows, model)}
    if baseline is not None:
        measured["ema"] = ranks_by_lane(bank, windows, baseline)
    return diagnose("model", measured, bank, windows, rules, leaky=False)


EVEN = {"lane-0": 6, "lane-1": 6, "lane-2": 6}
ONE_WEAK = {"lane-0": 8, "lane-1": 8, "lane-2": 1}


def test_even_lanes_proceed(tiny_bank: Bank, windows: Windows) -> None:
    diagnosis = judge(tiny_bank, windows, EVEN)
    assert diagnosis.decision == PROCEED and diagnosis.weak == diagnosis.weak_old_rule == ()
    assert diagnosis.sentence.startswith("Proceed: no lane is weak among 3 judged")


def test_a_weak_lane_asks_for_ingestion_by_name(tiny_bank: Bank, windows: Windows) -> None:
    diagnosis = judge(tiny_bank, windows, ONE_WEAK, baseline=ONE_WEAK)
    assert diagnosis.decision == INGEST and diagnosis.weak == ("lane-2",)
    assert diagnosis.weak_old_rule == ("lane-2",)
    assert diagnosis.sentence.startswith("Ingest for lane-2 (2 chains,")


def test_a_hard_lane_with_a_shown_lift_is_not_weak(tiny_bank: Bank, windows: Windows) -> None:
    hard = {"lane-0": 8, "lane-1": 8, "lane-2": 4}
    nothing = {"lane-0": 8, "lane-1": 8, "lane-2": 0}
    assert judge(tiny_bank, windows, hard, baseline=hard).weak == ("lane-2",)
    diagnosis = judge(tiny_bank, windows, hard, baseline=nothing)
    assert diagnosis.weak == () and diagnosis.weak_old_rule == ("lane-2",)
    assert diagnosis.decision == PROCEED


def test_more_weak_lanes_can_be_asked_for(tiny_bank: Bank, windows: Windows) -> None:
    rules = dataclasses.replace(RULES, ingest_from=2)
    diagnosis = judge(tiny_bank, windows, ONE_WEAK, rules=rules)
    assert diagnosis.decision == PROCEED and "only lane-2 is weak" in diagnosis.sentence


@pytest.mark.parametrize("needed", [{"min_queries": 5_000}, {"min_documents": 500}])
def test_lanes_too_small_give_no_verdict(
    tiny_bank: Bank, windows: Windows, needed: dict[str, int]
) -> None:
    rules = dataclasses.replace(RULES, **needed)
    diagnosis = judge(tiny_bank, windows, ONE_WEAK, rules=rules)
    assert diagnosis.decision == UNKNOWN and diagnosis.weak == ()
    assert diagnosis.unjudged == ("lane-0", "lane-1", "lane-2")


def test_small_supply_is_listed(tiny_bank: Bank, windows: Windows) -> None:
    assert judge(tiny_bank, windows, EVEN).small_supply == ("lane-0", "lane-1", "lane-2")
    rules = dataclasses.replace(RULES, min_chains=2)
    diagnosis = judge(tiny_bank, windows, ONE_WEAK, rules=rules)
    assert diagnosis.small_supply == () and "supply is not small" in diagnosis.sentence


def test_the_report_is_json(tiny_bank: Bank, windows: Windows) -> None:
    report = json.loads(json.dumps(judge(tiny_bank, windows, ONE_WEAK, ONE_WEAK).report()))
    assert report["decision"] == INGEST and report["weak"] == ["lane-2"]
    lane = report["lanes"]["lane-2"]
    assert lane["num_queries"] > 0 and lane["supply"]["num_chains"] == 2
    assert lane["lift"]["mean"] == 0 and lane["best_baseline"] == "ema"
    assert sum(map(sum, report["confusion"])) == report["num_queries"]
