"""Averages of weights against means taken by hand."""

import pytest
import torch
from torch import nn

from lvm.training.optimizer import WeightAverage, average_decay


def weight_after(step: int) -> float:
    return float(step**2)


def averaged_weight(kind: str, total: int, state_at: int | None = None) -> float | None:
    model = nn.Linear(1, 1)
    average = WeightAverage(model, kind, total)
    for step in range(total):
        nn.init.constant_(model.weight, weight_after(step))
        average.update(model, step)
        if step == state_at:
            state = {k: v.clone() for k, v in average.state_dict().items()}
            average = WeightAverage(model, kind, total)
            average.load_state_dict(state)
    found = average.model()
    return None if found is None else found.weight.item()


@pytest.mark.parametrize("state_at", [None, 3, 17])
def test_the_uniform_average_covers_the_last_quarter(state_at: int | None) -> None:
    expected = sum(weight_after(step) for step in range(15, 20)) / 5
    assert averaged_weight("swa", 20, state_at) == pytest.approx(expected)


def test_the_exponential_average_forgets() -> None:
    expected = weight_after(0)
    for step in range(1, 20):
        expected = 0.5 * expected + 0.5 * weight_after(step)
    assert averaged_weight("ema", 20) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "decay"), [(1, 0.5), (20, 0.5), (100, 0.9), (10**4, 0.999), (10**6, 0.999)]
)
def test_the_exponential_average_spans_a_tenth_of_training_at_most_1000_steps(
    steps: int, decay: float
) -> None:
    assert average_decay(steps) == pytest.approx(decay, abs=1e-12)


def test_no_average_is_none() -> None:
    assert averaged_weight("none", 20) is None
    assert WeightAverage(nn.Linear(1, 1), "swa", 20).model() is None
    assert torch.equal(
        torch.tensor(0), WeightAverage(nn.Linear(1, 1), "ema", 9).state_dict()["n_averaged"]
    )
