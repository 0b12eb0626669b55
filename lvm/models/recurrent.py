"""Recurrent encoders that run the chunks of a sequence in parallel.

Shapes: B batch, C chunks, N chunks of all sequences, S steps of a chunk, T time, H hidden, L
layers. T is a multiple of the chunk in `forward`, any in `begin`, which also returns the state of a
stream; `step` takes that state one step on.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lvm.models.norm import RMSNorm
from lvm.models.scan import recurrence_scan

CELLS = ("gru", "mingru")


def make_encoder(cell: str, hidden: int, layers: int, dropout: float) -> nn.Module:
    """Return the encoder (B, T, H), chunk -> (B, T, H) built of `cell`, one of `CELLS`."""
    if cell == "gru":
        return ChunkedGRU(hidden, layers, dropout)
    if cell == "mingru":
        return MinGRUStack(hidden, layers, dropout)
    raise ValueError(f"cell: unknown '{cell}'; known: {', '.join(CELLS)}")


class ChunkedGRU(nn.Module):
    """GRU layers that start each chunk from a zero state, all chunks of a batch at once."""

    def __init__(self, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True, dropout=between)

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        normed_BTH = self.norm(input_BTH)
        state_NSH, _ = self.gru(normed_BTH.unflatten(1, (-1, chunk)).flatten(0, 1))
        return input_BTH + state_NSH.unflatten(0, (len(input_BTH), -1)).flatten(1, 2)

    def begin(self, input_TH: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Return the outputs (T, H), the state (L, 1, H) after the last step."""
        num_steps = len(input_TH)
        normed_TH = pad(self.norm(input_TH), (0, 0, 0, -num_steps % chunk))
        normed_NSH = normed_TH.unflatten(0, (-1, chunk))
        steps_N = [chunk] * (len(normed_NSH) - 1) + [num_steps - chunk * (len(normed_NSH) - 1)]
        # Packed, so that the state of the last chunk is that of its last real step.
        packed, state_LNH = self.gru(pack_padded_sequence(normed_NSH, steps_N, batch_first=True))
        state_NSH, _ = pad_packed_sequence(packed, batch_first=True)
        return input_TH + state_NSH.flatten(0, 1)[:num_steps], state_LNH[:, -1:]

    def step(self, input_H: Tensor, state: Tensor, is_first: bool) -> tuple[Tensor, Tensor]:
        """Return the output (H,) with the next state; `is_first` where a chunk begins."""
        state_11H, state = self.gru(self.norm(input_H)[None, None], None if is_first else state)
        return input_H + state_11H[0, 0], state


class MinGRUStack(nn.Module):
    """Gated linear recurrences with a feed-forward block each, exact across chunks.

    h_t = (1 - z_t) h_{t-1} + z_t W_h x_t with z_t = sigmoid(W_z x_t) (Feng et al., arXiv
    2410.01201, section 3.1). The feed-forward width makes a layer about as large as a GRU layer.
    """

    def __init__(self, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MinGRULayer(hidden, dropout) for _ in range(layers))

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        for layer in self.layers:
            input_BTH = layer(input_BTH, chunk)
        return input_BTH

    def begin(self, input_TH: Tensor, chunk: int) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs (T, H), the state (H,) of each layer after the last step."""
        states = []
        for layer in self.layers:
            input_TH, state_H = layer.begin(input_TH, chunk)  # type: ignore[operator]
            states.append(state_H)
        return input_TH, states

    def step(
        self, input_H: Tensor, state: list[Tensor], is_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output (H,) with the next state; this recurrence crosses chunks."""
        states = []
        for layer, state_H in zip(self.layers, state, strict=True):
            input_H, state_H = layer.step(input_H, state_H)  # type: ignore[operator]
            states.append(state_H)
        return input_H, states


class MinGRULayer(nn.Module):
    """One residual minGRU mixer followed by one residual SwiGLU feed-forward block."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        width = 4 * hidden // 3
        self.mix_norm = RMSNorm(hidden)
        self.gate_and_value = nn.Linear(hidden, 2 * hidden)
        self.feed_norm = RMSNorm(hidden)
        self.widen = nn.Linear(hidden, 2 * width)
        self.narrow = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        update_BTH, value_BTH = self._gates(input_BTH)
        state_BTH = recurrence_scan(1 - update_BTH, update_BTH * value_BTH, chunk)
        return self._mix(input_BTH, state_BTH)

    def begin(self, input_TH: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        update_TH, value_TH = self._gates(input_TH)
        gate_1TH, add_1TH = (1 - update_TH)[None], (update_TH * value_TH)[None]
        state_TH = recurrence_scan(gate_1TH, add_1TH, chunk)[0]
        return self._mix(input_TH, state_TH), state_TH[-1]

    def step(self, input_H: Tensor, state_H: Tensor) -> tuple[Tensor, Tensor]:
        update_H, value_H = self._gates(input_H)
        state_H = torch.lerp(state_H, value_H, update_H)
        return self._mix(input_H, state_H), state_H

    def _gates(self, input_BTH: Tensor) -> tuple[Tensor, Tensor]:
        gate_BTH, value_BTH = self.gate_and_value(self.mix_norm(input_BTH)).chunk(2, dim=-1)
        return gate_BTH.sigmoid(), value_BTH

    def _mix(self, input_BTH: Tensor, state_BTH: Tensor) -> Tensor:
        mixed_BTH = input_BTH + self.dropout(state_BTH)
        gate_BTF, value_BTF = self.widen(self.feed_norm(mixed_BTH)).chunk(2, dim=-1)
        fed_BTH = self.narrow(torch.nn.functional.silu(gate_BTF) * value_BTF)
        return mixed_BTH + self.dropout(fed_BTH)
