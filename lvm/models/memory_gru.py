"""Recurrent predictor that reads a long context in chunks, with an external memory.

Shapes: B batch, C chunks, S steps of a chunk, T time, D vector dim, H hidden, M memory slots.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, softplus

from lvm.models.layers import RMSNorm, unit
from lvm.models.recurrent import make_encoder
from lvm.models.skip import Residual

ROOM = 1024  # a stream first allocates at most this many rows of a chunk


@dataclass(frozen=True, kw_only=True)
class MemoryGRUConfig:
    """Sizes of a `MemoryGRU`; `dim` is the bank's dimension, `memory` one of `MEMORIES`."""

    dim: int
    hidden: int = 512
    layers: int = 4
    chunk: int = 200
    slots: int = 16
    cell: str = "gru"
    memory: str = "slots"
    decay: float = 0.5
    dropout: float = 0.2

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "layers", "chunk", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if self.memory not in MEMORIES:
            raise ValueError(f"memory: unknown '{self.memory}'; known: {', '.join(MEMORIES)}")
        if self.layers % 2:
            raise ValueError(f"layers: {self.layers} is odd; half of them lie below the memory")
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f"decay: {self.decay} is not between 0 and 1 (both excluded)")


@dataclass
class EncoderCache:
    """State of the encoder in a stream: layer states, memory, the current chunk to be written.

    `slots` are the addresses and values that reads use. `chunk_SH` has room for a chunk, or for a
    part of a very long one; its first `num_filled` rows are valid.
    """

    lower: Any
    upper: Any
    memory_MH: Tensor
    slots: tuple[Tensor, Tensor]
    chunk_SH: Tensor
    num_filled: int


class MemoryGRU(Residual):
    """Predicts unit(unit(avg_t) + W_skip [x_t; unit(ema_t)] + W_out unit(h_t)) from any context.

    avg_t is an average of the recent vectors whose weights adapt to their content.

    The context is cut into chunks of `chunk` steps that run through the encoder in parallel. At the
    end of a chunk its summary is written into a memory of `slots` vectors; positions of the next
    chunk read the memory in that state. Position t never depends on a later one. avg_t starts as
    the moving average of `decay`, W_skip and W_out start as zero: step 0 predicts the moving
    average.
    """

    ablations: tuple[str, ...] = ("linear", "encoder", "memory")

    def __init__(self, **config: object) -> None:
        sizes = MemoryGRUConfig(**config)  # type: ignore[arg-type]
        super().__init__(sizes.dim, sizes.hidden, sizes.decay, sizes.dropout)
        self.sizes = sizes
        self.config = {"model": "memory_gru", **asdict(sizes)}
        hidden, half = sizes.hidden, sizes.layers // 2
        self.project_in = nn.Linear(2 * sizes.dim, hidden)
        self.lower = make_encoder(sizes.cell, hidden, half, sizes.dropout)
        self.memory = MEMORIES[sizes.memory](hidden, sizes.slots)
        self.upper = make_encoder(sizes.cell, hidden, half, sizes.dropout)
        self.norm = RMSNorm(hidden)

    def memory_modules(self) -> list[nn.Module]:
        return [self.memory]

    def encode(self, context_BTD: Tensor, recent_BTE: Tensor) -> Tensor:
        """Return the hidden states (B, T, H) of every position."""
        num_steps = recent_BTE.shape[1]
        chunk = min(self.sizes.chunk, num_steps)
        input_BTH = self.project_in(recent_BTE)
        input_BTH = pad(input_BTH, (0, 0, 0, -num_steps % chunk))
        lower_BTH = self.lower(input_BTH, chunk)
        if self.omitted == "memory":
            return self.norm(self.upper(lower_BTH, chunk))[:, :num_steps]
        upper_BTH = self.upper(lower_BTH + self.memory(lower_BTH, chunk), chunk)
        return self.norm(upper_BTH)[:, :num_steps]

    def begin_encoder(self, context_TD: Tensor, recent_TE: Tensor) -> tuple[Tensor, EncoderCache]:
        """Return the last hidden state (H,) and the encoder's cache; chunks run in parallel."""
        num_steps = len(recent_TE)
        chunk = min(self.sizes.chunk, num_steps)
        lower_TH, lower = self.lower.begin(self.project_in(recent_TE), chunk)  # type: ignore[operator]
        lower_1CSH = pad(lower_TH, (0, 0, 0, -num_steps % chunk)).unflatten(0, (-1, chunk))[None]
        memory_1CMH = self.memory.states(lower_1CSH)
        slots = self.memory.slots(memory_1CMH)
        read_TH = self.memory.read(slots, lower_1CSH)[0].flatten(0, 1)[:num_steps]
        upper_TH, upper = self.upper.begin(lower_TH + read_TH, chunk)  # type: ignore[operator]
        num_filled = num_steps - chunk * (lower_1CSH.shape[1] - 1)
        room = min(self.sizes.chunk, num_filled + ROOM)
        chunk_SH = lower_TH.new_zeros(room, lower_TH.shape[1])
        chunk_SH[:num_filled] = lower_TH[-num_filled:]
        memory_MH = memory_1CMH[0, -1].clone()  # a view would hold the memories of all chunks
        slots = self.memory.slots(memory_MH)
        cache = EncoderCache(lower, upper, memory_MH, slots, chunk_SH, num_filled)
        return self.norm(upper_TH[-1]), cache

    def step_encoder(self, vector_D: Tensor, recent_E: Tensor, cache: EncoderCache) -> Tensor:
        """Return the next hidden state (H,): one cell step, one memory read."""
        is_first = cache.num_filled == self.sizes.chunk
        if is_first:
            cache.memory_MH = self.memory.write(cache.memory_MH[None], cache.chunk_SH[None])[0]
            cache.slots = self.memory.slots(cache.memory_MH)
            cache.num_filled = 0
        lower_H, cache.lower = self.lower.step(self.project_in(recent_E), cache.lower, is_first)  # type: ignore[operator]
        read_H = self.memory.read(cache.slots, lower_H[None])[0]
        upper_H, cache.upper = self.upper.step(lower_H + read_H, cache.upper, is_first)  # type: ignore[operator]
        if cache.num_filled == len(cache.chunk_SH):
            more = min(cache.num_filled, self.sizes.chunk - cache.num_filled)
            cache.chunk_SH = pad(cache.chunk_SH, (0, 0, 0, more))
        cache.chunk_SH[cache.num_filled] = lower_H
        cache.num_filled += 1
        return self.norm(upper_H)


