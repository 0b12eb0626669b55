"""The predictor whose weights a training starts from."""

from torch import nn

from entrypoints._inputs import Inputs
from lvm.registry import alias, registered


def read_initial(reference: str | None, inputs: Inputs) -> nn.Module | None:
    """Read the predictor `reference`, a version's number among others; None without one.

    Raises ValueError where it cannot be read, or was made from another bank or split: whatever it
    has seen there, val and test rows of this one may be among it.
    """
    if reference is None:
        return None
    full = f"models:/{alias.NAME}/{reference}" if reference.isdigit() else reference
    found = registered.load(full)
    facts, windows = found.facts, inputs.windows
    own = (windows.bank_sha256, windows.split, windows.seed)
    if (facts.bank_sha256, facts.split, facts.seed) != own:
        raise ValueError(
            f"init: {reference} was trained on bank {facts.bank_sha256[:12]}, split {facts.split} "
            f"of seed {facts.seed}; it may have seen val rows of bank {own[0][:12]}, split "
            f"{own[1]} of seed {own[2]}; give one of the same bank, split, seed"
        )
    return found.model
