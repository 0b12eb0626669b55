"""Checks of contexts that come from outside.

Shapes: B batch, T time, D vector dim.
"""

import numpy as np
from numpy.typing import NDArray


def check_contexts(contexts_BTD: NDArray[np.float32], dim: int) -> None:
    """Raise ValueError unless it is a batch (B, T, `dim`) of vectors that have a direction."""
    shape = contexts_BTD.shape
    if contexts_BTD.ndim != 3 or shape[2] != dim:
        raise ValueError(f"contexts: shape {shape} is not (batch, time, {dim})")
    if 0 in shape:
        raise ValueError(f"contexts: shape {shape} is empty; at least one vector is needed")
    if not np.isfinite(contexts_BTD).all():
        raise ValueError("contexts: hold NaN or infinite values; every value must be finite")
    if not contexts_BTD.any(axis=-1).all():
        raise ValueError("contexts: hold a zero vector, which has no direction; drop it")
