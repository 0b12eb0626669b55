"""Rows scaled by their length, in the precision of their input.

Shapes: H features of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

TINY = 1e-24  # what keeps the zero row zero; no sum of squares that counts is near it


def unit(rows: Tensor) -> Tensor:
    """Return rows (..., H) of length 1; zero rows stay zero."""
    return scaled_rows(rows, TINY)


def scaled_rows(rows: Tensor, added: float) -> Tensor:
    """Return x / sqrt(|x|^2 + added) of rows (..., H).

    The gradient is written out: torch's own, of normalize as of rms_norm, takes a CPU three to
    eight times as long.
    """
    if rows.dtype == torch.float16:  # the factor of a short row is beyond its range
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

    Under bf16 autocast torch's own keeps a float32 weight, which rules out its fused kernel on a
    GPU; on a CPU it has none.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:
            return rms_norm(x, self.normalized_shape, weight, self.eps)
        exact, size = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
        eps = torch.finfo(exact).eps if self.eps is None else self.eps
        return scaled_rows(x, size * eps) * (size**0.5 * weight)
