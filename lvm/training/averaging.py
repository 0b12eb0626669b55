"""Averages of the weights over training steps, kept beside the raw weights."""

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

AVERAGES = ("ema", "swa", "none")
UNIFORM_SHARE = 0.25


class WeightAverage:
    """`ema`: exponential, over about the last tenth of training, at most 1,000 steps.

    `swa`: uniform over the last quarter of the steps (Izmailov et al., arXiv 1803.05407, section
    3.2, with the learning rate left to its schedule). `none`: no average.
    """

    def __init__(self, model: nn.Module, kind: str, total_steps: int) -> None:
        self._averaged: AveragedModel | None = None
        self._first_step = math.floor((1 - UNIFORM_SHARE) * total_steps) if kind == "swa" else 0
        if kind == "ema":
            decay = average_decay(total_steps)
            self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        elif kind == "swa":
            self._averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        if self._averaged is not None and step >= self._first_step:
            self._averaged.update_parameters(model)

    def model(self) -> nn.Module | None:
        """Return the model with the averaged weights; None while nothing is averaged yet."""
        if self._averaged is None or not int(self._averaged.n_averaged):
            return None
        averaged: nn.Module = self._averaged.module
        return averaged

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._averaged is None else self._averaged.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self._averaged is not None:
            self._averaged.load_state_dict(dict(state))


def average_decay(total_steps: int) -> float:
    """Return the decay of the exponential average for a training of `total_steps`."""
    return min(0.999, max(0.5, 1 - 10 / max(1, total_steps)))
