"""What a training depends on, as one hash."""

import hashlib
import json

import torch
from torch import nn

from lvm.models import fits
from lvm.training.config import Settings, as_dict
from lvm.windows.planning import Windows

VERSION = 3  # raised whenever equal settings train another model from the same rows


def training_sha256(config: Settings, windows: Windows, initial: nn.Module | None = None) -> str:
    """Return the identity of a training: settings, bank, windows, versions of what computes it.

    The weights of `initial` count, not their name (`init`). `decay` is left out, for it follows
    from the windows or from `initial`; threads and processes, too: they change the last bits of a
    model, not what it is.
    """
    derived = ("decay", "init")
    settings = {name: value for name, value in as_dict(config).items() if name not in derived}
    settings["initial"] = None if initial is None else fits.model_digest(initial)
    parts = [VERSION, fits.VERSION, torch.__version__, windows.bank_sha256, windows.sha256]
    return hashlib.sha256(json.dumps([*parts, settings], sort_keys=True).encode()).hexdigest()


def state_sha256(
    config: Settings, windows: Windows, num_processes: int, initial: nn.Module | None = None
) -> str:
    """Return the identity of an unfinished training, to the last bit: threads, processes count."""
    parts = [VERSION, windows.bank_sha256, windows.sha256, as_dict(config), torch.__version__]
    parts += [torch.get_num_threads(), num_processes]
    parts += [None if initial is None else fits.model_digest(initial)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
