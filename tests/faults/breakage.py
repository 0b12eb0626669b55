"""Breaks trainings at chosen steps, by hooks on the real modules and optimizers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lvm.training.optimizer import Supervised

Optimizer = torch.optim.Optimizer


@contextmanager
def at_losses(steps: set[int], change: Callable[[Supervised, Tensor], Tensor]) -> Iterator[None]:
    """Pass the loss of the given forward passes, counted from 0, through `change`."""
    seen = 0

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        nonlocal seen
        if not isinstance(module, Supervised):
            return None
        seen += 1
        return change(module, output) if seen - 1 in steps else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_steps(steps: set[int], change: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call `change` right after the given updates of the weights, counted from 0."""
    seen = 0

    def hook(optimizer: Optimizer, *_: object) -> None:
        nonlocal seen
        seen += 1
        if seen - 1 in steps:
            with torch.no_grad():
                change(optimizer)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def before_every_step(call: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call `call` right before every update of the weights."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: call(optimizer))
    try:
        yield
    finally:
        handle.remove()


def scramble(optimizer: Optimizer) -> None:
    """Replace the matrices by noise: finite weights that predict nothing."""
    draw = torch.Generator().manual_seed(0)
    for parameter in weights_of(optimizer):
        if parameter.ndim == 2:
            parameter.copy_(torch.randn(parameter.shape, generator=draw))


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters that the optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]
