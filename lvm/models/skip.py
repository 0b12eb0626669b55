"""Moving average over recent vectors whose weights adapt to their content.

Shapes: B batch, T time, D vector dim, A address features, K taps, C blocks, S steps of a block, W
rows that a block looks at.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

BLOCK = 32
VANISHED = 2**-60  # a weight that changes no float64 beside 1


@dataclass
class Taps:
    """What `AdaptiveAverage` keeps of a stream: its newest rows first, zeros where there is none.

    The rows (K, D), their keys (K, A), the moving average at each of them (K, D), the log weights
    of the rows with that of all before them (K + 1,).
    """

    vector_KD: Tensor
    key_KA: Tensor
    average_KD: Tensor
    prior: Tensor
    num_rows: int


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

        `query_BTE` is [x_t, ema_t], perhaps with dropout. Steps run in blocks, each a product with
        the rows of the block and the `taps` rows before it: matrix products cost less than taps.
        Rows must be finite, as banks are when opened, contexts when checked: a row that is not
        reaches earlier steps of its block, whose weight of it is zero.
        """
        num_steps = context_BTD.shape[1]
        older_BTD = pad(average_BTD, (0, 0, self.taps, 0))[:, :num_steps]
        query_BTA = self.query(query_BTE) / math.sqrt(self.key.out_features)
        older_score_BT1 = (query_BTA * self.key(older_BTD)).sum(dim=-1, keepdim=True)
        query_BCSA = _blocks(query_BTA, num_steps)
        key_BCWA = self._windows(self.key(context_BTD), num_steps)
        score_BCSW = query_BCSA @ key_BCWA.transpose(-1, -2)
        recent_CSW, rest_CS1 = self.log_prior(num_steps)
        logits = torch.cat(
            [
                score_BCSW + recent_CSW.to(score_BCSW),
                _blocks(older_score_BT1, num_steps) + rest_CS1.to(score_BCSW),
            ],
            dim=-1,
        )
        weight_BCSW, older_weight_BCS1 = logits.softmax(dim=-1).split([BLOCK + self.taps, 1], -1)
        recent_BCSD = weight_BCSW @ self._windows(context_BTD, num_steps)
        recent_BTD = recent_BCSD.flatten(1, 2)[:, :num_steps]
        return recent_BTD + older_weight_BCS1.flatten(1, 2)[:, :num_steps] * older_BTD

    def begin(self, context_TD: Tensor, average_TD: Tensor) -> Taps:
        """Return the cache after the rows of a context, `average_TD` their moving averages."""
        missing = max(0, self.taps - len(context_TD))
        vector_KD, average_KD = (
            pad(rows_TD[-self.taps :].flip(0), (0, 0, 0, missing))
            for rows_TD in (context_TD, average_TD)
        )
        prior = self._step_prior(len(context_TD)).to(vector_KD)
        return Taps(vector_KD, self.key(vector_KD), average_KD, prior, len(context_TD))

    def step(self, vector_D: Tensor, average_D: Tensor, query_E: Tensor, cache: Taps) -> Tensor:
        """Return the adapted average (D,) at one more row."""
        older_D = cache.average_KD[-1]
        key_2A = self.key(torch.stack([vector_D, older_D]))
        cache.vector_KD = _push(vector_D, cache.vector_KD)
        cache.average_KD = _push(average_D, cache.average_KD)
        cache.key_KA = _push(key_2A[0], cache.key_KA)
        query_A = self.query(query_E) / math.sqrt(self.key.out_features)
        score = torch.cat([cache.key_KA, key_2A[1:]]) @ query_A
        # In logs: before `taps` rows the power of a tiny decay overflows.
        if (cache.num_rows - self.taps) * math.log(self.decay) > math.log(VANISHED):
            cache.prior = self._step_prior(cache.num_rows).to(score)
        weight = (score + cache.prior).softmax(dim=-1)
        cache.num_rows += 1
        return weight[:-1] @ cache.vector_KD + weight[-1] * older_D

    def _step_prior(self, step: int) -> Tensor:
        """Return the log weights of the moving average at one step: each tap, then all before."""
        recent = [k * math.log(self.decay) if k <= step else -math.inf for k in range(self.taps)]
        rest = (self.decay**self.taps - self.decay ** (step + 1)) / (1 - self.decay)
        return torch.tensor([*recent, math.log(rest) if rest > 0 else -math.inf])

    def log_prior(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return the log weights of the moving average: (C, S, W) of recent rows, (C, S, 1) before.

        -inf where a row is later than the step, before the context or older than the taps.
        """
        num_blocks = -(-num_steps // BLOCK)
        step_CS = torch.arange(num_blocks * BLOCK, dtype=torch.float64).view(-1, BLOCK)
        row_CW = step_CS[:, :1] - self.taps + torch.arange(BLOCK + self.taps, dtype=torch.float64)
        lag_CSW = step_CS[:, :, None] - row_CW[:, None]
        seen_CSW = (lag_CSW >= 0) & (lag_CSW < self.taps) & (row_CW >= 0)[:, None]
        recent_CSW = (lag_CSW * math.log(self.decay)).masked_fill(~seen_CSW, -torch.inf)
        rest_CS = (self.decay**self.taps - self.decay ** (step_CS + 1)) / (1 - self.decay)
        return recent_CSW, rest_CS.clamp(min=0).log()[:, :, None]

    def _windows(self, vector_BTD: Tensor, num_steps: int) -> Tensor:
        """Return the rows that each block looks at, (B, C, W, D)."""
        padded = pad(vector_BTD, (0, 0, self.taps, -num_steps % BLOCK))
        return padded.unfold(1, BLOCK + self.taps, BLOCK).transpose(-1, -2)


def _blocks(vector_BTD: Tensor, num_steps: int) -> Tensor:
    return pad(vector_BTD, (0, 0, 0, -num_steps % BLOCK)).unflatten(1, (-1, BLOCK))


def _push(newest_D: Tensor, rows_KD: Tensor) -> Tensor:
    """Return the rows with a newest one in front, without the oldest."""
    return torch.cat([newest_D[None], rows_KD[:-1]])
