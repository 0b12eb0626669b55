"""Moving average over recent vectors whose weights adapt to their content.

Shapes: B batch, T time, D vector dim, A address features, K taps.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class AdaptiveAverage(nn.Module):
    """Weighs the last `taps` vectors, and the average of all before them, by content.

    weight_k is softmax_k(log prior_k + q(x_t, ema_t) . k(x_{t-k}) / sqrt(A)), where prior_k =
    decay^k are the weights of the moving average; the last tap stands for everything older, with
    the rest of the prior. The query map starts at zero: an untrained average is the moving average.
    """

    def __init__(self, dim: int, decay: float, taps: int = 16, features: int = 128) -> None:
        super().__init__()
        self.decay, self.taps = decay, taps
        self.query = nn.Linear(2 * dim, features)
        self.key = nn.Linear(dim, features)
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    def forward(self, context_BTD: Tensor, average_BTD: Tensor, query_BTE: Tensor) -> Tensor:
        """Return the adapted average (B, T, D); `average_BTD` is the moving average itself.

        `query_BTE` is [x_t, ema_t], perhaps with dropout.
        """
        older_BTD = _shift(average_BTD, self.taps)
        query_BTA = self.query(query_BTE) / math.sqrt(self.key.out_features)
        key_BTA = self.key(context_BTD)
        keys = [_shift(key_BTA, k) for k in range(self.taps)] + [self.key(older_BTD)]
        score_BTK = torch.stack([(query_BTA * key).sum(dim=-1) for key in keys], dim=-1)
        prior_TK = self.log_prior(context_BTD.shape[1]).to(score_BTK)
        weight_BTK = (score_BTK + prior_TK).softmax(dim=-1)
        adapted_BTD = weight_BTK[..., -1:] * older_BTD
        for k in range(self.taps):
            adapted_BTD = adapted_BTD + weight_BTK[..., k : k + 1] * _shift(context_BTD, k)
        return adapted_BTD

    def log_prior(self, num_steps: int) -> Tensor:
        """Return the log weights (T, K) of the moving average; -inf where a tap has no vector."""
        step_T1 = torch.arange(num_steps, dtype=torch.float64)[:, None]
        tap_1K = torch.arange(self.taps, dtype=torch.float64)[None]
        recent_TK = (tap_1K * math.log(self.decay)).expand(num_steps, -1)
        recent_TK = recent_TK.masked_fill(tap_1K > step_T1, -torch.inf)
        rest_T1 = (self.decay**self.taps - self.decay ** (step_T1 + 1)) / (1 - self.decay)
        return torch.cat([recent_TK, rest_T1.clamp(min=0).log()], dim=1)


def _shift(vector_BTD: Tensor, steps: int) -> Tensor:
    """Return the vectors `steps` positions earlier, zero where there is none."""
    return pad(vector_BTD, (0, 0, steps, 0))[:, : vector_BTD.shape[1]] if steps else vector_BTD
