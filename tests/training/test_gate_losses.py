"""Losses of a gate against plain reimplementations.

Shapes: P positions, L lanes, X experts.
"""

import math

import pytest
import torch

from lvm.bank.bank import UNASSIGNED
from lvm.training.expert_gate import (
    MEAN_DECAY,
    GateLoss,
    balance_loss,
    lane_experts,
    lane_loss,
    z_loss,
)

PRIOR_X = torch.tensor([0.5, 0.3, 0.15, 0.05])


def logits(num_positions: int = 7, num_experts: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return 2 * torch.randn(num_positions, num_experts, generator=draw)


def gate_loss(**weights: float) -> GateLoss:
    chosen = {"balance": 1.0, "z_weight": 0.0} | weights
    return GateLoss(PRIOR_X, torch.from_numpy(lane_experts(2, 4)), **chosen)


def test_the_balance_is_least_at_the_prior() -> None:
    assert balance_loss(PRIOR_X, PRIOR_X).item() == pytest.approx(0, abs=1e-7)
    for share_X in torch.rand(50, 4, generator=torch.Generator().manual_seed(0)):
        assert balance_loss(share_X / share_X.sum(), PRIOR_X) > 0
    assert math.isfinite(balance_loss(torch.tensor([1.0, 0.0, 0.0, 0.0]), PRIOR_X))


@pytest.mark.slow
def test_the_balance_pulls_a_gate_to_the_prior() -> None:
    loss, logit_PX = gate_loss(), torch.zeros(5, 4, requires_grad=True)
    (grad_PX,) = torch.autograd.grad(loss(logit_PX, torch.zeros(5), 0.0), logit_PX)
    assert (grad_PX[:, 0] < 0).all() and (grad_PX[:, 3] > 0).all()
    optimizer = torch.optim.SGD([logit_PX], lr=0.2)
    for _ in range(1000):
        optimizer.zero_grad()
        loss(logit_PX, torch.zeros(5), 0.0).backward()
        optimizer.step()
    torch.testing.assert_close(logit_PX.softmax(-1).mean(0), PRIOR_X, atol=0.01, rtol=0)


def test_batches_of_one_lane_each_may_be_balanced_together() -> None:
    """A gate that follows the lanes, in turns, is left alone; one that ignores them is not."""
    loss = gate_loss()
    lanes = torch.tensor([[0.8, 0.0, 0.2, 0.0], [0.0, 0.7, 0.0, 0.3]]).clamp_min(1e-6).log()
    turns = [0, 0, 1, 0, 1] * 40  # the mean is 0.48, 0.28, 0.12, 0.12
    late = [loss(lanes[turn].expand(6, 4), torch.zeros(6), 0.0).item() for turn in turns][-50:]
    assert max(late) < 0.12
    assert balance_loss(lanes[1].exp(), PRIOR_X) > 1
    assert loss.mean_X.sum().item() == pytest.approx(1, abs=1e-4)


def test_the_mean_over_steps_has_the_gradient_of_the_last() -> None:
    loss, logit_PX = gate_loss(), logits().requires_grad_()
    share_X = logit_PX.softmax(-1).mean(0)
    mean_X = MEAN_DECAY * PRIOR_X + (1 - MEAN_DECAY) * share_X.detach()
    found = loss(logit_PX, torch.zeros(7), 0.0)
    assert found.item() == pytest.approx(balance_loss(mean_X, PRIOR_X).item(), abs=1e-7)
    slope_X = (mean_X / PRIOR_X).log() + 1
    (expected_PX,) = torch.autograd.grad((slope_X * share_X).sum(), logit_PX)
    (found_PX,) = torch.autograd.grad(found, logit_PX)
    torch.testing.assert_close(found_PX, expected_PX)


def test_the_z_loss_is_the_mean_square_of_the_log_of_the_sum() -> None:
    squares = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits().tolist()]
    assert z_loss(logits()).item() == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_lanes_are_told_by_the_probability_of_their_experts() -> None:
    belongs_LX = torch.from_numpy(lane_experts(2, 4))
    lane_P = torch.tensor([0, 1, UNASSIGNED, 1, 0, UNASSIGNED, 1])
    costs = []
    for row, lane in zip(logits().double().softmax(-1).tolist(), lane_P.tolist(), strict=True):
        if lane != UNASSIGNED:
            costs.append(-math.log(row[lane] + row[lane + 2]))
    expected = sum(costs) / 5
    assert lane_loss(logits(), lane_P, belongs_LX).item() == pytest.approx(expected, rel=1e-5)
    nothing = lane_loss(logits(), torch.full((7,), UNASSIGNED), belongs_LX)
    assert nothing.item() == 0


def test_terms_add_up_and_choices_are_counted() -> None:
    loss, lane_P = gate_loss(balance=0.5, z_weight=0.25), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    found = loss(logits(), lane_P, 0.1)
    expected = 0.5 * balance_loss(loss.mean_X, PRIOR_X) + 0.25 * z_loss(logits())
    expected = expected + 0.1 * lane_loss(logits(), lane_P, loss.belongs_LX)
    torch.testing.assert_close(found, expected)
    counted_X = torch.zeros(4, dtype=torch.int64)
    for row in logits():
        counted_X[row.argsort(descending=True)[:2]] += 1
    assert torch.equal(loss.take_counts(), counted_X)
    assert not loss.take_counts().any()


def test_a_step_that_is_no_number_leaves_the_mean_as_it_was() -> None:
    loss = gate_loss()
    broken = loss(torch.full((3, 4), math.nan), torch.zeros(3), 0.0)
    assert math.isnan(broken.item())
    assert torch.equal(loss.mean_X, PRIOR_X) and not loss.count_X.any()
