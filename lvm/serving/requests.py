"""Formats of a request beyond MLflow's own: packed contexts, the error of a bad request.

Shapes: B batch, T time, D vector dim.
"""

import base64

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray

from lvm.system.errors import one_line

MAX_BYTES = 64 * 2**20  # 43,690 vectors of 384 dims
VALUE = np.dtype("<f4")


def unpack(packed: str, shape_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the contexts (B, T, D) of `packed`: base64 of little-endian float32 in C order.

    Packed contexts take a quarter of their size as JSON numbers. `shape_BTD` is a placeholder
    (B, 1, D) that gives B and D; T follows from the number of bytes. It must be zeros, so that a
    model that does not know `packed` refuses it instead of predicting from it. Raises ValueError
    for another placeholder, and if `packed` is too long, no base64, or no whole vectors for each of
    the B contexts.
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


class Refusal(MlflowException, ValueError):
    """A bad request: a ValueError in the same process; a 400 with its reason over HTTP.

    MLflow's server adds a traceback to its answer for every error that is not MLflow's own.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason), error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """Return the body of the answer without the data, which the server adds to `message`."""
        self.message = str(self)
        return str(super().serialize_as_json())
