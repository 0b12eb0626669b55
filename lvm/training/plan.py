"""The plan of a training: its steps and examples, and the hash of all that decides its result."""

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lvm.models.weights import FIT_VERSION, model_digest
from lvm.training.batches import Batches
from lvm.training.config import Settings, as_dict
from lvm.windows.planning import Windows

WARMUP_SHARE = 0.05
TRAINING_VERSION = 3  # raised whenever equal settings train another model from the same rows


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


def training_sha256(config: Settings, windows: Windows, initial: nn.Module | None = None) -> str:
    """Return the identity of a training: settings, bank, windows, versions of what computes it.

    The weights of `initial` count, not their name (`init`). `decay` is left out, for it follows
    from the windows or from `initial`; threads and processes, too: they change the last bits of a
    model, not what it is.
    """
    derived = ("decay", "init")
    settings = {name: value for name, value in as_dict(config).items() if name not in derived}
    settings["initial"] = None if initial is None else model_digest(initial)
    parts = [TRAINING_VERSION, FIT_VERSION, torch.__version__, windows.bank_sha256, windows.sha256]
    return hashlib.sha256(json.dumps([*parts, settings], sort_keys=True).encode()).hexdigest()


def state_sha256(
    config: Settings, windows: Windows, num_processes: int, initial: nn.Module | None = None
) -> str:
    """Return the identity of an unfinished training, to the last bit: threads, processes count."""
    parts = [
        TRAINING_VERSION,
        windows.bank_sha256,
        windows.sha256,
        as_dict(config),
        torch.__version__,
    ]
    parts += [torch.get_num_threads(), num_processes]
    parts += [None if initial is None else model_digest(initial)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
