"""Predictors that add a learnt increment to a short-range skip.

Shapes: B batch, T time, D vector dim, E = 2 D recent features, H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lvm.models.dropout import Dropout
from lvm.models.norm import unit
from lvm.models.scan import RunningAverage, moving_average
from lvm.models.skip import AdaptiveAverage, Taps


@dataclass
class ResidualCache:
    """What a residual predictor keeps of a stream; `encoder` is the subclass's own part."""

    average: RunningAverage
    taps: Taps
    encoder: Any


class Residual(nn.Module):
    """Predicts unit(unit(avg_t) + W_skip [x_t; unit(ema_t)] + W_out unit(h_t)).

    avg_t, ema_t, h_t are the parts that a subclass makes.

    Its `encode` says what h_t is, `begin_encoder` and `step_encoder` say the same of a stream.
    """

    decay: float
    input_dropout: nn.Module
    average: AdaptiveAverage
    skip_change: nn.Module
    dropout: nn.Module
    project_out: nn.Module

    def forward(self, context_BTD: Tensor) -> Tensor:
        """Return unit predictions (B, T, D) for unit contexts (B, T, D); t predicts row t + 1.

        Contexts must be finite: 0 x NaN is NaN, so that a later row of weight zero would count.
        """
        return self._predict(*self._read(context_BTD))

    def begin(self, context_TD: Tensor) -> tuple[Tensor, ResidualCache]:
        """Return the prediction (D,) after a context with the cache of a stream; one pass."""
        average_TD = moving_average(context_TD[None], self.decay)[0]
        recent_TE = _recent(context_TD, average_TD)
        adapted_TD = self.average(context_TD[None], average_TD[None], recent_TE[None])[0]
        state_H, encoder = self.begin_encoder(recent_TE)
        average = RunningAverage(context_TD, self.decay)
        cache = ResidualCache(average, self.average.begin(context_TD, average_TD), encoder)
        return self._predict(adapted_TD[-1], recent_TE[-1], state_H), cache

    def step(self, vector_D: Tensor, cache: ResidualCache) -> Tensor:
        """Return the prediction (D,) after one more row."""
        average_D = cache.average.append(vector_D)
        recent_E = _recent(vector_D, average_D)
        adapted_D = self.average.step(vector_D, average_D, recent_E, cache.taps)
        return self._predict(adapted_D, recent_E, self.step_encoder(recent_E, cache.encoder))

    def encode(self, recent_BTE: Tensor) -> Tensor:
        """Return the hidden states (B, T, H) of every position from [x_t; ema_t]."""
        raise NotImplementedError

    def begin_encoder(self, recent_TE: Tensor) -> tuple[Tensor, Any]:
        """Return the hidden state (H,) of the last position, what the encoder keeps."""
        raise NotImplementedError

    def step_encoder(self, recent_E: Tensor, cache: Any) -> Tensor:
        """Return the hidden state (H,) of one more position."""
        raise NotImplementedError

    def _read(self, context_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a prediction is made of: avg_t, [x_t; ema_t], h_t, each (B, T, ...)."""
        fixed_BTD = moving_average(context_BTD, self.decay)
        # Cast once: autocast would cast again for each map that reads them.
        context_BTD, fixed_BTD, recent_BTE = (
            rows.to(_dtype(context_BTD))
            for rows in (context_BTD, fixed_BTD, _recent(context_BTD, fixed_BTD))
        )
        noisy_BTE = self.input_dropout(recent_BTE)
        adapted_BTD = self.average(context_BTD, fixed_BTD, noisy_BTE)
        return adapted_BTD, noisy_BTE, self.encode(noisy_BTE)

    def _predict(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        return unit(self._sum(adapted_BTD, recent_BTE, state_BTH).float())

    def _sum(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        """Return the prediction before it is scaled to unit length."""
        skip_BTD = unit(adapted_BTD) + self.skip_change(recent_BTE)
        # Unit length like the inputs, so that one learning rate suits both maps.
        increment_BTD: Tensor = self.project_out(self.dropout(unit(state_BTH)))
        return skip_BTD + increment_BTD


class ResidualPredictor(Residual):
    """Makes the parts of a residual predictor.

    avg_t is an average of the recent vectors whose weights adapt to their content. They start as
    the moving average of `decay`, W_skip and W_out as zero: step 0 equals that baseline.
    """

    def __init__(self, dim: int, hidden: int, decay: float, dropout: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay: {decay} is not between 0 and 1 (both excluded)")
        self.decay = decay
        self.input_dropout = Dropout(dropout)
        self.average = AdaptiveAverage(dim, decay)
        self.skip_change = nn.Linear(2 * dim, dim, bias=False)
        self.dropout = Dropout(dropout)
        self.project_out = nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.skip_change.weight)

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Return the parameters behind the increment, which learn at a rate of their own."""
        skip = {id(p) for part in (self.average, self.skip_change) for p in part.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in skip]


def _recent(context_BTD: Tensor, average_BTD: Tensor) -> Tensor:
    """Return [x_t; ema_t], the input of every map, (B, T, 2 D)."""
    return torch.cat([context_BTD, unit(average_BTD)], dim=-1)


def _dtype(vector_BTD: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products take such vectors here."""
    device = vector_BTD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return vector_BTD.dtype
