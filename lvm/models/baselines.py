"""Free predictors: parameter-free or closed-form maps from a context to the next vector.

Shapes: B batch, T time, D vector dim. Every forward maps a context (B, T, D) of unit float32
vectors to predictions (B, T, D), unit float32; position t uses positions up to t only. A class that
uses only the last few rows has their number as `context_rows`. `lvm.models.predict` describes
`begin` and `step`.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from lvm.models.layers import RunningAverage, moving_average

RIDGE_DECAYS = (0.5, 0.9)
TWIN = 0.999  # rows with this cosine or more are duplicates, as in lvm.bank.bank
QUERY_BLOCK = 1024
RIDGE_BLOCK = 64
KEY_BLOCK = 1024  # a float32 block fits the CPU cache: for one query five times as fast as 4,096


class CopyLast(nn.Module):
    """Predicts that the last vector repeats."""

    context_rows = 1

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.config = {"model": "copy-last", "dim": dim}

    def forward(self, context_BTD: Tensor) -> Tensor:
        return context_BTD

    def begin(self, context_TD: Tensor) -> tuple[Tensor, None]:
        return context_TD[-1], None

    def step(self, vector_D: Tensor, cache: None) -> Tensor:
        return vector_D


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

    def begin(self, context_TD: Tensor) -> tuple[Tensor, RunningAverage]:
        average = RunningAverage(context_TD, self.decay)
        return normalize(average.value_D, dim=-1), average

    def step(self, vector_D: Tensor, cache: RunningAverage) -> Tensor:
        return normalize(cache.append(vector_D), dim=-1)


class ContextMean(nn.Module):
    """Predicts the mean of all vectors of the context."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.config = {"model": "context-mean", "dim": dim}

    def forward(self, context_BTD: Tensor) -> Tensor:
        return normalize(context_BTD.cumsum(dim=1), dim=-1)

    def begin(self, context_TD: Tensor) -> tuple[Tensor, Tensor]:
        sum_D = context_TD.sum(dim=0)
        return normalize(sum_D, dim=-1), sum_D

    def step(self, vector_D: Tensor, cache: Tensor) -> Tensor:
        return normalize(cache.add_(vector_D), dim=-1)


