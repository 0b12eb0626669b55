"""Predictor with fast weights: it trains an associative memory on each sequence as it reads it.

Shapes: B batch, T time, D vector dim, E = 2 D recent features, H hidden, A heads, R key features
and V value features of a head, C blocks of S steps, Z = 2 S, K key features of the recall.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, silu

from lvm.models.layers import Dropout, RMSNorm, unit
from lvm.models.skip import Residual

MIN_BLOCK, MAX_BLOCK = 32, 64  # steps; more than key features cost more than they save
HEAD_DIM = 32
KEYS = 128  # key features of a head of the recall
RECALL_HEADS = 2
# A register that writes all rows alike holds mostly noise. Large random weights of its gate let it
# prefer some rows from the start: a key announced once is learned, with 1.0 only in part.
GATE_GAIN = 5.0
STRENGTHS = (
    -1.0,
    -4.0,
)  # logits: the fast head corrects a quarter of its error per write, the slow one 2 %


def delta_rule(
    query_BTAR: Tensor,
    key_BTAR: Tensor,
    value_BTAV: Tensor,
    strength_BTA: Tensor,
    log_keep_BTA: Tensor,
    state_BAVR: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the reads of each step (B, T, A, V) and the memory after the last one (B, A, V, R).

    M_t = a_t M_{t-1} + b_t (v_t - a_t M_{t-1} k_t) k_t^T, read_t = M_t q_t, with b `strength` in 0
    ... 1 and a = exp(`log_keep`) in 0 ... 1: one step of gradient descent on |M k_t - v_t|^2 / 2
    (Yang, Kautz, Hatamizadeh, arXiv 2412.06464, section 3). Keys must have length 1 or less. The
    memory starts as `state_BAVR`, by default as zero. Values (B, T, 1, V) are those of all heads.
    Blocks of up to 64 steps are solved in parallel, each as one triangular system (Yang et al.,
    arXiv 2406.06484, section 3.2). The memory is float32 even under autocast, which applies to the
    products only.
    """
    num_steps, features = query_BTAR.shape[1], query_BTAR.shape[-1]
    size = min(num_steps, MAX_BLOCK, max(MIN_BLOCK, features))
    query, key, value, strength, log_keep = (
        _blocks(part, size)
        for part in (query_BTAR, key_BTAR, value_BTAV, strength_BTA, log_keep_BTA)
    )
    log_decay_BACS = log_keep.cumsum(dim=-1)
    decay_BACSS = (log_decay_BACS[..., :, None] - log_decay_BACS[..., None, :]).tril().exp()
    grown_BACS1 = log_decay_BACS.exp()[..., None]
    # Of `overlap` only what is below the diagonal is read.
    overlap_BACSS = (key @ key.mT) * (decay_BACSS * strength[..., None])
    inverse_BACSS = torch.linalg.solve_triangular(
        overlap_BACSS, torch.diag_embed(strength), upper=False, unitriangular=True
    )
    score_BACSS = ((query @ key.mT) * decay_BACSS).tril()
    # The rows of keys and of queries share each product.
    asked_BACZR = torch.cat([key * grown_BACS1, query * grown_BACS1], dim=-2)
    answer_BACZS = torch.cat([inverse_BACSS, score_BACSS @ inverse_BACSS], dim=-2)
    left_BACSR = key * (log_decay_BACS[..., -1:] - log_decay_BACS).exp()[..., None]
    if state_BAVR is None:
        batch, heads = query.shape[:2]
        state_BAVR = query.new_zeros(batch, heads, value.shape[-1], query.shape[-1])
    reads = []
    # Unbind once: the gradient of each slice would fill a tensor as large as all blocks.
    parts = (value, asked_BACZR, answer_BACZS, left_BACSR, grown_BACS1[..., -1:, :])
    for value_, asked, answer, left, kept in zip(*(p.unbind(2) for p in parts), strict=True):
        held_BASV, read_BASV = (asked @ state_BAVR.mT).chunk(2, dim=-2)
        change_BASV, new_BASV = (answer @ (value_ - held_BASV)).chunk(2, dim=-2)
        reads.append(read_BASV + new_BASV)
        state_BAVR = kept * state_BAVR + change_BASV.mT @ left
    read_BACSV = torch.stack(reads, dim=2)
    return read_BACSV.flatten(2, 3).transpose(1, 2)[:, :num_steps], state_BAVR


