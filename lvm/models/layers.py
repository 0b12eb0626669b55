"""Layers shared by several models: norms, a dropout that is cheap on a CPU, exact linear scans.

Shapes: B batch, T time, K blocks, S steps of a block, H features, D vector dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, rms_norm

TINY = 1e-24  # keeps a zero row zero; far below the squared length of any real row
LEVELS = 2**16


def unit(rows: Tensor) -> Tensor:
    """Return rows (..., H) of length 1; zero rows stay zero."""
    return scaled_rows(rows, TINY)


def scaled_rows(rows: Tensor, added: float) -> Tensor:
    """Return x / sqrt(|x|^2 + added) of rows (..., H).

    The gradient is written by hand: those of torch's normalize and rms_norm take three to eight
    times as long on a CPU.
    """
    if rows.dtype == torch.float16:  # the factor of a short row overflows float16
        return scaled_rows(rows.float(), added).half()
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return rows * _factor(rows, added)
    scaled: Tensor = _ScaledRows.apply(rows, added)
    return scaled


def _factor(rows: Tensor, added: float) -> Tensor:
    exact = torch.promote_types(rows.dtype, torch.float32)
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=exact)
    return length.square_().add_(added).rsqrt_().to(rows.dtype)


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, added: float) -> Tensor:
        factor = _factor(rows, added)
        scaled = rows * factor
        ctx.save_for_backward(scaled, factor)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scaled, factor = ctx.saved_tensors
        along = (grad * scaled).sum(dim=-1, keepdim=True)
        return torch.addcmul(grad, scaled, along, value=-1).mul_(factor), None


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (Zhang, Sennrich, arXiv 1910.07467) whose weight follows the input's dtype.

    Under bf16 autocast `nn.RMSNorm` keeps a float32 weight, which rules out its fused kernel on a
    GPU; on a CPU there is no fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:
            return rms_norm(x, self.normalized_shape, weight, self.eps)
        exact, size = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        eps = torch.finfo(exact).eps if self.eps is None else self.eps
        return scaled_rows(x, size * eps) * (size**0.5 * weight)


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits per element; p is rounded to a multiple of 2^-16.

    `nn.Dropout` draws one Bernoulli number per element, which takes six times as long (AMD EPYC,
    one core).
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * LEVELS)
        if not self.training or not 0 < dropped < LEVELS or x.is_cuda:
            return super().forward(x)
        count = x.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=x.device)
        level = bits.random_(-(2**63), None).view(torch.int16)[:count].view(x.shape)
        lowest = dropped - LEVELS // 2
        kept = level.clamp_(lowest - 1, lowest).sub_(lowest - 1)
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def gated_scan(gate_and_value_BTX: Tensor) -> Tensor:
    """Return the states (B, T, H) of h_t = h_{t-1} + sigmoid(g_t) (v_t - h_{t-1}), h_0 = 0.

    The input (B, T, 2 H) has g before v. Time is cut into about sqrt(T) blocks that advance
    together, twice: first to find how each block maps its initial state to its last, then, with
    these maps composed across blocks, to write the states. Recurrences are float32 for any input
    dtype. Raises ValueError if T = 0.
    """
    states: Tensor = _GatedScan.apply(gate_and_value_BTX)
    return states


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_value_BTX: Tensor) -> Tensor:
        gate_BTH, value_BTH = (_whole(x) for x in _gate_and_value(gate_and_value_BTX))
        state_BTH = torch.empty_like(gate_BTH)
        gate_S, value_S, state_S = (_steps(x) for x in (gate_BTH, value_BTH, state_BTH))
        state_BKH, kept_BKH = torch.zeros_like(gate_S[0]), torch.ones_like(gate_S[0])
        for gate_BKH, value_BKH in zip(gate_S, value_S, strict=True):
            state_BKH.lerp_(value_BKH, gate_BKH)
            kept_BKH.addcmul_(kept_BKH, gate_BKH, value=-1)
        state_BKH = _carried(kept_BKH, state_BKH)
        for gate_BKH, value_BKH, out_BKH in zip(gate_S, value_S, state_S, strict=True):
            state_BKH = torch.lerp(state_BKH, value_BKH, gate_BKH, out=out_BKH)
        state_BTH = state_BTH[:, : gate_and_value_BTX.shape[1]]
        ctx.save_for_backward(gate_and_value_BTX, state_BTH)
        return state_BTH.to(gate_and_value_BTX.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTH: Tensor) -> Tensor:
        gate_and_value_BTX, state_BTH = ctx.saved_tensors
        gate_BTH, value_BTH = _gate_and_value(gate_and_value_BTX)
        total_BTH = _reverse_scan(gate_BTH, grad_BTH.to(gate_BTH.dtype))
        grad_BTX = torch.empty_like(gate_and_value_BTX)
        grad_gate_BTH, grad_value_BTH = grad_BTX.chunk(2, dim=-1)
        grad_value_BTH.copy_(total_BTH.mul_(gate_BTH))
        change_BTH = value_BTH.clone()
        change_BTH[:, 1:] -= state_BTH[:, :-1]
        change_BTH.mul_(total_BTH)
        grad_gate_BTH.copy_(change_BTH.addcmul_(change_BTH, gate_BTH, value=-1))
        return grad_BTX


def _reverse_scan(gate_BTH: Tensor, grad_BTH: Tensor) -> Tensor:
    """Return d_t = grad_t + (1 - gate_{t+1}) d_{t+1}, the gradient of each state, (B, T, H)."""
    num_steps = gate_BTH.shape[1]
    gate_BTH, grad_BTH = _whole(gate_BTH), _whole(grad_BTH)
    total_BTH = torch.empty_like(gate_BTH)
    gate_S, grad_S, total_S = (_steps(x)[::-1] for x in (gate_BTH, grad_BTH, total_BTH))
    later_BKH, kept_BKH = torch.zeros_like(gate_S[0]), torch.ones_like(gate_S[0])
    for gate_BKH, grad_BKH in zip(gate_S, grad_S, strict=True):
        later_BKH.add_(grad_BKH)
        later_BKH.addcmul_(later_BKH, gate_BKH, value=-1)
        kept_BKH.addcmul_(kept_BKH, gate_BKH, value=-1)
    later_BKH = _carried(kept_BKH.flip(1), later_BKH.flip(1)).flip(1)
    for gate_BKH, grad_BKH, out_BKH in zip(gate_S, grad_S, total_S, strict=True):
        torch.add(grad_BKH, later_BKH, out=out_BKH)
        torch.addcmul(out_BKH, out_BKH, gate_BKH, value=-1, out=later_BKH)
    return total_BTH[:, :num_steps]


def _gate_and_value(gate_and_value_BTX: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(gate_and_value_BTX.dtype, torch.float32)
    gate_BTH, value_BTH = gate_and_value_BTX.chunk(2, dim=-1)
    return gate_BTH.to(exact).sigmoid(), value_BTH.to(exact)


def _carried(kept_BKH: Tensor, added_BKH: Tensor) -> Tensor:
    """Return the initial state of each block; a block maps a state s to kept s + added."""
    start_BKH = torch.zeros_like(added_BKH)
    for block in range(1, start_BKH.shape[1]):
        before = block - 1
        start_BH = torch.addcmul(added_BKH[:, before], kept_BKH[:, before], start_BKH[:, before])
        start_BKH[:, block] = start_BH
    return start_BKH


def _num_blocks(num_steps: int) -> int:
    """Return K: the largest divisor of T from half its square root up to it, else the root."""
    if not num_steps:
        raise ValueError("steps: a recurrence over none; at least 1 is needed")
    root = math.isqrt(num_steps)
    return next((k for k in range(root, root // 2, -1) if num_steps % k == 0), root)


def _whole(value_BTH: Tensor) -> Tensor:
    """Return (B, K S, H), padded with zeros so that all K blocks are full."""
    num_missing = -value_BTH.shape[1] % _num_blocks(value_BTH.shape[1])
    return pad(value_BTH, (0, 0, 0, num_missing)) if num_missing else value_BTH


def _steps(value_BTH: Tensor) -> tuple[Tensor, ...]:
    """Return the S steps (B, K, H) of full blocks."""
    return value_BTH.unflatten(1, (_num_blocks(value_BTH.shape[1]), -1)).unbind(2)


def moving_average(vector_BTD: Tensor, decay: float) -> Tensor:
    """Return the causal exponential average (B, T, D) with weights decay^k, corrected at the start.

    average_t = sum_k decay^k x_{t-k} / sum_k decay^k over k = 0..t, for any T, in blocks as in
    `gated_scan`. It has no gradient: vectors that require one raise RuntimeError. T = 0 raises
    ValueError.
    """
    whole_BTD = _whole(vector_BTD)
    sum_BTD = torch.empty_like(whole_BTD, memory_format=torch.contiguous_format)
    vector_S, sum_S = _steps(whole_BTD), _steps(sum_BTD)
    sum_BKD = torch.zeros_like(vector_S[0])
    for vector_BKD in vector_S:
        torch.add(vector_BKD, sum_BKD, alpha=decay, out=sum_BKD)
    sum_BKD = _carried(torch.full_like(sum_BKD, decay ** len(vector_S)), sum_BKD)
    for vector_BKD, out_BKD in zip(vector_S, sum_S, strict=True):
        sum_BKD = torch.add(vector_BKD, sum_BKD, alpha=decay, out=out_BKD)
    num_steps = vector_BTD.shape[1]
    position_T = torch.arange(num_steps, device=vector_BTD.device, dtype=torch.float64)
    total_T = (1 - decay ** (position_T + 1)) / (1 - decay)
    return sum_BTD[:, :num_steps].div_(total_T.to(sum_BTD.dtype)[:, None])


class RunningAverage:
    """The newest value (D,) of `moving_average` over rows that come one at a time."""

    def __init__(self, context_TD: Tensor, decay: float) -> None:
        self.decay, self.num_rows = decay, len(context_TD)
        self.value_D = moving_average(context_TD[None], decay)[0, -1].clone()

    def append(self, vector_D: Tensor) -> Tensor:
        """Return the average after one more row."""
        self.num_rows += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_rows)
        self.value_D = torch.lerp(self.value_D, vector_D, weight)
        return self.value_D
