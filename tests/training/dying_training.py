"""A training that kills its own process with SIGKILL, at a read of the bank or a write of state.

Usage: python -m tests.training.dying_training BANK STATE read|write NUMBER
"""

import os
import signal
import sys
from pathlib import Path

import torch

from lvm.bank.bank import Bank, open_bank
from lvm.training.config import TrainConfig
from tests.training.test_loop import TOY, train_toy

# The second half of training has hard negatives; an epoch takes 21 steps.
CONFIG = TrainConfig(
    **(vars(TOY) | {"dropout": 0.2, "accumulation": 2, "epochs": 3, "batch_size": 2})
    | {"hard_negatives": 2, "hard_from": 0.5, "averaging": "swa", "patience": 9}
)
CHECKPOINT_STEPS = 4


class DyingBank(Bank):
    """A bank that allows a number of reads."""

    reads_left = sys.maxsize

    def unit(self, rows):
        DyingBank.reads_left -= 1
        if DyingBank.reads_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().unit(rows)


def die_at_write(path: str, number: int) -> None:
    """Kill the process when the state, written beside it, is about to be put in its place."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event == "os.rename" and str(arguments[1]) == path:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(bank_path: str, state: str, event: str, number: str) -> None:
    torch.set_num_threads(1)
    bank = DyingBank(**vars(open_bank(bank_path)))
    if event == "read":
        DyingBank.reads_left = int(number)
    else:
        die_at_write(state, int(number))
    train_toy(bank, CONFIG, state_path=Path(state), checkpoint_steps=CHECKPOINT_STEPS)


if __name__ == "__main__":
    main(*sys.argv[1:])
