"""The optimizer with its learning rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from lvm.training.config import Settings

FINAL_LR_SHARE = 0.01


def make_optimizer(
    model: nn.Module, objective: nn.Module, config: Settings
) -> torch.optim.Optimizer:
    """Return AdamW, whose weight decay acts on matrices alone."""
    parameters = [*model.parameters(), *objective.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


def lr_share(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from 1 to `FINAL_LR_SHARE` over the remaining steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def focus_share(step: int, total: int) -> float:
    """Return the share of the loss's `focus` at a step: from 0 to 1 over the first half.

    Cross entropy has a gradient while every answer is far; the bounded loss has none.
    """
    return min(1.0, 2 * step / max(1, total))
