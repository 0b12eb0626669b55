"""Predictors that add a learnt increment to a short-range skip.

Shapes: B batch, T time, D vector dim, E = 2 D recent features, H hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lvm.models.scan import moving_average
from lvm.models.skip import AdaptiveAverage


class ResidualPredictor(nn.Module):
    """Predicts normalise(W_skip [x_t; avg_t] + W_out h_t); a subclass's `encode` says what h_t is.

    avg_t is an average of the recent vectors whose weights adapt to their content. W_skip starts
    as the moving average of `decay`, W_out as zero: step 0 equals that baseline.
    """

    def __init__(self, dim: int, hidden: int, decay: float, dropout: float) -> None:
        super().__init__()
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay: {decay} is not between 0 and 1 (both excluded)")
        self.decay = decay
        self.input_dropout = nn.Dropout(dropout)
        self.average = AdaptiveAverage(dim, decay)
        self.skip_change = nn.Linear(2 * dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.project_out = nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.skip_change.weight)

    def forward(self, context_BTD: Tensor) -> Tensor:
        """Return unit predictions (B, T, D) for unit contexts (B, T, D); t predicts row t + 1."""
        fixed_BTD = moving_average(context_BTD, self.decay)
        recent_BTE = torch.cat([context_BTD, normalize(fixed_BTD, dim=-1)], dim=-1)
        noisy_BTE = self.input_dropout(recent_BTE)
        average_BTD = normalize(self.average(context_BTD, fixed_BTD, noisy_BTE), dim=-1)
        skip_BTD = average_BTD + self.skip_change(noisy_BTE)
        # Unit length like the inputs, so that one learning rate suits both maps.
        state_BTH = normalize(self.encode(noisy_BTE), dim=-1)
        increment_BTD = self.project_out(self.dropout(state_BTH))
        return normalize((skip_BTD + increment_BTD).float(), dim=-1)

    def encode(self, recent_BTE: Tensor) -> Tensor:
        """Return the hidden states (B, T, H) of every position from [x_t; ema_t]."""
        raise NotImplementedError

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Return the parameters behind the increment, which learn at a rate of their own."""
        skip = {id(p) for part in (self.average, self.skip_change) for p in part.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in skip]
