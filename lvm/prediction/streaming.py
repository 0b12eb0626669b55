"""Streams: predictions after each new vector from a cache, without reading the context again.

A predictor that streams has `begin(context_TD)`, which reads a context in one pass with its chunks
in parallel, then returns the prediction (D,) with a cache; and `step(vector_D, cache)`, which takes
the cache one row on. Shapes: T time, D vector dim.
"""

import copy
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lvm.prediction.contexts import unit_contexts


class Streamable(Protocol):
    """A predictor with a cache."""

    config: dict[str, Any]

    def begin(self, context_TD: Tensor) -> tuple[Tensor, Any]: ...

    def step(self, vector_D: Tensor, cache: Any) -> Tensor: ...


class Stream:
    """Predicts the next vector after each appended one, as `forward` does over the same rows.

    Without `ctx` a stream reads all its rows, however many. With `ctx` it is bounded like a query
    of the evaluation: a row beyond ctx drops the oldest fifth, and the rest is read again in one
    pass, so that a prediction rests on the last 0.8 ctx to ctx rows. Not safe for several threads.
    """

    def __init__(self, model: nn.Module, ctx: int | None = None) -> None:
        if ctx is not None and ctx < 1:
            raise ValueError(f"ctx: {ctx} rows of context; at least 1 is needed")
        self._model = cast(Streamable, laid_out_for_steps(model).eval())
        self._dim = int(self._model.config["dim"])
        weights = model.state_dict().values()
        self._device = next((weight.device for weight in weights), torch.device("cpu"))
        self._ctx = ctx
        self._row_TD = torch.empty(ctx or 0, self._dim)
        self._cache: Any = None
        self.num_rows = 0

    def warm(self, context_TD: ArrayLike) -> NDArray[np.float32]:
        """Start anew with a context (T, D); return the prediction (D,) of its successor.

        Vectors need not be unit. Raises ValueError on another D, no rows, zero or non-finite ones.
        """
        unit_TD = self._unit(np.asarray(context_TD, dtype=np.float32))
        if self._ctx is not None:
            stride = _stride(self._ctx)
            steps = -(-max(0, len(unit_TD) - self._ctx) // stride)
            unit_TD = unit_TD[steps * stride :]
        prediction_D = self._begin(unit_TD)
        if self._ctx is not None:  # only now: a pass that fails leaves the stream as it was
            self._row_TD[: len(unit_TD)] = unit_TD
        return prediction_D

    def append(self, vector_D: ArrayLike) -> NDArray[np.float32]:
        """Return the prediction (D,) of the vector that follows `vector_D`; ValueError as `warm`.

        The first vector of a stream is a context of one row.
        """
        unit_1D = self._unit(np.asarray(vector_D, dtype=np.float32)[None])
        if not self.num_rows:
            return self.warm(unit_1D)
        if self._ctx is not None:
            if self.num_rows == self._ctx:
                return self.warm(torch.cat([self._row_TD, unit_1D]))
            self._row_TD[self.num_rows] = unit_1D[0]
        with torch.inference_mode():
            prediction_D = self._model.step(unit_1D[0].to(self._device), self._cache)
        self.num_rows += 1
        return prediction_D.float().cpu().numpy()

    def _begin(self, unit_TD: Tensor) -> NDArray[np.float32]:
        with torch.inference_mode():
            prediction_D, self._cache = self._model.begin(unit_TD.to(self._device))
        self.num_rows = len(unit_TD)
        return prediction_D.float().cpu().numpy()

    def _unit(self, context_TD: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(unit_contexts(context_TD[None], self._dim)[0])


def open_stream(model: nn.Module, ctx: int | None = None) -> Stream:
    """Return an empty stream of any predictor, in evaluation mode.

    `ctx` bounds the rows that it reads, as the evaluation does; see `Stream`. A stream has its own
    copy of the weights; many streams share one when opened on `laid_out_for_steps(model)`.
    """
    return Stream(model, ctx)


def laid_out_for_steps(model: nn.Module) -> nn.Module:
    """Return a copy whose matrices lie column by column; the model itself where they do.

    The values are the same. A product of such a matrix with one vector is bound by memory, and
    reads 1536 x 512 at 23 GB/s by columns, at 15 by rows, 512 x 1536 at 21, at 18 (torch on one
    AMD EPYC core).
    """
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    if all(weight.t().is_contiguous() for weight in matrices):
        return model
    turned = copy.deepcopy(model)
    for weight in turned.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.t().contiguous().t()
    return turned


def _stride(ctx: int) -> int:
    """Rows by which a context moves on; `plan_readings` of `predict` uses the same grid."""
    return max(1, ctx // 5)
