"""What a training is going to do, known before its first step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from lvm.training.batches import Batches
from lvm.training.recipes import Settings

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class TrainingPlan:
    """Optimiser steps of an epoch, of all; steps of warm-up; examples of an epoch.

    An example is a supervised position, a window under recipe=seed. `own_negatives` are the other
    windows of a batch where they alone are the negatives (recipe=seed), else None. `epochs` are
    those that `steps` reach at most.
    """

    epochs: int
    steps_per_epoch: int
    steps: int
    warmup: int
    examples_per_epoch: int
    own_negatives: int | None

    def report(self) -> dict[str, Any]:
        """Return it as JSON-able values."""
        return asdict(self)


def plan_training(batches: Batches, config: Settings) -> TrainingPlan:
    """Count the steps of `config` over these batches."""
    steps = [
        math.ceil(batches.num_batches(epoch) / config.accumulation)
        for epoch in range(1, config.epochs + 1)
    ]
    total = min(sum(steps), config.max_steps or sum(steps))
    is_dense = config.recipe == "dense"
    return TrainingPlan(
        epochs=min(config.epochs, math.ceil(total / steps[0])),
        steps_per_epoch=steps[0],
        steps=total,
        warmup=math.ceil(WARMUP_SHARE * total) if is_dense else steps[0],
        examples_per_epoch=batches.num_positions() if is_dense else batches.num_windows(),
        own_negatives=None if is_dense else min(config.batch_size, batches.num_windows()) - 1,
    )
