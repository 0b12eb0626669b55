"""Short-range predictors: an average of the last rows weighted by content, alone or with an MLP.

`Skip` is the average with a linear map; `Residual` is the base of predictors that add an encoder to
it; `ResMLP` adds an MLP of the last few vectors, and is the rival without a long context.

Shapes: B batch, T time, D vector dim, E = 2 D recent features, H hidden, A address features, K
taps, C blocks, S steps of a block, W rows in the window of a block, L last vectors.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from lvm.models.layers import Dropout, RMSNorm, RunningAverage, moving_average, unit

BLOCK = 32
VANISHED = 2**-60  # a weight too small to change 1 in float64


@dataclass
class Taps:
    """State of `AdaptiveAverage` in a stream: its newest rows first, padded with zeros.

    The rows (K, D), their keys (K, A), the moving average at each of them (K, D), and the log
    weights (K + 1,) of the rows and of all older rows together.
    """

    vector_KD: Tensor
    key_KA: Tensor
    average_KD: Tensor
    prior: Tensor
    num_rows: int


class AdaptiveAverage(nn.Module):
    """Weighs the last `taps` vectors, and the average of all before them, by content.

    weight_k is softmax_k(log prior_k + q(x_t, ema_t) . k(x_{t-k}) / sqrt(A)), where prior_k =
    decay^k are the weights of the moving average; the last tap stands for all older rows and has
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
        """Return the adapted average (B, T, D); `average_BTD` is the moving average.

        `query_BTE` is [x_t, ema_t], with dropout in training. Steps run in blocks: one matrix
        product of a block with its own rows and the `taps` rows before it is faster than a product
        per tap. Rows must be finite, which is checked when banks are opened and contexts are read;
        a non-finite row would spread to earlier steps of its block, although its weight there is
        zero.
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
        """Return the cache after a context; `average_TD` are the moving averages of its rows."""
        missing = max(0, self.taps - len(context_TD))
        vector_KD, average_KD = (
            pad(rows_TD[-self.taps :].flip(0), (0, 0, 0, missing))
            for rows_TD in (context_TD, average_TD)
        )
        prior = self._step_prior(len(context_TD)).to(vector_KD)
        return Taps(vector_KD, self.key(vector_KD), average_KD, prior, len(context_TD))

    def step(self, vector_D: Tensor, average_D: Tensor, query_E: Tensor, cache: Taps) -> Tensor:
        """Return the adapted average (D,) after one more row."""
        older_D = cache.average_KD[-1]
        key_2A = self.key(torch.stack([vector_D, older_D]))
        cache.vector_KD = _push(vector_D, cache.vector_KD)
        cache.average_KD = _push(average_D, cache.average_KD)
        cache.key_KA = _push(key_2A[0], cache.key_KA)
        query_A = self.query(query_E) / math.sqrt(self.key.out_features)
        score = torch.cat([cache.key_KA, key_2A[1:]]) @ query_A
        # In logs, because the power of a tiny decay overflows before `taps` rows.
        if (cache.num_rows - self.taps) * math.log(self.decay) > math.log(VANISHED):
            cache.prior = self._step_prior(cache.num_rows).to(score)
        weight = (score + cache.prior).softmax(dim=-1)
        cache.num_rows += 1
        return weight[:-1] @ cache.vector_KD + weight[-1] * older_D

    def _step_prior(self, step: int) -> Tensor:
        """Return the log weights of the moving average at one step: taps, then all older rows."""
        recent = [k * math.log(self.decay) if k <= step else -math.inf for k in range(self.taps)]
        rest = (self.decay**self.taps - self.decay ** (step + 1)) / (1 - self.decay)
        return torch.tensor([*recent, math.log(rest) if rest > 0 else -math.inf])

    def log_prior(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """Return the log weights of the average: recent rows (C, S, W), older ones (C, S, 1).

        -inf for rows that are later than the step, before the context, or older than the taps.
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
        """Return the window of rows of each block, (B, C, W, D)."""
        padded = pad(vector_BTD, (0, 0, self.taps, -num_steps % BLOCK))
        return padded.unfold(1, BLOCK + self.taps, BLOCK).transpose(-1, -2)


@dataclass(frozen=True, kw_only=True)
class SkipConfig:
    """Sizes of a `Skip`; `decay` belongs to its moving average, between 0 and 1."""

    dim: int
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim: {self.dim} is less than 1")
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay: {self.decay} is not between 0 and 1 (both excluded)")


@dataclass
class SkipCache:
    """State of a stream; `encoder` belongs to the subclass."""

    average: RunningAverage
    taps: Taps
    encoder: Any


