"""Contexts as base64 text, a quarter of their size as JSON numbers.

Shapes: B batch, T time, D vector dim.
"""

import base64

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 64 * 2**20  # 43,690 vectors of 384 dims
VALUE = np.dtype("<f4")


def unpack(packed: str, shape_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the contexts (B, T, D) that `packed` holds: base64 of little-endian float32, C order.

    `shape_BTD` is a placeholder (B, 1, D) of zeros, which gives B with D; T is what the bytes fill.
    It must be zeros so that a model that does not know `packed` refuses it, too, rather than answer
    from it. Raises ValueError where it is no such placeholder, where `packed` is too long, no
    base64, or not whole vectors for each of the B contexts.
    """
    if shape_BTD.ndim != 3 or len(shape_BTD) == 0 or shape_BTD.shape[1] != 1 or shape_BTD.any():
        raise ValueError("packed: holds the whole contexts; as inputs give zeros, (batch, 1, dim)")
    if len(packed) > 4 * -(-MAX_BYTES // 3):
        raise ValueError(f"packed: is longer than {MAX_BYTES // 2**20} MiB; send fewer contexts")
    try:
        raw = base64.b64decode(packed, validate=True)
    except ValueError as error:
        raise ValueError(f"packed: is no base64 text ({error})") from None
    batch, _, dim = shape_BTD.shape
    row_bytes = batch * dim * VALUE.itemsize
    if len(raw) % row_bytes:
        raise ValueError(
            f"packed: {len(raw):,} bytes are not float32 values for {batch} x time x {dim}, a "
            f"multiple of {row_bytes:,} bytes"
        )
    return np.frombuffer(raw, VALUE).reshape(batch, -1, dim).astype(np.float32)
