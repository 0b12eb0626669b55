"""Recurrent encoders that run the chunks of a sequence in parallel.

Shapes: B batch, C chunks, S steps of a chunk, T time, H hidden. T is a multiple of the chunk.
"""

import torch
from torch import Tensor, nn

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
        self.norm = nn.RMSNorm(hidden)
        between = dropout if layers > 1 else 0.0
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True, dropout=between)

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        normed_BTH = self.norm(input_BTH)
        state_NSH, _ = self.gru(normed_BTH.unflatten(1, (-1, chunk)).flatten(0, 1))
        return input_BTH + state_NSH.unflatten(0, (len(input_BTH), -1)).flatten(1, 2)


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


class MinGRULayer(nn.Module):
    """One residual minGRU mixer followed by one residual SwiGLU feed-forward block."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        width = 4 * hidden // 3
        self.mix_norm = nn.RMSNorm(hidden)
        self.gate_and_value = nn.Linear(hidden, 2 * hidden)
        self.feed_norm = nn.RMSNorm(hidden)
        self.widen = nn.Linear(hidden, 2 * width)
        self.narrow = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        gate_BTH, value_BTH = self.gate_and_value(self.mix_norm(input_BTH)).chunk(2, dim=-1)
        update_BTH = gate_BTH.sigmoid()
        state_BTH = recurrence_scan(1 - update_BTH, update_BTH * value_BTH, chunk)
        mixed_BTH = input_BTH + self.dropout(state_BTH)
        gate_BTF, value_BTF = self.widen(self.feed_norm(mixed_BTH)).chunk(2, dim=-1)
        fed_BTH = self.narrow(torch.nn.functional.silu(gate_BTF) * value_BTF)
        return mixed_BTH + self.dropout(fed_BTH)
