"""Causal transformer with block-local attention: the rival at equal parameters.

Shapes: B batch, T time, D vector dim, H hidden, A heads, C blocks, S steps of a block, R = H / A.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from lvm.models.layers import Dropout, RMSNorm
from lvm.models.skip import Residual

HEAD_DIM = 64
ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of a `Transformer`; a step sees its own block of `chunk` steps and the one before."""

    dim: int
    hidden: int = 512
    layers: int = 4
    chunk: int = 200
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if self.hidden % 2:
            raise ValueError(f"hidden: {self.hidden} is odd; rotary embeddings turn pairs")


@dataclass
class TransformerCache:
    """State of a stream: for each layer, keys and values side by side (W, 2 H).

    The rows are those of the previous block, then the first `num_filled` rows of the current one.
    """

    key_value: list[Tensor]
    num_filled: int


class Transformer(Residual):
    """Residual predictor whose layers attend to at most 2 `chunk` - 1 steps back.

    Pre-norm attention with rotary positions (Su et al., arXiv 2104.09864) and SwiGLU blocks.
    """

    def __init__(self, **config: object) -> None:
        sizes = TransformerConfig(**config)  # type: ignore[arg-type]
        super().__init__(sizes.dim, sizes.hidden, sizes.decay, sizes.dropout)
        self.config = {"model": "transformer", **asdict(sizes)}
        self.chunk = sizes.chunk
        self.project_in = nn.Linear(2 * sizes.dim, sizes.hidden)
        layers = (TransformerLayer(sizes.hidden, sizes.dropout) for _ in range(sizes.layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(sizes.hidden)

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        num_steps = recent_BTE.shape[1]
        chunk = min(self.chunk, num_steps)
        state_BTH = pad(self.project_in(recent_BTE), (0, 0, 0, -num_steps % chunk))
        for layer in self.layers:
            state_BTH = layer(state_BTH, chunk)
        return self.norm(state_BTH)[:, :num_steps]

    def begin_encoder(
        self, context_TD: Tensor, recent_TE: Tensor
    ) -> tuple[Tensor, TransformerCache]:
        """Return the last hidden state (H,) and the keys and values that later steps attend to."""
        num_steps = len(recent_TE)
        chunk = min(self.chunk, num_steps)
        num_filled = num_steps - chunk * (-(-num_steps // chunk) - 1)
        kept = slice(max(0, num_steps - num_filled - self.chunk), num_steps)
        state_BTH = pad(self.project_in(recent_TE), (0, 0, 0, -num_steps % chunk))[None]
        key_value = []
        for layer in self.layers:
            key_value.append(layer.project(state_BTH[0, kept])[:, state_BTH.shape[2] :])  # type: ignore[operator]
            state_BTH = layer(state_BTH, chunk)
        return self.norm(state_BTH[0, num_steps - 1]), TransformerCache(key_value, num_filled)

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: TransformerCache) -> Tensor:
        if cache.num_filled == self.chunk:
            cache.key_value = [rows[-self.chunk :] for rows in cache.key_value]
            cache.num_filled = 0
        state_H = self.project_in(recent_E)
        for place, layer in enumerate(self.layers):
            state_H, cache.key_value[place] = layer.step(state_H, cache.key_value[place])  # type: ignore[operator]
        cache.num_filled += 1
        return self.norm(state_H)


class TransformerLayer(nn.Module):
    """Residual block-local attention, then a residual SwiGLU block; as large as a GRU layer."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = hidden // HEAD_DIM if hidden % HEAD_DIM == 0 else 1
        self.mix_norm = RMSNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.feed_norm = RMSNorm(hidden)
        self.widen = nn.Linear(hidden, 2 * hidden)
        self.narrow = nn.Linear(hidden, hidden)
        self.dropout = Dropout(dropout)

    def forward(self, state_BTH: Tensor, chunk: int) -> Tensor:
        return self._feed(state_BTH, self.attend(state_BTH, chunk))

    def step(self, state_H: Tensor, key_value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state (H,) of one more step, and the keys and values extended by it."""
        query_H, own = self.project(state_H).split([len(state_H), 2 * len(state_H)])
        key_value = torch.cat([key_value, own[None]])
        position_W = torch.arange(len(key_value), device=state_H.device)
        key_AWR, value_AWR = (
            part_WH.unflatten(-1, (self.heads, -1)).transpose(0, 1)
            for part_WH in key_value.chunk(2, dim=-1)
        )
        query_A1R = _rotated(query_H.view(self.heads, 1, -1), position_W[-1:])
        key_AWR = _rotated(key_AWR, position_W)
        read_A1R = scaled_dot_product_attention(query_A1R, key_AWR, value_AWR)
        return self._feed(state_H, read_A1R.flatten()), key_value

    def project(self, state_BTH: Tensor) -> Tensor:
        """Return query, key and value side by side, (B, T, 3 H)."""
        return self.query_key_value(self.mix_norm(state_BTH))

    def _feed(self, state_BTH: Tensor, read_BTH: Tensor) -> Tensor:
        mixed_BTH = state_BTH + self.dropout(self.mix(read_BTH))
        gate_BTH, value_BTH = self.widen(self.feed_norm(mixed_BTH)).chunk(2, dim=-1)
        return mixed_BTH + self.dropout(self.narrow(silu(gate_BTH) * value_BTH))

    def attend(self, state_BTH: Tensor, chunk: int) -> Tensor:
        """Return each step's attention over its own block up to itself and the block before."""
        shared_BTH3 = self.project(state_BTH).chunk(3, dim=-1)
        query, key, value = (self._blocks(part_BTH, chunk) for part_BTH in shared_BTH3)
        position_W = torch.arange(2 * chunk, device=state_BTH.device)
        query = _rotated(query, position_W[chunk:])
        key, value = (_with_block_before(part) for part in (key, value))
        key = _rotated(key, position_W)
        mask_CSW = _mask(key.shape[1], chunk, state_BTH.device)
        read_BCASR = scaled_dot_product_attention(query, key, value, attn_mask=mask_CSW)
        return read_BCASR.transpose(2, 3).flatten(3).flatten(1, 2)

    def _blocks(self, part_BTH: Tensor, chunk: int) -> Tensor:
        """Cut (B, T, H) into blocks and heads, (B, C, A, S, R)."""
        return part_BTH.unflatten(1, (-1, chunk)).unflatten(-1, (self.heads, -1)).transpose(2, 3)


def _with_block_before(part_BCASR: Tensor) -> Tensor:
    before = pad(part_BCASR, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    return torch.cat([before, part_BCASR], dim=3)


def _mask(num_blocks: int, chunk: int, device: torch.device) -> Tensor:
    """Return which keys of the two blocks each step may attend to, (C, 1, S, W) for all heads."""
    step_S1 = torch.arange(chunk, 2 * chunk, device=device)[:, None]
    key_W = torch.arange(2 * chunk, device=device)
    causal_SW = key_W <= step_S1
    exists_CW = (torch.arange(num_blocks, device=device)[:, None] > 0) | (key_W >= chunk)
    return (causal_SW & exists_CW[:, None])[:, None]


def _rotated(part_BCASR: Tensor, position_S: Tensor) -> Tensor:
    """Rotate pairs of features by an angle that grows with the position."""
    half = part_BCASR.shape[-1] // 2
    order = torch.arange(half, device=part_BCASR.device, dtype=torch.float32)
    angle_SR = position_S[:, None] * ROTARY_BASE ** (-order / half)
    cosine, sine = angle_SR.cos().to(part_BCASR), angle_SR.sin().to(part_BCASR)
    first, second = part_BCASR.split(half, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