class Ridge(nn.Module):
    """Predicts by a linear map of `ridge_features`, fitted in closed form.

    Buffers: weight (D, 4 D) and bias (D), stored as in scikit-learn's Ridge.
    """

    def __init__(self, dim: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.config = {"model": "ridge", "dim": dim, "alpha": alpha}
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", torch.zeros(dim, 4 * dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, context_BTD: Tensor) -> Tensor:
        return self._predict(ridge_features(context_BTD))

    def begin(self, context_TD: Tensor) -> tuple[Tensor, "RidgeCache"]:
        averages = [RunningAverage(context_TD, decay) for decay in RIDGE_DECAYS]
        last_D = ridge_features(context_TD[None])[0, -1]
        return self._predict(last_D), RidgeCache(context_TD[-1].clone(), averages)

    def step(self, vector_D: Tensor, cache: "RidgeCache") -> Tensor:
        averages = [average.append(vector_D) for average in cache.averages]
        prediction_D = self._predict(torch.cat([vector_D, cache.previous_D, *averages]))
        cache.previous_D = vector_D
        return prediction_D

    def _predict(self, features: Tensor) -> Tensor:
        return normalize(torch.nn.functional.linear(features, self.weight, self.bias), dim=-1)


@dataclass
class RidgeCache:
    """State of a `Ridge` stream."""

    previous_D: Tensor
    averages: list[RunningAverage]


class ContextRidge(nn.Module):
    """Predicts unit(unit(ema_t) + weight * M_t k_t), M_t a ridge regression of this context alone.

    M_t minimises sum_i |M k_i - x_{i+1}|^2 + penalty |M|^2 over the pairs i + 1 <= t, with keys k_i
    = unit average of decay `key_decay` (0: x_i itself). A stream updates it pair by pair (recursive
    least squares, the matrix inversion lemma) at O(D^2) a row; a pass solves blocks of
    `RIDGE_BLOCK` rows by one Cholesky factor each. It uses no train rows.
    """

    def __init__(
        self,
        dim: int,
        decay: float = 0.5,
        key_decay: float = 0.0,
        penalty: float = 10.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.average = MovingAverage(dim, decay)
        self.keys = MovingAverage(dim, key_decay) if key_decay else CopyLast(dim)
        self.penalty, self.weight = penalty, weight
        sizes = {"decay": decay, "key_decay": key_decay, "penalty": penalty, "weight": weight}
        self.config = {"model": "context-ridge", "dim": dim, **sizes}

    def forward(self, context_BTD: Tensor) -> Tensor:
        sum_BTD = self.average(context_BTD) + self.weight * self.read(context_BTD)
        return normalize(sum_BTD, dim=-1)

    def read(self, context_BTD: Tensor) -> Tensor:
        """Return M_t k_t at every position, (B, T, D)."""
        return self._regress(self.keys(context_BTD), context_BTD)[0]

    def begin(self, context_TD: Tensor) -> tuple[Tensor, "ContextRidgeCache"]:
        average_D, average = self.average.begin(context_TD)
        _, keys = self.keys.begin(context_TD)
        key_TD = self.keys(context_TD[None])[0]
        read_1TD, (inverse_1DD, map_1DD) = self._regress(key_TD[None], context_TD[None])
        cache = ContextRidgeCache(average, keys, key_TD[-1].clone(), inverse_1DD[0], map_1DD[0])
        return normalize(average_D + self.weight * read_1TD[0, -1], dim=-1), cache

    def step(self, vector_D: Tensor, cache: "ContextRidgeCache") -> Tensor:
        average_D = self.average.step(vector_D, cache.average)
        gain_D = cache.inverse_DD @ cache.key_D
        spread = (1 + cache.key_D @ gain_D).sqrt()
        gain_D, missed_D = gain_D / spread, (vector_D - cache.key_D @ cache.map_DD) / spread
        cache.map_DD = torch.addr(cache.map_DD, gain_D, missed_D)
        cache.inverse_DD = torch.addr(cache.inverse_DD, gain_D, gain_D, alpha=-1)
        cache.key_D = self.keys.step(vector_D, cache.keys)  # type: ignore[arg-type]
        return normalize(average_D + self.weight * (cache.key_D @ cache.map_DD), dim=-1)

    def _regress(
        self, key_BTD: Tensor, context_BTD: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return M_t k_t of each step, and (K^T K + penalty)^-1 and M^T after the last step."""
        batch, _, dim = key_BTD.shape
        before_BTD = pad(key_BTD, (0, 0, 1, 0))[
            :, :-1
        ]  # a zero key leaves the regression unchanged
        inverse_BDD = torch.eye(dim).to(key_BTD).expand(batch, dim, dim) / self.penalty
        map_BDD = torch.zeros_like(inverse_BDD)
        reads = []
        for query, key, value in zip(
            *(rows.split(RIDGE_BLOCK, dim=1) for rows in (key_BTD, before_BTD, context_BTD)),
            strict=True,
        ):
            spread_BSD = key @ inverse_BDD
            gram_BSS = spread_BSD @ key.mT + torch.eye(key.shape[1]).to(key)
            factor_BSS = torch.linalg.cholesky(gram_BSS)
            both = torch.cat([value - key @ map_BDD, spread_BSD], dim=-1)
            solved = torch.linalg.solve_triangular(factor_BSS, both, upper=False)
            missed_BSD, gain_BSD = solved.split(dim, dim=-1)
            # Row j of the factor uses the pairs up to j, so a step uses the rows up to itself.
            reads.append(query @ map_BDD + (query @ gain_BSD.mT).tril() @ missed_BSD)
            map_BDD = map_BDD + gain_BSD.mT @ missed_BSD
            inverse_BDD = inverse_BDD - gain_BSD.mT @ gain_BSD
        return torch.cat(reads, dim=1), (inverse_BDD, map_BDD)


@dataclass
class ContextRidgeCache:
    """State of a `ContextRidge` stream: averages, the last key, (K^T K + penalty)^-1, M^T."""

    average: RunningAverage
    keys: RunningAverage | None
    key_D: Tensor
    inverse_DD: Tensor
    map_DD: Tensor


class NearestSuccessor(nn.Module):
    """Predicts the row that follows the stored row nearest to the last vector by cosine.

    Buffers: row_MD (M, D) float16, train rows in reading order; is_end_M (M) bool, true if the next
    stored row is not the successor. Ties go to the earlier row. Its predictions are train rows,
    which are never the target of a frozen query. In raw ranks one of these train rows ranks first,
    so raw Hit@1 is 0. In filtered ranks a predicted row that lies in the query's context is
    removed, and the target can rank first. A good rank shows that the target is near the predicted
    row.

    On train rows a stored row finds itself, and the prediction is the target. Fits on train-time
    predictions must therefore use `on_train_rows()`, which skips stored rows with a cosine of TWIN
    or more: the row itself and its twins, since a twin may be followed by a twin of the target. No
    frozen query has a target among the twins of train rows, so these rows are used at query time: a
    sentence that occurred before is legitimate evidence.
    """

    context_rows = 1

    def __init__(self, dim: int, rows: int = 2) -> None:
        super().__init__()
        if rows < 2:
            raise ValueError(f"rows: {rows} stored rows; at least 2, a row with its successor")
        self.config = {"model": "nn-successor", "dim": dim, "rows": rows}
        self.skips_twins = False
        self.row_MD: Tensor
        self.is_end_M: Tensor
        self.register_buffer("row_MD", torch.zeros(rows, dim, dtype=torch.float16))
        self.register_buffer("is_end_M", torch.zeros(rows, dtype=torch.bool))
        self.is_end_M[-1] = True

    def on_train_rows(self) -> "NearestSuccessor":
        """Return this predictor with shared buffers, skipping stored twins of the rows it reads."""
        blind = copy.copy(self)
        blind.skips_twins = True
        return blind

    def forward(self, context_BTD: Tensor) -> Tensor:
        query_QD = context_BTD.flatten(0, 1)
        score_Q = query_QD.new_full((len(query_QD),), -torch.inf)
        place_Q = torch.zeros(len(query_QD), dtype=torch.int64, device=query_QD.device)
        for first in range(0, len(self.row_MD), KEY_BLOCK):
            keys = slice(first, first + KEY_BLOCK)
            key_KD = self.row_MD[keys].float()
            for begin in range(0, len(query_QD), QUERY_BLOCK):
                lines = slice(begin, begin + QUERY_BLOCK)
                score_QK = (query_QD[lines] @ key_KD.T).masked_fill_(
                    self.is_end_M[keys], -torch.inf
                )
                if self.skips_twins:
                    score_QK.masked_fill_(score_QK >= TWIN, -torch.inf)
                peak_Q, column_Q = score_QK.max(dim=1)
                is_nearer_Q = peak_Q > score_Q[lines]
                place_Q[lines] = torch.where(is_nearer_Q, first + column_Q, place_Q[lines])
                score_Q[lines] = torch.maximum(peak_Q, score_Q[lines])
        return normalize(self.row_MD[place_Q + 1].float(), dim=-1).view_as(context_BTD)

    def begin(self, context_TD: Tensor) -> tuple[Tensor, None]:
        return self.step(context_TD[-1], None), None

    def step(self, vector_D: Tensor, cache: None) -> Tensor:
        return self(vector_D[None, None])[0, 0]


def ridge_features(context_BTD: Tensor) -> Tensor:
    """Return [x_t, x_{t-1}, average of decay 0.5, average of decay 0.9], (B, T, 4 D)."""
    previous_BTD = torch.cat([context_BTD[:, :1], context_BTD[:, :-1]], dim=1)
    averages = [moving_average(context_BTD, decay) for decay in RIDGE_DECAYS]
    return torch.cat([context_BTD, previous_BTD, *averages], dim=-1)
