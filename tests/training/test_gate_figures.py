"""Figures of a gate whose choices are planted.

Shapes: L lanes, X experts.
"""

import math

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from lvm.bank.bank import UNASSIGNED
from lvm.training.expert_gate import lane_table, load_figures, mutual_information


def test_equal_loads() -> None:
    figures = load_figures(np.full(16, 125))
    assert figures == {
        "expert_load_max": pytest.approx(1 / 16),
        "expert_load_entropy": pytest.approx(1),
        "dead_experts": 0,
    }


def test_dead_experts_are_those_below_half_an_equal_share() -> None:
    # Of 1,000 choices among 4, half an equal share is 125.
    figures = load_figures(np.array([626, 125, 124, 125]))
    assert (figures["dead_experts"], figures["expert_load_max"]) == (1, 0.626)
    alone = load_figures(np.array([7, 0, 0, 0]))
    assert (alone["dead_experts"], alone["expert_load_entropy"]) == (3, 0)


def test_queries_add_their_weights_to_their_lanes() -> None:
    gate_QX = np.array([[0.75, 0.25, 0], [0, 0.5, 0.5], [1, 0, 0], [0, 0.25, 0.75]])
    table_LX = lane_table(gate_QX, np.array([1, 0, UNASSIGNED, 1]), num_lanes=3)
    assert table_LX.tolist() == [[0, 0.5, 0.5], [0.75, 0.5, 0.75], [0, 0, 0]]


def test_mutual_information_is_that_of_scikit_learn() -> None:
    table_LX = np.random.default_rng(0).integers(0, 9, (4, 6))
    expected = mutual_info_score(None, None, contingency=table_LX)
    assert mutual_information(table_LX) == pytest.approx(expected)
    assert mutual_information(np.eye(8)) == pytest.approx(math.log(8))
    assert mutual_information(np.ones((8, 16))) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.zeros((2, 3))) == 0
