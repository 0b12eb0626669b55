"""Losses against values worked out by hand.

Shapes: P positions, D vector dim, K negatives.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from lvm.objectives import SampledSoftmax, seed_loss


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=draw), dim=-1)


def test_sampled_softmax_by_hand() -> None:
    """Cosines 1 (target), 0 (negative), tau 0.1: loss = log(1 + e^-10) and no cosine penalty."""
    prediction_PD, negative_KD = torch.eye(3)[:1], torch.eye(3)[1:2]
    loss = SampledSoftmax(temperature=0.1)(prediction_PD, prediction_PD, negative_KD)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10)), abs=1e-6)
    opposite = SampledSoftmax(temperature=0.1)(prediction_PD, -prediction_PD, negative_KD)
    assert opposite.item() == pytest.approx(10 + math.log1p(math.exp(-10)) + 0.1 * 2, rel=1e-5)


def test_a_twin_of_the_target_is_no_negative() -> None:
    prediction_PD, target_PD, negative_KD = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2)
    objective = SampledSoftmax()
    expected = objective(prediction_PD[:1], target_PD[:1], negative_KD)
    with_twin = torch.cat([negative_KD, target_PD[:1]])
    loss = objective(prediction_PD[:1], target_PD[:1], with_twin)
    assert torch.equal(loss, expected)
    loss.backward()
    assert torch.isfinite(objective.log_temperature.grad)
    assert not torch.equal(
        objective(prediction_PD[1:2], target_PD[1:2], with_twin),
        objective(prediction_PD[1:2], target_PD[1:2], negative_KD),
    )


def test_the_temperature_learns_and_stays_in_its_range() -> None:
    objective = SampledSoftmax()
    objective(unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2)).backward()
    assert objective.log_temperature.grad is not None
    assert objective.log_temperature.grad.abs() > 0
    objective.log_temperature.data.fill_(5.0)
    objective.keep_in_range()
    assert float(objective.temperature().detach()) == pytest.approx(0.2)


def test_seed_loss_by_hand() -> None:
    """Two orthogonal pairs, both right: MSE 0, cosine 1, InfoNCE log(1 + e^(-1/0.07))."""
    vectors_BD = torch.eye(2)
    expected = 0.03 * math.log1p(math.exp(-1 / 0.07))
    assert float(seed_loss(vectors_BD, vectors_BD, alpha=0.03)) == pytest.approx(expected, abs=1e-9)
    wrong = float(seed_loss(vectors_BD, vectors_BD.flip(0), alpha=0.0))
    assert wrong == pytest.approx(1.0 + 0.5)
