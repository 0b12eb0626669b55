"""Losses against values worked out by hand.

Shapes: P positions, D vector dim, K negatives, C positions with H negatives of their own.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from lvm.training import loss as objectives
from lvm.training.loss import OwnNegatives, SampledSoftmax, seed_loss


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
    objective = SampledSoftmax(temperature=0.2)
    expected = objective(prediction_PD[:1], target_PD[:1], negative_KD)
    with_twin = torch.cat([negative_KD, target_PD[:1]])
    loss = objective(prediction_PD[:1], target_PD[:1], with_twin)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert torch.isfinite(objective.log_temperature.grad)
    assert not torch.equal(
        objective(prediction_PD[1:2], target_PD[1:2], with_twin),
        objective(prediction_PD[1:2], target_PD[1:2], negative_KD),
    )


def test_own_negatives_count_at_their_position_alone() -> None:
    """A negative of one position's own weighs there as a shared one does, nowhere else."""
    prediction_PD, target_PD, negative_KD = unit(3, 8), unit(3, 8, seed=1), unit(5, 8, seed=2)
    vector_CHD = unit(2, 2, 8, seed=3)
    vector_CHD[1, 0] = target_PD[2]  # a twin of its own target
    real_CH = torch.tensor([[True, False], [True, True]])
    own = OwnNegatives(torch.tensor([0, 2]), vector_CHD, real_CH)
    objective = SampledSoftmax()
    loss_P = objective(prediction_PD, target_PD, negative_KD, own)
    for position, rows in ((0, vector_CHD[0, :1]), (1, negative_KD[:0]), (2, vector_CHD[1, 1:])):
        one = slice(position, position + 1)
        shared = torch.cat([negative_KD, rows])
        expected = objective(prediction_PD[one], target_PD[one], shared)
        torch.testing.assert_close(loss_P[one], expected)
    prediction_PD.requires_grad_()
    objective(prediction_PD, target_PD, negative_KD, own).sum().backward()
    assert torch.isfinite(prediction_PD.grad).all()
    assert torch.isfinite(objective.log_temperature.grad)


def plain_log_sum(scaled_PD, target_PD, negative_KD):
    """All logits at once."""
    twin_PK = target_PD @ negative_KD.T >= objectives.TWIN_COSINE
    return (scaled_PD @ negative_KD.T).masked_fill(twin_PK, -torch.inf).logsumexp(dim=1)


@pytest.mark.parametrize("half", [False, True])
def test_the_log_sum_in_blocks_is_the_plain_one(half: bool, monkeypatch) -> None:
    monkeypatch.setattr(objectives, "LOSS_BLOCK", 7)
    target_PD, negative_KD = unit(20, 8, seed=1), unit(12, 8, seed=2)
    target_PD[:5] = negative_KD[:5]  # twins
    target_PD[5] = normalize(negative_KD[5] + 0.12 * unit(8, seed=3), dim=-1)  # just not one
    assert 0.985 < target_PD[5] @ negative_KD[5] < objectives.TWIN_COSINE
    scaled_PD = (10 * unit(20, 8)).requires_grad_()
    found_P = objectives.log_sum(scaled_PD, target_PD, negative_KD, half)
    expected_P = plain_log_sum(scaled_PD, target_PD, negative_KD)
    torch.testing.assert_close(found_P, expected_P)
    gradients = [
        torch.autograd.grad((sum_P * torch.arange(20)).sum(), scaled_PD)[0]
        for sum_P in (found_P, expected_P)
    ]
    tolerance = {"rtol": 0.02, "atol": 0.05} if half else {}
    torch.testing.assert_close(*gradients, **tolerance)


def test_a_twin_counts_as_one_where_all_its_entries_are_rounded_down() -> None:
    """Entries just below the middle of two bf16 numbers: the rough cosine is lower by 2^-7."""
    entry, cosine = 0.0625 * 1.003895, 0.9951
    target_PD = torch.full((1, 255), entry)
    target_PD[0, 254] = 0.0
    negative_KD = target_PD.clone()
    negative_KD[0, 252:254] = torch.tensor([cosine / entry - 252 * entry, 0.0])
    negative_KD[0, 254] = (1 - negative_KD.square().sum()).sqrt()
    assert float(target_PD @ negative_KD.T) == pytest.approx(cosine, abs=1e-4)
    assert float(target_PD.bfloat16() @ negative_KD.bfloat16().T) < 0.99
    other_KD = torch.cat([negative_KD, unit(3, 255)])
    scaled_PD = 10 * unit(1, 255, seed=1)
    found_P = objectives.log_sum(scaled_PD, target_PD, other_KD, True)
    torch.testing.assert_close(found_P, plain_log_sum(scaled_PD, target_PD, other_KD))
    expected_P = objectives.log_sum(scaled_PD, target_PD, other_KD[1:], True)
    torch.testing.assert_close(found_P, expected_P)


