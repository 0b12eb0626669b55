"""Free predictors: parameter-free or closed-form maps from a context to the next vector.

Shapes: B batch, T time, D vector dim. Every forward maps a context (B, T, D) of unit float32
vectors to predictions (B, T, D), unit float32; position t reads positions up to t only.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lvm.models.scan import moving_average


class CopyLast(nn.Module):
    """Predicts that the last vector repeats."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.config = {"model": "copy-last", "dim": dim}

    def forward(self, context_BTD: Tensor) -> Tensor:
        return context_BTD


class MovingAverage(nn.Module):
    """Predicts the exponential moving average of the context, weights decay^k."""

    def __init__(self, dim: int, decay: float = 0.5) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay: {decay} is not between 0 and 1 (both excluded)")
        self.decay = decay
        self.config = {"model": "ema", "dim": dim, "decay": decay}

    def forward(self, context_BTD: Tensor) -> Tensor:
        return normalize(moving_average(context_BTD, self.decay), dim=-1)


class ContextMean(nn.Module):
    """Predicts the mean of all vectors of the context."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.config = {"model": "context-mean", "dim": dim}

    def forward(self, context_BTD: Tensor) -> Tensor:
        return normalize(context_BTD.cumsum(dim=1), dim=-1)


class Ridge(nn.Module):
    """Predicts by a linear map of `ridge_features`, fitted in closed form.

    Buffers: weight (D, 4 D) and bias (D), as scikit-learn's Ridge stores them.
    """

    def __init__(self, dim: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.config = {"model": "ridge", "dim": dim, "alpha": alpha}
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(dim, 4 * dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, context_BTD: Tensor) -> Tensor:
        features = ridge_features(context_BTD)
        return normalize(torch.nn.functional.linear(features, self.weight, self.bias), dim=-1)


def ridge_features(context_BTD: Tensor) -> Tensor:
    """Return [x_t, x_{t-1}, average of decay 0.5, average of decay 0.9], (B, T, 4 D)."""
    previous_BTD = torch.cat([context_BTD[:, :1], context_BTD[:, :-1]], dim=1)
    fast_BTD = moving_average(context_BTD, 0.5)
    slow_BTD = moving_average(context_BTD, 0.9)
    return torch.cat([context_BTD, previous_BTD, fast_BTD, slow_BTD], dim=-1)