class Skip(nn.Module):
    """Predicts unit(unit(avg_t) + W_skip [x_t; unit(ema_t)]) from the last rows alone.

    avg_t is an average of the recent vectors whose weights adapt to their content. It starts as the
    moving average of `decay` and W_skip starts as zero: step 0 is that baseline. `ablations` names
    the parts that `without` can omit.
    """

    ablations: tuple[str, ...] = ("linear",)

    def __init__(self, **config: object) -> None:
        super().__init__()
        sizes = SkipConfig(**config)  # type: ignore[arg-type]
        self.config = {"model": "skip", **asdict(sizes)}
        self._make_skip(sizes.dim, sizes.decay, sizes.dropout)

    def _make_skip(self, dim: int, decay: float, dropout: float) -> None:
        SkipConfig(dim=dim, decay=decay, dropout=dropout)
        self.omitted: str | None = None
        self.decay = decay
        self.input_dropout = Dropout(dropout)
        self.average = AdaptiveAverage(dim, decay)
        self.skip_change = nn.Linear(2 * dim, dim, bias=False)
        nn.init.zeros_(self.skip_change.weight)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of each part by its name."""
        return {
            "average": list(self.average.parameters()),
            "linear": list(self.skip_change.parameters()),
        }

    def forward(self, context_BTD: Tensor) -> Tensor:
        """Return unit predictions (B, T, D) for unit contexts (B, T, D); t predicts row t + 1.

        Contexts must be finite: a later NaN row of weight zero would still give NaN.
        """
        return self._predict(*self._read(context_BTD))

    def begin(self, context_TD: Tensor) -> tuple[Tensor, SkipCache]:
        """Return the prediction (D,) after a context and the cache of a stream, in one pass."""
        average_TD = moving_average(context_TD[None], self.decay)[0]
        recent_TE = _recent(context_TD, average_TD)
        adapted_TD = self.average(context_TD[None], average_TD[None], recent_TE[None])[0]
        state_H, encoder = self.begin_encoder(context_TD, recent_TE)
        average = RunningAverage(context_TD, self.decay)
        cache = SkipCache(average, self.average.begin(context_TD, average_TD), encoder)
        return self._predict(adapted_TD[-1], recent_TE[-1], state_H), cache

    def step(self, vector_D: Tensor, cache: SkipCache) -> Tensor:
        """Return the prediction (D,) after one more row."""
        average_D = cache.average.append(vector_D)
        recent_E = _recent(vector_D, average_D)
        adapted_D = self.average.step(vector_D, average_D, recent_E, cache.taps)
        state_H = self.step_encoder(vector_D, recent_E, cache.encoder)
        return self._predict(adapted_D, recent_E, state_H)

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        """Return the encoder's state at every position, (B, T, H); H = 0 here."""
        return recent_BTE[..., :0]

    def begin_encoder(self, context_TD: Tensor, recent_TE: Tensor) -> tuple[Tensor, Any]:
        """Return the encoder's state (H,) at the last position and its cache."""
        return recent_TE[-1, :0], None

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: Any) -> Tensor:
        """Return the encoder's state (H,) at one more position; `cache` is updated in place."""
        return recent_E[:0]

    def _read(self, context_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of a prediction: avg_t, [x_t; ema_t], h_t, each (B, T, ...)."""
        fixed_BTD = moving_average(context_BTD, self.decay)
        # Cast once here; autocast would cast again for each map.
        context_BTD, fixed_BTD, recent_BTE = (
            rows.to(_dtype(context_BTD))
            for rows in (context_BTD, fixed_BTD, _recent(context_BTD, fixed_BTD))
        )
        noisy_BTE = self.input_dropout(recent_BTE)
        adapted_BTD = self.average(context_BTD, fixed_BTD, noisy_BTE)
        return adapted_BTD, noisy_BTE, self.encode(context_BTD, noisy_BTE)

    def _predict(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        return unit(self._sum(adapted_BTD, recent_BTE, state_BTH).float())

    def _sum(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        """Return the prediction before it is scaled to unit length."""
        sum_BTD = unit(adapted_BTD)
        if self.omitted != "linear":
            sum_BTD = sum_BTD + self.skip_change(recent_BTE)
        return sum_BTD


class Residual(Skip):
    """Predicts unit(unit(avg_t) + W_skip [x_t; unit(ema_t)] + W_out unit(h_t)).

    A subclass defines h_t by `encode`, and for streams by `begin_encoder` and `step_encoder`. W_out
    starts as zero.
    """

    ablations: tuple[str, ...] = ("linear", "encoder")

    def __init__(self, dim: int, hidden: int, decay: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self._make_skip(dim, decay, dropout)
        self.dropout = Dropout(dropout)
        self.project_out = nn.Linear(hidden, dim, bias=False)
        nn.init.zeros_(self.project_out.weight)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        parts = super().parts()
        memory = [p for module in self.memory_modules() for p in module.parameters()]
        known = {id(p) for part in (*parts.values(), memory) for p in part}
        parts["encoder"] = [p for p in self.parameters() if id(p) not in known]
        return parts | {"memory": memory} if memory else parts

    def memory_modules(self) -> list[nn.Module]:
        """Return the modules that write and read the memory; empty without a memory."""
        return []

    def _sum(self, adapted_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor) -> Tensor:
        sum_BTD = super()._sum(adapted_BTD, recent_BTE, state_BTH)
        return sum_BTD if self.omitted == "encoder" else sum_BTD + self._increment(state_BTH)

    def _increment(self, state_BTH: Tensor) -> Tensor:
        # Unit length like the inputs, so that one learning rate suits both maps.
        increment_BTD: Tensor = self.project_out(self.dropout(unit(state_BTH)))
        return increment_BTD


@dataclass(frozen=True, kw_only=True)
class ResMLPConfig:
    """Sizes of a `ResMLP`; `last` is the number of vectors that it uses."""

    dim: int
    hidden: int = 512
    layers: int = 4
    last: int = 8
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers", "last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")


class ResMLP(Residual):
    """Residual predictor whose state is an MLP of the last `last` vectors (default 8).

    After Ippolito et al., ACL 2020 (arXiv 2005.05255), section 3: residual feed-forward blocks.
    """

    def __init__(self, **config: object) -> None:
        sizes = ResMLPConfig(**config)  # type: ignore[arg-type]
        super().__init__(sizes.dim, sizes.hidden, sizes.decay, sizes.dropout)
        self.config = {"model": "res_mlp", **asdict(sizes)}
        self.dim, self.last = sizes.dim, sizes.last
        self.project_in = nn.Linear(sizes.last * sizes.dim, sizes.hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                RMSNorm(sizes.hidden),
                nn.Linear(sizes.hidden, 2 * sizes.hidden),
                nn.GELU(),
                nn.Linear(2 * sizes.hidden, sizes.hidden),
                Dropout(sizes.dropout),
            )
            for _ in range(sizes.layers)
        )

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        vector_BTD = recent_BTE[..., : self.dim]
        padded_BTD = pad(vector_BTD, (0, 0, self.last - 1, 0))
        num_steps = vector_BTD.shape[1]
        last_BTX = torch.cat([padded_BTD[:, k : k + num_steps] for k in range(self.last)], dim=-1)
        return self._state(last_BTX)

    def begin_encoder(self, context_TD: Tensor, recent_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden state (H,) and the last vectors (L, D), padded with zeros."""
        vector_LD = recent_TE[-self.last :, : self.dim]
        last_LD = pad(vector_LD, (0, 0, self.last - len(vector_LD), 0))
        return self._state(last_LD.flatten()), last_LD

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: Tensor) -> Tensor:
        cache.copy_(torch.cat([cache[1:], recent_E[None, : self.dim]]))
        return self._state(cache.flatten())

    def _state(self, last_BTX: Tensor) -> Tensor:
        state_BTH = gelu(self.project_in(last_BTX))
        for block in self.blocks:
            state_BTH = state_BTH + block(state_BTH)
        return state_BTH


Predictor = TypeVar("Predictor", bound=Skip)


def without(model: Predictor, part: str) -> Predictor:
    """Return the predictor without `part`, one of its `ablations`; the weights are shared."""
    if part not in model.ablations:
        raise ValueError(f"part: {part!r} is not among {', '.join(model.ablations)}")
    ablated = copy.copy(model)
    ablated.omitted = part
    return ablated


def _recent(context_BTD: Tensor, average_BTD: Tensor) -> Tensor:
    """Return [x_t; ema_t], the input of every map, (B, T, 2 D)."""
    return torch.cat([context_BTD, unit(average_BTD)], dim=-1)


def _dtype(vector_BTD: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with such vectors, which autocast may change."""
    device = vector_BTD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return vector_BTD.dtype


def _blocks(vector_BTD: Tensor, num_steps: int) -> Tensor:
    return pad(vector_BTD, (0, 0, 0, -num_steps % BLOCK)).unflatten(1, (-1, BLOCK))


def _push(newest_D: Tensor, rows_KD: Tensor) -> Tensor:
    """Return the rows with a new first row, without the last."""
    return torch.cat([newest_D[None], rows_KD[:-1]])