class SlotMemory(nn.Module):
    """External memory of M slots per sequence, read by content, written at the end of each chunk.

    A slot attends to the steps of the chunk and to its own content. The weight on its own content
    is kept; the rest is erased and replaced by the attended steps (the gated erase and add of
    Graves et al., Neural Turing Machines, arXiv 1410.5401, section 3.2, with one softmax as its
    gate). A read is an attention over the slots. The value map acts on the M mixtures instead of
    the S steps, because M is smaller.
    """

    def __init__(self, hidden: int, slots: int) -> None:
        super().__init__()
        self.scale = hidden**-0.5
        self.norm = RMSNorm(hidden)
        self.initial_MH = nn.Parameter(torch.randn(slots, hidden) * 0.1)
        self.name_MH = nn.Parameter(torch.randn(slots, hidden))
        self.read_key = nn.Linear(hidden, hidden)
        self.read_address = nn.Linear(hidden, hidden)
        self.read_value = nn.Linear(hidden, hidden)
        self.slot_query = nn.Linear(hidden, hidden)
        # A bias of the step keys would add the same value to every step's score.
        self.step_key = nn.Linear(hidden, hidden, bias=False)
        self.step_value = nn.Linear(hidden, hidden, bias=False)
        self.keep = nn.Linear(hidden, 1)
        # At first, with 200 steps of equal score, a slot keeps half of its content.
        nn.init.constant_(self.keep.bias, math.log(200.0))

    def forward(self, state_BTH: Tensor, chunk: int) -> Tensor:
        """Return the read of each position, (B, T, H); T must be a multiple of `chunk`."""
        state_BCSH = state_BTH.unflatten(1, (-1, chunk))
        return self.read(self.slots(self.states(state_BCSH)), state_BCSH).flatten(1, 2)

    def states(self, state_BCSH: Tensor) -> Tensor:
        """Return the memory (B, C, M, H) at the start of each chunk."""
        memory_BMH = self.initial_MH.to(state_BCSH.dtype).expand(len(state_BCSH), -1, -1)
        memories = [memory_BMH]
        for chunk_BSH in state_BCSH[:, :-1].unbind(1):
            memory_BMH = self.write(memory_BMH, chunk_BSH)
            memories.append(memory_BMH)
        return torch.stack(memories, dim=1)

    def slots(self, memory_BCMH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the addresses and the values of the slots, (B, C, M, H) each."""
        address_BCMH = self.read_address(memory_BCMH) + self.name_MH.to(memory_BCMH.dtype)
        return address_BCMH * self.scale, self.read_value(memory_BCMH)

    def read(self, slots: tuple[Tensor, Tensor], state_BCSH: Tensor) -> Tensor:
        """Return the content-addressed mixture of slots for each step, (B, C, S, H)."""
        address_BCMH, value_BCMH = slots
        key_BCSH = self.read_key(self.norm(state_BCSH))
        return (key_BCSH @ address_BCMH.transpose(-1, -2)).softmax(dim=-1) @ value_BCMH

    def write(self, memory_BMH: Tensor, chunk_BSH: Tensor) -> Tensor:
        """Return the memory after writing a chunk's states (B, S, H)."""
        chunk_BSH = self.norm(chunk_BSH)
        query_BMH = self.slot_query(memory_BMH) + self.name_MH.to(memory_BMH.dtype)
        score_BMS = (query_BMH @ self.step_key.weight.to(query_BMH.dtype)) @ chunk_BSH.mT
        logits = torch.cat([score_BMS * self.scale, self.keep(memory_BMH)], dim=-1)
        weight_BMS, kept_BM1 = logits.softmax(dim=-1).split([chunk_BSH.shape[1], 1], dim=-1)
        return kept_BM1 * memory_BMH + self.step_value(weight_BMS @ chunk_BSH)


class AddressedMemory(SlotMemory):
    """The memory of models logged before `SlotMemory` had its gate; new models do not use it.

    Addressing is a softmax over slots of beta cos(key, slot); the write erases and adds with these
    weights (Graves et al., Neural Turing Machines, arXiv 1410.5401, section 3). The content for
    each slot is an attention over the chunk's steps (Bulatov et al., arXiv 2207.06881).
    """

    def __init__(self, hidden: int, slots: int) -> None:
        nn.Module.__init__(self)
        self.initial_MH = nn.Parameter(torch.randn(slots, hidden) / hidden**0.5)
        self.read_key = nn.Linear(hidden, hidden)
        self.read_value = nn.Linear(hidden, hidden)
        self.slot_query = nn.Linear(hidden, hidden)
        self.step_key = nn.Linear(hidden, hidden, bias=False)
        self.step_value = nn.Linear(hidden, hidden)
        self.write_key = nn.Linear(hidden, hidden)
        self.erase = nn.Linear(hidden, hidden)
        self.add = nn.Linear(hidden, hidden)
        self.read_sharpness = nn.Parameter(torch.tensor(2.0))
        self.write_sharpness = nn.Parameter(torch.tensor(2.0))

    def slots(self, memory_BCMH: Tensor) -> tuple[Tensor, Tensor]:
        address_BCMH = softplus(self.read_sharpness) * unit(memory_BCMH)
        return address_BCMH, self.read_value(memory_BCMH)

    def read(self, slots: tuple[Tensor, Tensor], state_BCSH: Tensor) -> Tensor:
        address_BCMH, value_BCMH = slots
        key_BCSH = unit(self.read_key(state_BCSH))
        return (key_BCSH @ address_BCMH.transpose(-1, -2)).softmax(dim=-1) @ value_BCMH

    def write(self, memory_BMH: Tensor, chunk_BSH: Tensor) -> Tensor:
        query_BMH = self.slot_query(memory_BMH) @ self.step_key.weight
        mixed_BMH = scaled_dot_product_attention(query_BMH, chunk_BSH, chunk_BSH)
        content_BMH = self.step_value(mixed_BMH)
        key_B1H = unit(self.write_key(chunk_BSH[:, -1:]))
        score_BM1 = unit(memory_BMH) @ key_B1H.transpose(-1, -2)
        address_BM1 = (softplus(self.write_sharpness) * score_BM1).softmax(dim=1)
        kept_BMH = 1 - address_BM1 * self.erase(content_BMH).sigmoid()
        return memory_BMH * kept_BMH + address_BM1 * self.add(content_BMH).tanh()


MEMORIES: dict[str, type[SlotMemory]] = {"slots": SlotMemory, "addressed": AddressedMemory}
