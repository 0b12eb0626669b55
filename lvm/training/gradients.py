"""The gradient of one optimiser step, whose batches several processes may share."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lvm.system.seeding import torch_seed
from lvm.training.batches import Batch, Batches
from lvm.training.distributed import World
from lvm.training.gate_losses import Told
from lvm.training.guidance import Guidance
from lvm.training.hard_negatives import HardNegatives
from lvm.training.loss import OwnNegatives
from lvm.training.supervision import Supervised


@dataclass
class Gradients:
    """Leaves gradients in the parameters of `supervised`; all processes see the same negatives."""

    supervised: Supervised
    batches: Batches
    hard: HardNegatives
    world: World
    device: torch.device
    guidance: Guidance | None = None
    _shared: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._shared = self.world.wrap(self.supervised, self.device)

    def backward(self, step: int, pending: Sequence[Batch]) -> float:
        """Leave the gradient of the batches' mean loss; return that loss, the same on all ranks.

        DistributedDataParallel averages gradients over processes, so each process weighs its mean
        by the number of processes times its share of the batch. Dropout is a function of seed,
        step, rank: with dropout, several processes draw other masks than one would.
        """
        config, rank, total = self.supervised.config, self.world.rank, 0.0
        stream = f"dropout of step {step}" + (f" rank {rank}" if rank else "")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(config.seed, stream))
            for number, batch in enumerate(pending, start=1):
                waits = self.world.size > 1 and number < len(pending)
                with self._shared.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    given = (*self._negatives(step, batch), self._told(step, batch))
                    mean = self._shared(batch.to(self.device), *given)
                    loss = mean * (batch.share * self.world.size / len(pending))
                    loss.backward()
                total += loss.item()
        return self.world.mean(total)

    def _told(self, step: int, batch: Batch) -> Told | None:
        if self.guidance is None:
            return None
        told = self.guidance.of_batch(batch, step)
        return replace(told, lane_BT=told.lane_BT.to(self.device))

    def _negatives(self, step: int, batch: Batch) -> tuple[Tensor | None, OwnNegatives | None]:
        config = self.supervised.config
        if config.recipe != "dense":
            return None, None
        shared_KD = self.batches.negatives(step, config.negatives)
        own = self.hard.of_batch(batch)
        return shared_KD.to(self.device), None if own is None else own.to(self.device)