def delta_step(
    query_AR: Tensor,
    key_AR: Tensor,
    value_AV: Tensor,
    strength_A: Tensor,
    log_keep_A: Tensor,
    state_AVR: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the read (A, V) of one more step and the memory after it."""
    kept_AVR = state_AVR * log_keep_A.exp()[:, None, None]
    missed_AV = value_AV - (kept_AVR @ key_AR[:, :, None])[..., 0]
    state_AVR = torch.baddbmm(
        kept_AVR, (strength_A[:, None] * missed_AV)[:, :, None], key_AR[:, None]
    )
    return (state_AVR @ query_AR[:, :, None])[..., 0], state_AVR


def _blocks(part_BTAX: Tensor, size: int) -> Tensor:
    """Cut (B, T, A, ...) into float32 blocks (B, A, C, S, ...); padding steps have no effect."""
    part_BATX = part_BTAX.float().transpose(1, 2)
    added = [0, 0] * (part_BATX.ndim - 3) + [0, -part_BATX.shape[2] % size]
    return pad(part_BATX, added).unflatten(2, (-1, size))


@dataclass(frozen=True, kw_only=True)
class DeltaMemoryConfig:
    """Sizes of a `DeltaMemory`."""

    dim: int
    hidden: int = 128
    layers: int = 2
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if self.hidden > HEAD_DIM and self.hidden % HEAD_DIM:
            raise ValueError(f"hidden: {self.hidden} is not a multiple of {HEAD_DIM}")


@dataclass
class FastWeights:
    """State of one associative memory in a stream: its matrix, the inputs of the next write."""

    matrix_AVR: Tensor
    before: tuple[Tensor, ...]


class DeltaMemory(Residual):
    """Predicts unit(unit(avg_t) + W_skip [x_t; unit(ema_t)] + W_out unit(h_t) + g_t recall_t).

    h_t comes from layers with a memory that the gated delta rule writes. recall_t is a vector: the
    memory's estimate of which row follows rows like the recent ones, learnt in this context. Both
    memories have a fixed size, however long the context.
    """

    ablations: tuple[str, ...] = ("linear", "encoder", "memory", "recall")

    def __init__(self, **config: object) -> None:
        sizes = DeltaMemoryConfig(**config)  # type: ignore[arg-type]
        super().__init__(sizes.dim, sizes.hidden, sizes.decay, sizes.dropout)
        self.hidden = sizes.hidden
        self.config = {"model": "delta_memory", **asdict(sizes)}
        self.project_in = nn.Linear(2 * sizes.dim, sizes.hidden)
        self.layers = nn.ModuleList(
            DeltaLayer(sizes.hidden, sizes.dropout) for _ in range(sizes.layers)
        )
        self.norm = RMSNorm(sizes.hidden)
        self.recall = Recall(sizes.dim, sizes.hidden)

    def memory_modules(self) -> list[nn.Module]:
        maps = [(layer.query, layer.key, layer.value, layer.rates) for layer in self.layers]
        return [self.recall, *(module for parts in maps for module in parts)]  # type: ignore[list-item]

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        """Return [h_t; g_t recall_t] at every position, (B, T, H + D)."""
        return self._encode(context_BTD, recent_BTE)[0]

    def begin_encoder(
        self, context_TD: Tensor, recent_TE: Tensor
    ) -> tuple[Tensor, list[FastWeights]]:
        state_BTX, cache = self._encode(context_TD[None], recent_TE[None])
        return state_BTX[0, -1], cache

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: list[FastWeights]) -> Tensor:
        state_H = self.project_in(recent_E)
        for layer, weights in zip(self.layers, cache, strict=False):
            state_H = layer.step(state_H, weights)  # type: ignore[operator]
        state_H = self.norm(state_H)
        return torch.cat([state_H, self.recall.step(vector_D, recent_E, state_H, cache[-1])])

    def _encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> tuple[Tensor, list[FastWeights]]:
        reads = self.omitted != "memory"
        state_BTH, cache = self.project_in(recent_BTE), []
        for layer in self.layers:
            state_BTH, weights = layer(state_BTH, reads)
            cache.append(weights)
        state_BTH = self.norm(state_BTH)
        recalled_BTD, weights = self.recall(context_BTD, recent_BTE, state_BTH)
        if self.omitted in ("memory", "recall"):
            recalled_BTD = torch.zeros_like(recalled_BTD)
        return torch.cat([state_BTH, recalled_BTD.to(state_BTH.dtype)], dim=-1), [*cache, weights]

    def _increment(self, state_BTH: Tensor) -> Tensor:
        state_BTH, recalled_BTD = state_BTH.tensor_split([self.hidden], dim=-1)
        return super()._increment(state_BTH) + recalled_BTD


class Recall(nn.Module):
    """Remembers which row followed which: keys are maps of [x_i; ema_i], values are rows i + 1.

    One of its two heads starts fast, to follow a changing context, the other slow, to hold older
    rows. Both start as in-context regression of each row on the row before it; their reads start
    with weight zero.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.key = nn.Linear(2 * dim, RECALL_HEADS * min(dim, KEYS), bias=False)
        self.rates = nn.Linear(hidden, 3 * RECALL_HEADS)
        nn.init.zeros_(self.rates.weight)
        with torch.no_grad():
            self.key.weight[:, dim:] = 0
            self.rates.bias.copy_(torch.tensor([*STRENGTHS, *(RECALL_HEADS * [9.0]), 0.0, 0.0]))

    def forward(
        self, context_BTD: Tensor, recent_BTE: Tensor, state_BTH: Tensor
    ) -> tuple[Tensor, FastWeights]:
        """Return the weighted recall at each step (B, T, D) and the memory after the last step."""
        key_BTAK = self._keys(recent_BTE)
        strength_BTA, keep_BTA, weight_BTA = self._rates(state_BTH)
        read_BTAD, matrix_BADK = delta_rule(
            key_BTAK, _before(key_BTAK), context_BTD[:, :, None], _before(strength_BTA), keep_BTA
        )
        before = key_BTAK[0, -1].clone(), strength_BTA[0, -1].clone()
        return (weight_BTA[..., None] * read_BTAD).sum(dim=2), FastWeights(matrix_BADK[0], before)

    def step(
        self, vector_D: Tensor, recent_E: Tensor, state_H: Tensor, weights: FastWeights
    ) -> Tensor:
        """Return the weighted recall at one more step (D,)."""
        key_AK = self._keys(recent_E)
        strength_A, keep_A, weight_A = self._rates(state_H)
        key_before_AK, strength_before_A = weights.before
        value_AD = vector_D.expand(RECALL_HEADS, -1)
        read_AD, weights.matrix_AVR = delta_step(
            key_AK, key_before_AK, value_AD, strength_before_A, keep_A, weights.matrix_AVR
        )
        weights.before = key_AK, strength_A
        return weight_A @ read_AD

    def _keys(self, recent_BTE: Tensor) -> Tensor:
        return unit(self.key(recent_BTE).float().unflatten(-1, (RECALL_HEADS, -1)))

    def _rates(self, state_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the strength of the write at step t + 1, the log decay, the weight of the read."""
        strength, keep, weight = self.rates(state_BTH).float().chunk(3, dim=-1)
        return strength.sigmoid(), logsigmoid(keep), weight


class DeltaLayer(nn.Module):
    """Residual gated delta rule over heads, then a residual SwiGLU block.

    Keys are maps of the previous and the current state, so that a head can remember which state
    followed which (the purpose of the short convolution of Yang et al., arXiv 2412.06464, section
    3.4).
    """

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = max(1, hidden // HEAD_DIM)
        self.mix_norm = RMSNorm(hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(2 * hidden, hidden)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.rates = nn.Linear(hidden, 2 * self.heads)
        self.gate = nn.Linear(hidden, hidden)
        self.read_norm = RMSNorm(hidden // self.heads)
        self.mix = nn.Linear(hidden, hidden)
        self.feed_norm = RMSNorm(hidden)
        self.widen = nn.Linear(hidden, 4 * hidden)
        self.narrow = nn.Linear(2 * hidden, hidden)
        self.dropout = Dropout(dropout)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Start half of the heads as registers, half as memories of which state followed which.

        The key of a register is nearly constant, so it holds a gated average of its inputs.
        """
        hidden, registers = self.query.in_features, self.heads // 2
        rows = registers * (hidden // self.heads)
        self.key.weight[:, :hidden] *= 0.1
        self.key.weight[:, hidden:] = self.query.weight
        constant = torch.randn(rows)
        for map_ in (self.query, self.key):
            map_.weight[:rows] *= 0.1
            map_.bias[:rows] = constant
            map_.bias[rows:] = 0
        strength, keep = self.rates.bias.chunk(2)
        strength[:registers] = torch.linspace(-2, -6, registers)
        self.rates.weight[:registers] *= GATE_GAIN
        strength[registers:] = 0
        keep[:] = 8

    def forward(self, state_BTH: Tensor, reads: bool = True) -> tuple[Tensor, FastWeights]:
        """Return the next states (B, T, H) and the last memory; without `reads` reads are zero."""
        seen_BTH = self.mix_norm(state_BTH)
        read_BTAV, matrix_BAVR = delta_rule(*self._parts(seen_BTH, _before(seen_BTH)))
        if not reads:
            read_BTAV = torch.zeros_like(read_BTAV)
        weights = FastWeights(matrix_BAVR[0], (seen_BTH[0, -1].clone(),))
        return self._feed(state_BTH, seen_BTH, read_BTAV), weights

    def step(self, state_H: Tensor, weights: FastWeights) -> Tensor:
        """Return the next state (H,) after one more step."""
        seen_H = self.mix_norm(state_H)
        parts = self._parts(seen_H, weights.before[0])
        read_AV, weights.matrix_AVR = delta_step(*parts, weights.matrix_AVR)
        weights.before = (seen_H,)
        return self._feed(state_H, seen_H, read_AV)

    def _parts(
        self, seen_BTH: Tensor, before_BTH: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return query, key, value (B, T, A, ...), strength and log keep (B, T, A)."""
        both_BTH2 = torch.cat([seen_BTH, before_BTH], dim=-1)
        maps = (self.query(seen_BTH), self.key(both_BTH2), self.value(seen_BTH))
        query, key, value = (part.float().unflatten(-1, (self.heads, -1)) for part in maps)
        strength, keep = self.rates(seen_BTH).float().chunk(2, dim=-1)
        return unit(query), unit(key), value, strength.sigmoid(), logsigmoid(keep)

    def _feed(self, state_BTH: Tensor, seen_BTH: Tensor, read_BTAV: Tensor) -> Tensor:
        read_BTH = self.read_norm(read_BTAV).flatten(-2).to(seen_BTH.dtype)
        mixed_BTH = state_BTH + self.dropout(self.mix(read_BTH * silu(self.gate(seen_BTH))))
        gate_BTX, value_BTX = self.widen(self.feed_norm(mixed_BTH)).chunk(2, dim=-1)
        return mixed_BTH + self.dropout(self.narrow(silu(gate_BTX) * value_BTX))


def _before(rows_BTX: Tensor) -> Tensor:
    """Return the rows (B, T, ...) shifted one step later, zeros first."""
    return torch.cat([torch.zeros_like(rows_BTX[:, :1]), rows_BTX[:, :-1]], dim=1)
