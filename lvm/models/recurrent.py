"""Recurrent encoders that run the chunks of a sequence in parallel.

Shapes: B batch, C chunks, N chunks of all sequences, S steps of a chunk, T time, H hidden, L
layers. T is a multiple of the chunk in `forward`, any in `begin`, which also returns the state of a
stream; `step` takes that state one step on.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lvm.models.dropout import Dropout
from lvm.models.gru import gru_states, gru_step
from lvm.models.norm import RMSNorm
from lvm.models.scan import gated_scan

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
        self.gru = nn.GRU(hidden, hidden, layers)
        self.dropout = Dropout(between)

    def forward(self, input_BTH: Tensor, chunk: int) -> Tensor:
        input_NSH = input_BTH.unflatten(1, (-1, chunk)).flatten(0, 1)
        if input_BTH.is_cuda:
            state_NSH = self._last_by_kernel(input_NSH)
        else:
            state_NSH = self._states(input_NSH)[-1].transpose(0, 1)
        return (input_NSH + state_NSH).view_as(input_BTH)

    def begin(self, input_TH: Tensor, chunk: int) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs (T, H), the state (H,) of each layer after the last step."""
        num_steps = len(input_TH)
        input_NSH = pad(input_TH, (0, 0, 0, -num_steps % chunk)).unflatten(0, (-1, chunk))
        states = self._states(input_NSH)
        output_TH = input_TH + states[-1].transpose(0, 1).flatten(0, 1)[:num_steps]
        return output_TH, [_last(state_SNH, num_steps, chunk) for state_SNH in states]

    def step(
        self, input_H: Tensor, state: list[Tensor], is_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output (H,) with the next state; `is_first` where a chunk begins."""
        output_H, states = self.norm(input_H), []
        for weights, state_H in zip(self.gru.all_weights, state, strict=True):
            before_H = torch.zeros_like(state_H) if is_first else state_H
            output_H = gru_step(output_H, before_H, *weights)
            states.append(output_H)
        return input_H + output_H, states

    def _last_by_kernel(self, input_NSH: Tensor) -> Tensor:
        """Return the states (N, S, H) of the last layer by cuDNN's kernel for whole sequences.

        It takes one layer at a time: a mask that cuDNN draws between layers is not drawn again
        where activations are recomputed.
        """
        state_NSH = self.norm(input_NSH)
        zero_1NH = state_NSH.new_zeros(1, len(state_NSH), state_NSH.shape[2])
        for place, weights in enumerate(self.gru.all_weights):
            if place:
                state_NSH = self.dropout(state_NSH)
            state_NSH, _ = torch.gru(
                state_NSH, zero_1NH, tuple(weights), True, 1, 0.0, self.training, False, True
            )
        return state_NSH

    def _states(self, input_NSH: Tensor) -> list[Tensor]:
        """Return the states (S, N, H) of each layer."""
        output_SNH = self.norm(input_NSH).transpose(0, 1).contiguous()
        states: list[Tensor] = []
        for weights in self.gru.all_weights:
            if states:
                output_SNH = self.dropout(output_SNH)
            output_SNH = gru_states(output_SNH, *(w.to(output_SNH.dtype) for w in weights))
            states.append(output_SNH)
        return states


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
            input_BTH = layer(input_BTH)
        return input_BTH

    def begin(self, input_TH: Tensor, chunk: int) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs (T, H), the state (H,) of each layer after the last step."""
        states = []
        for layer in self.layers:
            input_TH, state_H = layer.begin(input_TH)  # type: ignore[operator]
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
        self.dropout = Dropout(dropout)

    def forward(self, input_BTH: Tensor) -> Tensor:
        return self._mix(input_BTH, self._states(input_BTH))

    def begin(self, input_TH: Tensor) -> tuple[Tensor, Tensor]:
        state_TH = self._states(input_TH[None])[0]
        return self._mix(input_TH, state_TH), state_TH[-1].clone()  # a view would keep them all

    def step(self, input_H: Tensor, state_H: Tensor) -> tuple[Tensor, Tensor]:
        gate_H, value_H = self.gate_and_value(self.mix_norm(input_H)).chunk(2)
        state_H = torch.lerp(state_H, value_H, gate_H.sigmoid())
        return self._mix(input_H, state_H), state_H

    def _states(self, input_BTH: Tensor) -> Tensor:
        return gated_scan(self.gate_and_value(self.mix_norm(input_BTH)))

    def _mix(self, input_BTH: Tensor, state_BTH: Tensor) -> Tensor:
        mixed_BTH = input_BTH + self.dropout(state_BTH)
        gate_BTF, value_BTF = self.widen(self.feed_norm(mixed_BTH)).chunk(2, dim=-1)
        fed_BTH = self.narrow(torch.nn.functional.silu(gate_BTF) * value_BTF)
        return mixed_BTH + self.dropout(fed_BTH)


def _last(state_SNH: Tensor, num_steps: int, chunk: int) -> Tensor:
    """Return the state (H,) after the last of all steps, without the others' memory."""
    return state_SNH[(num_steps - 1) % chunk, -1].clone()
