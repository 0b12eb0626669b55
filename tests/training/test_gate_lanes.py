"""The lanes that a gate is told, permuted ones too.

Shapes: N bank rows, R runs, L lanes, X experts.
"""

import numpy as np

from lvm.bank.bank import UNASSIGNED, Bank
from lvm.training.expert_gate import expert_prior, lane_experts, permuted_lanes, train_lanes
from lvm.windows.export import plan_windows


def test_lanes_of_val_and_test_rows_are_not_told(tiny_bank: Bank) -> None:
    windows = plan_windows(tiny_bank, 20)
    lane_N = train_lanes(tiny_bank, windows)
    train_row = windows.train_rows()
    assert np.array_equal(lane_N[train_row], tiny_bank.lane_N[train_row])
    assert (np.delete(lane_N, train_row) == UNASSIGNED).all()


def test_permuted_lanes_are_as_many_and_elsewhere(tiny_bank: Bank) -> None:
    lane_N = tiny_bank.lane_N.astype(np.int64)
    lane_N[:35] = UNASSIGNED  # one document, most of the next
    other_N = permuted_lanes(lane_N, tiny_bank.document_N, seed=0)
    assert np.array_equal(other_N == UNASSIGNED, lane_N == UNASSIGNED)
    first = tiny_bank.document_table()["first_row"].to_numpy()[2:]
    before_R, after_R = lane_N[first], other_N[first]
    assert (before_R != after_R).mean() > 0.5
    told = [lanes[[35, *first]] for lanes in (lane_N, other_N)]
    assert np.array_equal(*(np.bincount(lanes) for lanes in told))
    assert np.array_equal(other_N[first], other_N[first + 19]), "a document keeps to one lane"
    assert np.array_equal(other_N, permuted_lanes(lane_N, tiny_bank.document_N, seed=0))
    assert not np.array_equal(other_N, permuted_lanes(lane_N, tiny_bank.document_N, seed=1))


def test_every_lane_has_experts_and_every_expert_a_lane() -> None:
    for num_lanes, num_experts in ((16, 16), (8, 16), (3, 16), (1, 4), (20, 16)):
        belongs_LX = lane_experts(num_lanes, num_experts)
        assert belongs_LX.any(axis=0).all() and belongs_LX.any(axis=1).all()
        if num_lanes <= num_experts:
            assert (belongs_LX.sum(axis=0) == 1).all()
    assert np.array_equal(lane_experts(16, 16), np.eye(16, dtype=bool))
    assert np.flatnonzero(lane_experts(8, 16)[3]).tolist() == [3, 11]


def test_the_prior_is_the_lanes_share_among_their_experts() -> None:
    lane_N = np.repeat([0, 1, UNASSIGNED], [29, 9, 5])
    prior_X = expert_prior(lane_N, num_lanes=2, num_experts=4)
    np.testing.assert_allclose(prior_X, [0.375, 0.125, 0.375, 0.125])
    np.testing.assert_allclose(expert_prior(lane_N, 5, 5).sum(), 1)
    assert (expert_prior(lane_N, 5, 5) > 0).all()
    np.testing.assert_allclose(expert_prior(lane_N, 0, 4), 0.25)
    np.testing.assert_allclose(expert_prior(np.arange(4), 4, 2), [0.5, 0.5])
