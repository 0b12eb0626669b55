"""The predictor whose weights a training starts from."""

from torch import nn

from entrypoints._inputs import Inputs
from lvm.models.facts import FREE
from lvm.tracking import alias
from lvm.tracking import versions as registered

KNOWN = ("models:/", "runs:/")


def read_initial(reference: str | None, inputs: Inputs) -> nn.Module | None:
    """Read the predictor `reference`, a version's number among others; None without one.

    Raises ValueError where it cannot be read, is a free predictor, or was made from another bank
    (one that this bank extends is none) or split: val and test rows may be among what it has seen.
    """
    if reference is None:
        return None
    full = f"models:/{alias.NAME}/{reference}" if reference.isdigit() else reference
    if not full.startswith(KNOWN):
        raise ValueError(
            f"init: unknown '{reference}'; give a version's number, models:/{alias.NAME}@<alias>, "
            f"models:/m-<id> or runs:/<run id>/{alias.ARTIFACT}"
        )
    try:
        found = registered.load(full)
    except ValueError as error:
        raise ValueError(f"init: {str(error).removeprefix('model: ')}") from None
    facts, bank, windows = found.facts, inputs.bank, inputs.windows
    if facts.kind == FREE:
        raise ValueError(
            f"init: {full} is a free predictor ({facts.model}), from which no training can start"
        )
    is_own = facts.bank_sha256 in (bank.sha256, *bank.bases)
    if not is_own or (facts.split, facts.seed) != (windows.split, windows.seed):
        raise ValueError(
            f"init: {reference} was trained on bank {facts.bank_sha256[:12]}, split {facts.split} "
            f"of seed {facts.seed}; it may have seen val rows of bank {bank.sha256[:12]}, split "
            f"{windows.split} of seed {windows.seed}; give one of the same bank, split, seed"
        )
    return found.model
