"""Exact scans of the gated linear recurrence h_t = a_t h_{t-1} + b_t.

Shapes: B batch, C chunks, S steps of a chunk, T time, H features.
"""

import torch
from torch import Tensor


def recurrence_loop(gate_BTH: Tensor, value_BTH: Tensor) -> Tensor:
    """Unroll h_t = gate_t * h_{t-1} + value_t from h_{-1} = 0 step by step: the reference."""
    state_BH = torch.zeros_like(value_BTH[:, 0])
    states = []
    for gate_BH, value_BH in zip(gate_BTH.unbind(1), value_BTH.unbind(1), strict=True):
        state_BH = gate_BH * state_BH + value_BH
        states.append(state_BH)
    return torch.stack(states, dim=1)


def recurrence_scan(gate_BTH: Tensor, value_BTH: Tensor, chunk: int) -> Tensor:
    """Return the states (B, T, H) of h_t = gate_t * h_{t-1} + value_t, chunks in parallel.

    Two levels: inside chunks of `chunk` steps a doubling scan (Hillis and Steele, CACM 1986,
    29:12), then one carry a chunk. Equal to `recurrence_loop` up to float rounding, for any T.
    """
    num_steps = value_BTH.shape[1]
    padding = -num_steps % chunk
    gate_BCSH = _chunked(gate_BTH, chunk, padding)
    value_BCSH = _chunked(value_BTH, chunk, padding)
    shift = 1
    while shift < chunk:
        head = value_BCSH[:, :, :shift]
        tail = value_BCSH[:, :, shift:] + gate_BCSH[:, :, shift:] * value_BCSH[:, :, :-shift]
        gate_tail = gate_BCSH[:, :, shift:] * gate_BCSH[:, :, :-shift]
        value_BCSH = torch.cat([head, tail], dim=2)
        gate_BCSH = torch.cat([gate_BCSH[:, :, :shift], gate_tail], dim=2)
        shift *= 2
    carry_BH = torch.zeros_like(value_BCSH[:, 0, 0])
    carries = []
    for last_gate_BH, last_value_BH in zip(
        gate_BCSH[:, :, -1].unbind(1), value_BCSH[:, :, -1].unbind(1), strict=True
    ):
        carries.append(carry_BH)
        carry_BH = last_gate_BH * carry_BH + last_value_BH
    states_BCSH = value_BCSH + gate_BCSH * torch.stack(carries, dim=1).unsqueeze(2)
    return states_BCSH.flatten(1, 2)[:, :num_steps]


def moving_average(vector_BTD: Tensor, decay: float, block: int = 64) -> Tensor:
    """Return the causal exponential average (B, T, D), weights decay^k, corrected at the start.

    average_t = sum_k decay^k x_{t-k} / sum_k decay^k over k = 0..t. Blocks of `block` steps are one
    triangular matrix product each; the carry between blocks makes the result exact for any T.
    """
    num_steps = vector_BTD.shape[1]
    step = torch.arange(block, device=vector_BTD.device, dtype=torch.float64)
    lag = step[:, None] - step[None, :]
    weight = torch.where(lag >= 0, decay ** lag.clamp(min=0), 0.0).to(vector_BTD.dtype)
    carried = (decay ** (step + 1)).to(vector_BTD.dtype)[:, None]
    carry_B1D = torch.zeros_like(vector_BTD[:, :1])
    blocks = []
    for block_BSD in vector_BTD.split(block, dim=1):
        size = block_BSD.shape[1]
        sum_BSD = weight[:size, :size] @ block_BSD + carried[:size] * carry_B1D
        carry_B1D = sum_BSD[:, -1:]
        blocks.append(sum_BSD)
    position = torch.arange(num_steps, device=vector_BTD.device, dtype=torch.float64)
    total = ((1 - decay ** (position + 1)) / (1 - decay)).to(vector_BTD.dtype)
    return torch.cat(blocks, dim=1) / total[:, None]


class RunningAverage:
    """The newest value (D,) of `moving_average` over rows that come one at a time."""

    def __init__(self, context_TD: Tensor, decay: float) -> None:
        self.decay, self.num_rows = decay, len(context_TD)
        self.value_D = moving_average(context_TD[None], decay)[0, -1]

    def append(self, vector_D: Tensor) -> Tensor:
        """Return the average after one more row."""
        self.num_rows += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_rows)
        self.value_D = torch.lerp(self.value_D, vector_D, weight)
        return self.value_D


def _chunked(value_BTH: Tensor, chunk: int, padding: int) -> Tensor:
    padded = torch.nn.functional.pad(value_BTH, (0, 0, 0, padding))
    return padded.unflatten(1, (-1, chunk))