def test_the_written_gradient_of_the_log_sum_agrees_with_differences() -> None:
    scaled_PD = unit(3, 4).double().requires_grad_()
    target_PD, negative_KD = unit(3, 4, seed=1).double(), unit(5, 4, seed=2).double()
    assert torch.autograd.gradcheck(
        lambda scaled: objectives.log_sum(scaled, target_PD, negative_KD, False), scaled_PD
    )


def test_where_every_negative_is_a_twin_nothing_is_lost() -> None:
    prediction_PD, target_PD = unit(2, 8).requires_grad_(), unit(1, 8, seed=1).expand(2, -1)
    for negative_KD in (target_PD[:1], target_PD[:0]):
        loss_P = SampledSoftmax(cosine_weight=0.0)(prediction_PD, target_PD, negative_KD)
        torch.testing.assert_close(loss_P, torch.zeros(2))
        assert not torch.autograd.grad(loss_P.sum(), prediction_PD)[0].any()


def test_seed_loss_of_a_share_of_the_batch() -> None:
    """Predictions split among processes, each against all targets, average to the whole loss."""
    prediction_BD, target_BD = unit(5, 8), unit(5, 8, seed=1)
    whole = seed_loss(prediction_BD, target_BD, torch.arange(5), alpha=0.5)
    shares = [torch.tensor([0, 2, 4]), torch.tensor([1, 3])]
    parts = [len(b) / 5 * seed_loss(prediction_BD[b], target_BD, b, alpha=0.5) for b in shares]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("focus", [0.0, 0.3, 1.0])
def test_the_loss_is_generalised_cross_entropy_of_the_share(focus: float) -> None:
    prediction_PD, target_PD, negative_KD = unit(5, 8), unit(5, 8, seed=1), unit(7, 8, seed=2)
    objective = SampledSoftmax(temperature=0.1, cosine_weight=0.25, focus=focus)
    expected = []
    for prediction_D, target_D in zip(prediction_PD, target_PD, strict=True):
        cosine = float(prediction_D @ target_D)
        weights = [math.exp(float(prediction_D @ n) / 0.1) for n in negative_KD]
        share = math.exp(cosine / 0.1) / (math.exp(cosine / 0.1) + sum(weights))
        missed = (1 - share**focus) / focus if focus else -math.log(share)
        expected.append(missed + 0.25 * (1 - cosine))
    found_P = objective(prediction_PD, target_PD, negative_KD)
    torch.testing.assert_close(found_P, torch.tensor(expected))


def test_focus_bounds_what_a_hopeless_target_costs() -> None:
    prediction_PD = unit(1, 8)
    losses = [
        SampledSoftmax(0.05, 0.0, focus)(prediction_PD, -prediction_PD, prediction_PD).item()
        for focus in (0.0, 0.5)
    ]
    assert losses[0] > 30 and losses[1] == pytest.approx(2.0)


def test_the_temperature_learns_and_stays_in_its_range() -> None:
    objective = SampledSoftmax()
    objective(unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2)).mean().backward()
    assert objective.log_temperature.grad is not None
    assert objective.log_temperature.grad.abs() > 0
    objective.log_temperature.data.fill_(5.0)
    objective.keep_in_range()
    assert float(objective.temperature().detach()) == pytest.approx(0.2)


def test_seed_loss_by_hand() -> None:
    """Two orthogonal pairs, both right: MSE 0, cosine 1, InfoNCE log(1 + e^(-1/0.07))."""
    vectors_BD = torch.eye(2)
    expected = 0.03 * math.log1p(math.exp(-1 / 0.07))
    assert float(seed_loss(vectors_BD, vectors_BD, torch.arange(2), alpha=0.03)) == pytest.approx(
        expected, abs=1e-9
    )
    wrong = float(seed_loss(vectors_BD, vectors_BD.flip(0), torch.arange(2), alpha=0.0))
    assert wrong == pytest.approx(1.0 + 0.5)
