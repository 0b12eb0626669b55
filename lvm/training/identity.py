"""What a training depends on, as one hash."""

import hashlib
import json

import torch

from lvm.checkpoint import fits
from lvm.training.recipes import Settings, as_dict
from lvm.windows.planning import Windows

VERSION = 1  # raised whenever equal settings train another model from the same rows


def training_sha256(config: Settings, windows: Windows) -> str:
    """Return the identity of a training: settings, bank, windows, versions of what computes it.

    `decay` is left out, for it follows from the windows. Threads and processes are left out, too:
    they change the last bits of a model, not what it is.
    """
    settings = {name: value for name, value in as_dict(config).items() if name != "decay"}
    parts = [VERSION, fits.VERSION, torch.__version__, windows.bank_sha256, windows.sha256]
    return hashlib.sha256(json.dumps([*parts, settings], sort_keys=True).encode()).hexdigest()
