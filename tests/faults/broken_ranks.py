"""A training shared by torchrun's processes: rank 1 alone overflows, all of them spike.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.faults.broken_ranks BANK OUTPUT

Rank 0 writes, for each rank, the sha256 of its final weights, its skipped steps, its returns.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from lvm.bank.bank import open_bank
from lvm.system.distributed import World, joined
from lvm.training.config import TrainConfig
from lvm.training.optimizer import Supervised
from lvm.windows.export import plan_windows
from tests.faults.breakage import Optimizer, after_steps, at_losses, scramble, weights_of
from tests.training.test_loop import TOY, hit_validation, train_toy

CONFIG = TrainConfig(
    **(vars(TOY) | {"batch_size": 2, "max_steps": 112, "patience": 9})
    | {"precision": "fp32", "device": "cpu"}
)
NAN_LOSS, OVERFLOW, SPIKE = 20, 40, 85


def on_rank_1(world: World, change):
    """Return `change`, or nothing to do on other ranks."""
    return change if world.rank == 1 else lambda *parts: parts[-1]


def overflow(optimizer: Optimizer) -> None:
    weights_of(optimizer)[0].view(-1)[0] = math.inf


def no_number(module: Supervised, loss: Tensor) -> Tensor:
    return loss * math.nan


def main(bank_path: str, output: str) -> None:
    torch.set_num_threads(1)
    bank = open_bank(bank_path)
    validate = hit_validation(bank, plan_windows(bank, 20))
    with joined("cpu") as world:
        with (
            at_losses({NAN_LOSS}, on_rank_1(world, no_number)),
            after_steps({OVERFLOW}, on_rank_1(world, overflow)),
            after_steps({SPIKE}, scramble),
        ):
            result = train_toy(bank, CONFIG, world=world, validate=validate)
        digest = hashlib.sha256()
        for value in result.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        found = {"sha256": digest.hexdigest()}
        for name in ("skipped_steps", "rollbacks"):
            found[name] = sum(record[f"train/{name}"] for record in result.history)
        all_found = world.gathered(found)
        if world.is_main:
            Path(output).write_text(json.dumps(all_found))


if __name__ == "__main__":
    main(*sys.argv[1:])
