"""Tables with figures of lanes: agreement, ceilings, a larger k."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank
from lvm.evaluation.lane_assignment import KMEANS, Agreement, Assignment, lane_agreement
from lvm.evaluation.lane_ceilings import (
    ALL_LANES,
    INDEX_LIMITED,
    KS,
    MODEL_LIMITED,
    UNKNOWN,
    Ceilings,
    LaneCeiling,
)
from lvm.evaluation.lane_diagnosis import diagnose
from lvm.evaluation.metrics import Difference
from lvm.report.lanes import (
    agreement_figure,
    assignment_line,
    assignment_table,
    ceilings_table,
    hits_table,
    lanes_screen,
    larger_k_figure,
    supply_line,
)
from lvm.report.tables import MARKDOWN, TEXT
from lvm.system.settings import read_lane_rules
from lvm.windows.export import plan_windows
from tests.report.test_figures import assert_drawn


def ceiling(lane: str, limited_by: str, hit: float = 0.2) -> LaneCeiling:
    hits = {str(k): min(1.0, hit * (1 + place)) for place, k in enumerate(KS)}
    served = {k: value - 0.01 for k, value in hits.items() if k != "1000"}
    return LaneCeiling(
        lane=lane,
        num_queries=500,
        oracle_hit_at_5=0.999,
        oracle_exact_hit_at_10=0.998,
        oracle_index_hit_at_10=0.987,
        agreement=0.976,
        hits=hits,
        hits_corrected={k: hits[k] for k in served},
        hits_served=served,
        served_difference=Difference(-0.01, -0.02, -0.005, 0.01, 30),
        larger_k_helps=True,
        limited_by=limited_by,
    )


def ceilings(num_lanes: int = 3) -> Ceilings:
    verdicts = [MODEL_LIMITED] * (num_lanes - 2) + [INDEX_LIMITED, UNKNOWN]
    lanes = [ceiling(f"lane-{i}", v, 0.1 + 0.01 * i) for i, v in enumerate(verdicts)]
    whole = ceiling(ALL_LANES, MODEL_LIMITED)
    return Ceilings("index of 9 passages", whole, tuple(lanes), read_lane_rules())


def agreement(bank: Bank) -> tuple[Assignment, Agreement]:
    """Lane-0 and lane-1 fall together, a third of lane-2 is unassigned."""
    assert bank.lane_N is not None
    lane_N = np.array([0, 0, 1], np.int16)[bank.lane_N]
    lane_N[np.flatnonzero(bank.lane_N == 2)[::3]] = -1
    assigned = dataclasses.replace(bank, lane_N=lane_N, lanes=("cluster-00 cell", "cluster-01"))
    found = lane_agreement(bank, assigned)
    assert found is not None
    rows = dict(zip(assigned.lanes, np.bincount(lane_N[lane_N >= 0]).tolist(), strict=True))
    facts = {"rows": rows, "unassigned_rows": int((lane_N < 0).sum())}
    return Assignment(KMEANS, assigned, facts), found


@pytest.mark.parametrize("style", [TEXT, MARKDOWN])
def test_ceilings_show_what_limits_each_lane(style: str) -> None:
    text = ceilings_table(ceilings(), leaky=False, style=style)
    first = next(line for line in text.splitlines() if "lane-1" in line)
    for cell in ("99.9", "99.8", "98.7", "97.6", "-1.0 [ -2.0,  -0.5]", "index"):
        assert cell in first
    assert "@1,000" in text and "index of 9 passages" in text and ALL_LANES in text
    assert "the index limits lane-1" in text and "LEAKY" not in text
    assert ceilings_table(ceilings(), leaky=True, style=style).count("LEAKY") == 2
    if style == TEXT:
        assert max(map(len, text.splitlines()[:-1])) <= 120


def test_hits_and_supply_are_told_for_each_lane(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 10)
    target_row_Q = windows.queries["test"].target_row_Q
    measured = pd.DataFrame({"target_row": target_row_Q, "top_row": 0})
    measured["rank"] = 1.0 + target_row_Q % 9
    found = diagnose("model", {"model": measured}, tiny_bank, windows, read_lane_rules(), False)
    text = hits_table(found)
    for lane in found.lanes:
        line = next(line for line in text.splitlines() if line.startswith(lane.lane))
        for key in ("hit_at_1", "hit_at_5", "hit_at_10"):
            assert f"{100 * lane.figures[key]:.1f} [" in line
    assert supply_line(found) == "Supply: all 3 lanes have fewer than 300 chains to train on."
    one = dataclasses.replace(found, small_supply=("lane-1",))
    assert supply_line(one) == "Supply: fewer than 300 chains to train on in lane-1."
    none = dataclasses.replace(found, small_supply=())
    assert supply_line(none) == "Supply: every lane has 300 chains to train on or more."


def test_a_screen_has_a_line_a_lane_and_ends_with_the_decision(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 10)
    target_row_Q = windows.queries["test"].target_row_Q
    measured = pd.DataFrame({"target_row": target_row_Q, "top_row": 480 + target_row_Q // 2})
    measured["rank"] = 1.0 + target_row_Q % 9
    found = diagnose("model", {"model": measured}, tiny_bank, windows, read_lane_rules(), False)
    lines = lanes_screen(found, ceilings()).splitlines()
    assert len(lines) <= len(found.lanes) + 12
    assert lines[-1] == found.sentence
    for lane in found.lanes:
        (line,) = (line for line in lines if line.startswith(f"{lane.lane} "))
        assert f"{100 * lane.figures['hit_at_5']:.1f} [" in line
    (told,) = (line for line in lines if line.startswith("Most confused: "))
    pair = found.pairs[0]
    assert f"the first hit for {pair.truth} lies in {pair.found} for" in told
    assert ceilings().sentence() in lines and "lanes.txt" in lines[-3]
    alike = dataclasses.replace(found, pairs=())
    assert "no lane more than by chance" in lanes_screen(alike, ceilings())


def test_agreement_is_told_by_label(tiny_bank: Bank) -> None:
    assignment, found = agreement(tiny_bank)
    assert 0.4 < found.adjusted_rand < 0.7
    assert found.best_match_accuracy > found.best_match_of_labelled
    assert assignment_line(assignment, found).endswith("labels 0.48 (adjusted Rand)")
    text = assignment_table(assignment, found)
    line = next(line for line in text.splitlines() if line.startswith("lane-2"))
    assert "cluster-01 66.7, unassigned 33.3" in line
    assert f"adjusted Rand {found.adjusted_rand:.3f}" in text and "same name" not in text
    alone = assignment_table(assignment, None)
    assert "unassigned" in alone and "adjusted Rand" not in alone


def test_agreement_is_drawn(tiny_bank: Bank) -> None:
    assignment, found = agreement(tiny_bank)
    assert_drawn(agreement_figure("kmeans", found), "lane-2", "cluster-00 cell", "unassigned")


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [2, 16])
def test_a_larger_k_is_drawn(num_lanes: int) -> None:
    drawn = larger_k_figure("ema", ceilings(num_lanes), leaky=False)
    assert_drawn(drawn, "lane-0", f"lane-{num_lanes - 1}", ALL_LANES, "k (logarithmic)", "1,000")
    assert_drawn(larger_k_figure("ema", ceilings(), leaky=True), "LEAKY")
