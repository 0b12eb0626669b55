"""Optimiser with its schedule of learning rates."""

import math
from typing import Any

import torch
from torch import nn

from lvm.recipes import Settings

FINAL_LR_SHARE = 0.01


def make_optimizer(
    model: nn.Module, objective: nn.Module, config: Settings
) -> torch.optim.Optimizer:
    """Return AdamW; weight decay acts on matrices only."""
    parameters = [*model.parameters(), *objective.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))


def average_decay(total_steps: int) -> float:
    """Weight average over about the last tenth of training, at most 1,000 steps."""
    return min(0.999, max(0.5, 1 - 10 / max(1, total_steps)))


def lr_share(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine from 1 to `FINAL_LR_SHARE` over the remaining steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
