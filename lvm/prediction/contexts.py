"""Contexts that come from outside, checked, of unit length.

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


def unit_contexts(contexts_BTD: NDArray[np.floating], dim: int) -> NDArray[np.float32]:
    """Return contexts (B, T, `dim`) with vectors of unit length; raises as `check_contexts` does.

    They are scaled by powers of two first, which is exact: no square of a float32 overflows then.
    """
    if contexts_BTD.dtype == object:
        raise ValueError("contexts: are of several lengths; send contexts of one length together")
    contexts_BTD = np.asarray(contexts_BTD, np.float32)
    check_contexts(contexts_BTD, dim)
    _, exponent_BT1 = np.frexp(np.abs(contexts_BTD).max(axis=-1, keepdims=True))
    scaled_BTD = np.ldexp(contexts_BTD, -exponent_BT1)
    return scaled_BTD / np.linalg.norm(scaled_BTD, axis=-1, keepdims=True)
