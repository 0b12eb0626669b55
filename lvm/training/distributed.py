"""Processes that train one model together, started by torchrun; one process without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")
# The other ranks wait while rank 0 validates over the whole bank; torchrun notices dead ranks.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among `size` processes; rank 0 validates, logs and writes.

    `control` is a process group for Python values; gradients use the default group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device `name`; on CUDA this process's own."""
        own_cuda = name == "cuda" and self.size > 1
        return torch.device(name, self.local_rank) if own_cuda else torch.device(name)

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Return the module with gradients averaged over processes in each backward pass."""
        if self.size == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        # A context of one chunk writes no memory; the parameters of its write get no gradient.
        return DistributedDataParallel(module, devices, find_unused_parameters=True)

    def from_main(self, value: Value | None) -> Value:
        """Return rank 0's `value` on every rank; all ranks must call it."""
        holder = [value]
        if self.size > 1:
            distributed.broadcast_object_list(holder, src=0, group=self.control)
        return holder[0]  # type: ignore[return-value]

    def gathered(self, value: Value) -> list[Value]:
        """Return every rank's `value`, ordered by rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value, group=self.control)
        return values

    def mean(self, value: float) -> float:
        """Return the mean of every rank's `value`."""
        return sum(self.gathered(value)) / self.size if self.size > 1 else value


def launched_rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if distributed.is_torchelastic_launched() else 0


def launched_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join torchrun's processes for the block: gloo on `device` cpu, nccl on cuda."""
    if launched_size() == 1:
        yield World()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        control = distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield World(distributed.get_rank(), distributed.get_world_size(), local_rank, control)
    finally:
        distributed.destroy_process_group()
