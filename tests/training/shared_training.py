"""Trainings that torchrun's processes share; rank 0 writes their histories.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.training.shared_training
BANK OUTPUT, with a third word STATE to train one recipe that keeps its state, or, where there is
none yet, has rank 0 killed after the second epoch.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from lvm.bank.bank import open_bank
from lvm.system.distributed import World, joined
from lvm.training.config import TrainConfig
from tests.training.test_loop import TOY, of_recipe, train_toy

# Five windows a batch: two processes never hold the same number of positions.
BASE = TrainConfig(
    **(vars(TOY) | {"batch_size": 5, "accumulation": 2, "epochs": 3, "lr": 0.01})
    | {"precision": "fp32", "device": "cpu", "negatives": 32, "patience": 9}
)
CONFIGS = {
    "dense": BASE,
    "hard": TrainConfig(**(vars(BASE) | {"hard_negatives": 2, "averaging": "swa"})),
    "recomputed": TrainConfig(**(vars(BASE) | {"gradient_checkpointing": True})),
    "seed": of_recipe("seed", BASE),
}


def histories(bank_path: Path, world: World) -> dict[str, list[dict[str, float]]]:
    bank = open_bank(bank_path)
    return {name: train_toy(bank, c, world=world).history for name, c in CONFIGS.items()}


def die_after_two(record: dict[str, float]) -> None:
    if record["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def interrupted(bank_path: Path, state: Path, world: World) -> dict[str, list[dict[str, float]]]:
    on_epoch = (lambda record: None) if state.exists() else die_after_two
    options = {"world": world, "state_path": state, "on_epoch": on_epoch}
    return {"hard": train_toy(open_bank(bank_path), CONFIGS["hard"], **options).history}


if __name__ == "__main__":
    torch.set_num_threads(1)
    bank_argument, output, *state_argument = map(Path, sys.argv[1:])
    with joined("cpu") as joined_world:
        if state_argument:
            found = interrupted(bank_argument, state_argument[0], joined_world)
        else:
            found = histories(bank_argument, joined_world)
        if joined_world.is_main:
            output.write_text(json.dumps(found))
