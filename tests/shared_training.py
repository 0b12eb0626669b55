"""A training that torchrun's processes share; rank 0 writes the histories of all recipes.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.shared_training BANK OUTPUT
"""

import json
import sys
from pathlib import Path

import torch

from lvm.bank import open_bank
from lvm.distributed import World, joined
from lvm.recipes import TrainConfig
from tests.test_training import TOY, train_toy

# Five windows a batch: two processes never hold the same number of positions.
BASE = TrainConfig(
    **(vars(TOY) | {"batch_size": 5, "accumulation": 2, "epochs": 3, "lr": 0.01})
    | {"precision": "fp32", "device": "cpu", "negatives": 32, "patience": 9}
)
CONFIGS = {
    "dense": BASE,
    "hard": TrainConfig(**(vars(BASE) | {"hard_negatives": 2, "averaging": "swa"})),
    "recomputed": TrainConfig(**(vars(BASE) | {"gradient_checkpointing": True})),
    "seed": TrainConfig(**(vars(BASE) | {"recipe": "seed"})),
}


def histories(bank_path: Path, world: World) -> dict[str, list[dict[str, float]]]:
    bank = open_bank(bank_path)
    return {name: train_toy(bank, c, world=world).history for name, c in CONFIGS.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined("cpu") as joined_world:
        found = histories(Path(sys.argv[1]), joined_world)
        if joined_world.is_main:
            Path(sys.argv[2]).write_text(json.dumps(found))
