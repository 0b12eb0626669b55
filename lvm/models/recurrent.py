"""Recurrent encoders that run the chunks of a sequence in parallel.

The gradient of a GRU layer is written by hand. Shapes: B batch, C chunks, N chunks of all
sequences, S steps of a chunk, T time, H hidden, L layers; a number before H counts blocks of H.

`forward` needs T to be a multiple of the chunk. `begin` accepts any T and also returns the state of
a stream; `step` advances that state by one step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from lvm.models.layers import Dropout, RMSNorm, gated_scan

CELLS = ("gru", "mingru")


def gru_states(
    input_SNH: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """Return the states (S, N, H) of a GRU layer from state 0; weights as in `nn.GRU`.

    r, z = sigmoid(W x + U h + b); n = tanh(W_n x + b_n + r (U_n h + c_n)); h' = (1 - z) n + z h
    (Cho et al., arXiv 1406.1078, with the reset gate after the product as in cuDNN). The products
    with the input, and the gradients of the weights, are one matrix product each for all steps; on
    a CPU `nn.GRU` accumulates these gradients step by step in small operations on one core. All
    products use the input's dtype, even under autocast. Raises ValueError for zero steps.
    """
    if not len(input_SNH):
        raise ValueError("steps: a recurrence over none; at least 1 is needed")
    with torch.autocast(input_SNH.device.type, enabled=False):
        states: Tensor = _GRU.apply(input_SNH, weight_ih, weight_hh, bias_ih, bias_hh)
    return states


def gru_step(
    input_H: Tensor,
    state_H: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Tensor:
    """Return the next state (H,) of a GRU layer."""
    hidden = len(state_H)
    of_input, of_state = (
        torch.addmv(bias, weight, vector_H).split([2 * hidden, hidden])
        for bias, weight, vector_H in (
            (bias_ih, weight_ih, input_H),
            (bias_hh, weight_hh, state_H),
        )
    )
    reset_H, keep_H = (of_input[0] + of_state[0]).sigmoid().chunk(2)
    new_H = torch.addcmul(of_input[1], reset_H, of_state[1]).tanh()
    return torch.lerp(new_H, state_H, keep_H)


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_SNH: Tensor, weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor
    ) -> Tensor:
        bias_ih, bias_hh = biases
        hidden = input_SNH.shape[-1]
        inner = slice(0, 2 * hidden)  # gates whose two biases are added
        bias = torch.cat([bias_ih[inner] + bias_hh[inner], bias_ih[2 * hidden :]])
        gates_SN3H = torch.addmm(bias, input_SNH.flatten(0, 1), weight_ih.t())
        gates_SN3H = gates_SN3H.unflatten(0, input_SNH.shape[:2])
        back_SNH = torch.empty_like(input_SNH)
        states_SNH = input_SNH.new_zeros(len(input_SNH) + 1, *input_SNH.shape[1:])
        product_N3H = gates_SN3H.new_empty(gates_SN3H.shape[1:])
        product_N2H, product_NH = product_N3H.split([2 * hidden, hidden], dim=-1)
        both_SN2H, new_SNH = gates_SN3H.split([2 * hidden, hidden], dim=-1)
        reset_SNH, keep_SNH = both_SN2H.chunk(2, dim=-1)
        steps = (both_SN2H, reset_SNH, keep_SNH, new_SNH, back_SNH, states_SNH, states_SNH[1:])
        for both, reset, keep, new, back, state, later in zip(*steps, strict=False):
            torch.mm(state, weight_hh.t(), out=product_N3H)
            both.add_(product_N2H).sigmoid_()
            torch.add(product_NH, bias_hh[2 * hidden :], out=back)
            new.addcmul_(reset, back).tanh_()
            torch.lerp(new, state, keep, out=later)
        ctx.save_for_backward(input_SNH, weight_ih, weight_hh, gates_SN3H, back_SNH, states_SNH)
        return states_SNH[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SNH: Tensor) -> tuple[Tensor, ...]:
        input_SNH, weight_ih, weight_hh, gates_SN3H, back_SNH, states_SNH = ctx.saved_tensors
        hidden = input_SNH.shape[-1]
        with torch.autocast(grad_SNH.device.type, enabled=False):
            grad_SN4H = _slopes(gates_SN3H, back_SNH, states_SNH[:-1])
            _chain(grad_SN4H, grad_SNH, gates_SN3H.chunk(3, dim=-1)[1], weight_hh)
            rows_4H = grad_SN4H.flatten(2).flatten(0, 1)
            # n, r, z of the input's product; r, z, n of the state's.
            of_input, of_state = rows_4H[:, : 3 * hidden], rows_4H[:, hidden:]
            grad_input = (of_input @ weight_ih.roll(hidden, 0)).view_as(input_SNH)
            grad_ih = (of_input.t() @ input_SNH.flatten(0, 1)).roll(-hidden, 0)
            grad_hh = of_state.t() @ states_SNH[:-1].flatten(0, 1)
            bias_4H = rows_4H.sum(dim=0)
        return grad_input, grad_ih, grad_hh, bias_4H[: 3 * hidden].roll(-hidden), bias_4H[hidden:]


def _slopes(gates_SN3H: Tensor, back_SNH: Tensor, state_SNH: Tensor) -> Tensor:
    """Return the derivatives by n, r, z and U_n h before their functions, (S, N, 4, H)."""
    reset_SNH, keep_SNH, new_SNH = gates_SN3H.chunk(3, dim=-1)
    slope_SN4H = back_SNH.new_empty(*back_SNH.shape[:2], 4, back_SNH.shape[2])
    of_new, of_reset, of_keep, of_back = slope_SN4H.unbind(2)
    torch.addcmul(back_SNH.new_ones(()), new_SNH, new_SNH, value=-1, out=of_new)
    of_new.addcmul_(of_new, keep_SNH, value=-1)
    torch.mul(of_new, reset_SNH, out=of_back)
    torch.mul(of_back, back_SNH, out=of_reset)
    of_reset.addcmul_(of_reset, reset_SNH, value=-1)
    torch.sub(state_SNH, new_SNH, out=of_keep)
    of_keep.mul_(keep_SNH)
    of_keep.addcmul_(of_keep, keep_SNH, value=-1)
    return slope_SN4H


def _chain(slope_SN4H: Tensor, grad_SNH: Tensor, keep_SNH: Tensor, weight_hh: Tensor) -> None:
    """Turn the slopes into gradients in place, from the last step to the first."""
    total_NH = grad_SNH[-1]
    of_state_SN3H = slope_SN4H.flatten(2)[..., total_NH.shape[-1] :]
    for step in range(len(grad_SNH) - 1, -1, -1):
        slope_SN4H[step].mul_(total_NH[:, None])
        if step:
            through_NH = torch.mm(of_state_SN3H[step], weight_hh)
            total_NH = through_NH.addcmul_(total_NH, keep_SNH[step]).add_(grad_SNH[step - 1])


def make_encoder(cell: str, hidden: int, layers: int, dropout: float) -> nn.Module:
    """Return an encoder (B, T, H), chunk -> (B, T, H) with `cell`, one of `CELLS`."""
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
        """Return the outputs (T, H) and the state (H,) of each layer after the last step."""
        num_steps = len(input_TH)
        input_NSH = pad(input_TH, (0, 0, 0, -num_steps % chunk)).unflatten(0, (-1, chunk))
        states = self._states(input_NSH)
        output_TH = input_TH + states[-1].transpose(0, 1).flatten(0, 1)[:num_steps]
        return output_TH, [_last(state_SNH, num_steps, chunk) for state_SNH in states]

    def step(
        self, input_H: Tensor, state: list[Tensor], is_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output (H,) and the next state; `is_first` marks the start of a chunk."""
        output_H, states = self.norm(input_H), []
        for weights, state_H in zip(self.gru.all_weights, state, strict=True):
            before_H = torch.zeros_like(state_H) if is_first else state_H
            output_H = gru_step(output_H, before_H, *weights)
            states.append(output_H)
        return input_H + output_H, states

    def _last_by_kernel(self, input_NSH: Tensor) -> Tensor:
        """Return the states (N, S, H) of the last layer by cuDNN's kernel for whole sequences.

        One call per layer: cuDNN's own dropout between layers would draw another mask when
        activations are recomputed.
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
    """Gated linear recurrences, each with a feed-forward block; exact across chunks.

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
        """Return the outputs (T, H) and the state (H,) of each layer after the last step."""
        states = []
        for layer in self.layers:
            input_TH, state_H = layer.begin(input_TH)  # type: ignore[operator]
            states.append(state_H)
        return input_TH, states

    def step(
        self, input_H: Tensor, state: list[Tensor], is_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output (H,) and the next state; this recurrence crosses chunks."""
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
        return self._mix(input_TH, state_TH), state_TH[-1].clone()  # a view would hold all states

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
    """Return a copy of the state (H,) after the last step, without a view of all states."""
    return state_SNH[(num_steps - 1) % chunk, -1].clone()
