"""What a training is going to do, known before its first step."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

from lvm.training.batches import Batches
from lvm.training.config import Settings

WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class TrainingPlan:
    """Optimiser steps of an epoch, of all; steps of warm-up; examples of an epoch.

    Windows take turns: what is said of an epoch is the mean over all `epochs`, which are those that
    `steps` reach at most. An example is a supervised position, a window under recipe=seed.
    `own_negatives` are the other windows of a batch where they alone are the negatives
    (recipe=seed), else None.
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
    epochs = 1 + sum(1 for done in itertools.accumulate(steps) if done < total)
    is_dense = config.recipe == "dense"
    count = batches.num_positions if is_dense else batches.num_windows
    return TrainingPlan(
        epochs=epochs,
        steps_per_epoch=round(sum(steps[:epochs]) / epochs),
        steps=total,
        warmup=math.ceil(WARMUP_SHARE * total) if is_dense else steps[0],
        examples_per_epoch=round(sum(count(epoch) for epoch in range(1, epochs + 1)) / epochs),
        own_negatives=None if is_dense else min(config.batch_size, batches.num_windows()) - 1,
    )
