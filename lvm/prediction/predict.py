"""The one way from a predictor to predicted vectors, for training, evaluation or serving.

A predictor that streams has `begin(context_TD)`, which reads a context in one pass and returns the
prediction (D,) with a cache; and `step(vector_D, cache)`, which advances the cache by one row.

Shapes: B batch, T time, D vector dim, Q queries, R readings, X experts.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lvm.bank.store import Bank
from lvm.models.tmd_experts import TMDExperts, top_gates
from lvm.system.progress import add_products, count_products, steps
from lvm.system.seeding import generator
from lvm.windows.planning import Queries

POSITIONS_PER_PASS = 16_000


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


@dataclass(frozen=True)
class Readings:
    """Passes over bank rows that answer queries: reading r covers num_rows from first_row.

    Query q is answered by position `position_Q[q]` of reading `reading_Q[q]`.
    """

    first_row_R: NDArray[np.int64]
    num_rows_R: NDArray[np.int64]
    reading_Q: NDArray[np.int64]
    position_Q: NDArray[np.int64]


def plan_readings(queries: Queries, context_rows: int | None = None) -> Readings:
    """Share passes among neighbouring queries, so that a pass answers up to ctx / 5 of them.

    A reading starts on a grid of ctx / 5 rows from the sequence's start. A query is therefore read
    with all of its context while that is shorter than ctx, and with its last 0.8 ctx rows or more
    otherwise; never with a row outside of its context. With `context_rows` below ctx, for a
    predictor that looks at no more of them, each query is read with exactly these.
    """
    stride = max(1, queries.ctx // 5)
    if context_rows is not None and context_rows < queries.ctx:
        queries, stride = queries.with_ctx(context_rows), 1
    history_Q = queries.target_row_Q - queries.sequence_start_Q
    steps_Q = -(-np.maximum(history_Q - queries.ctx, 0) // stride)
    start_Q = queries.sequence_start_Q + steps_Q * stride
    first_row_R, reading_Q = np.unique(start_Q, return_inverse=True)
    position_Q = queries.target_row_Q - 1 - start_Q
    num_rows_R = np.zeros(len(first_row_R), dtype=np.int64)
    np.maximum.at(num_rows_R, reading_Q, position_Q + 1)
    return Readings(first_row_R, num_rows_R, reading_Q, position_Q)


def predict_queries(model: nn.Module, bank: Bank, queries: Queries) -> NDArray[np.float32]:
    """Return the predicted unit vector (Q, D) of each query, in the order of `queries`."""
    return _answers(model, bank, plan_readings(queries, context_rows(model)))


def predict_routed(
    model: TMDExperts, bank: Bank, queries: Queries
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what `predict_queries` does, with the weight of each expert (Q, X); one pass.

    The model has a gate.
    """
    readings, num_more = plan_readings(queries), model.head.experts
    both_QV = _answers(WithGates(model), bank, readings, num_more=num_more)
    return both_QV[:, : bank.dim].copy(), both_QV[:, bank.dim :].copy()


class WithGates(nn.Module):
    """Returns predictions beside the weights of the experts, (B, T, D + X)."""

    def __init__(self, model: TMDExperts) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, context_BTD: Tensor) -> Tensor:
        prediction_BTD, logit_BTX = self.model.routed(context_BTD)
        assert logit_BTX is not None, "one expert has no gate"
        return torch.cat([prediction_BTD, top_gates(logit_BTX)], dim=-1)


def predict_shuffled(
    model: nn.Module, bank: Bank, queries: Queries, seed: int
) -> NDArray[np.float32]:
    """Return predictions (Q, D) from contexts whose rows are permuted, the last one kept.

    The rows of a query are those that `predict_queries` reads for it; the permutation is drawn by
    `seed` with the target row, whatever other queries there are. No pass is shared.
    """
    shared = plan_readings(queries, context_rows(model))
    alone_R = np.arange(len(queries))
    first_row_R = shared.first_row_R[shared.reading_Q]
    alone = Readings(first_row_R, shared.position_Q + 1, alone_R, shared.position_Q)
    shuffles = {
        reading: generator(seed, f"shuffled context {target_row}")
        for reading, target_row in enumerate(queries.target_row_Q.tolist())
    }
    return _answers(model, bank, alone, shuffles)


def context_rows(model: nn.Module) -> int | None:
    """Return how many of the last rows the predictor looks at; None where it looks at all."""
    return getattr(model, "context_rows", None)


def on_train_rows(model: nn.Module) -> nn.Module:
    """Return the predictor to ask about train rows: one that stores such rows must not see them."""
    blind = getattr(model, "on_train_rows", None)
    return model if blind is None else blind()


def _answers(
    model: nn.Module,
    bank: Bank,
    readings: Readings,
    shuffles: Mapping[int, np.random.Generator] | None = None,
    num_more: int = 0,
) -> NDArray[np.float32]:
    """Run the readings, the longer ones first, some POSITIONS_PER_PASS positions at a time.

    `num_more` are the columns that the model returns beside those of a vector.
    """
    prediction_QD = np.empty((len(readings.reading_Q), bank.dim + num_more), dtype=np.float32)
    order_R = np.argsort(readings.num_rows_R, kind="stable")
    by_reading_Q = np.argsort(readings.reading_Q, kind="stable")
    bounds = np.searchsorted(readings.reading_Q[by_reading_Q], np.arange(len(order_R) + 1))
    per_pass = max(1, POSITIONS_PER_PASS // int(readings.num_rows_R.max(initial=1)))
    starts = range(0, len(order_R), per_pass)
    a_position = None  # operations a position, counted in the last pass, whose readings are longest
    for begin in steps(reversed(starts), "predict", "passes", len(starts)):
        chosen_R = order_R[begin : begin + per_pass]
        context_RTD = _contexts(bank, readings, chosen_R, shuffles or {})
        num_positions = context_RTD.shape[0] * context_RTD.shape[1]
        if a_position is None:
            forward = partial(_forward, model, context_RTD)
            prediction_RTD, operations = count_products(forward)
            a_position = operations / num_positions
        else:
            prediction_RTD = _forward(model, context_RTD)
        add_products(a_position * num_positions)
        for place, reading in enumerate(chosen_R):
            answered_Q = by_reading_Q[bounds[reading] : bounds[reading + 1]]
            prediction_QD[answered_Q] = prediction_RTD[place, readings.position_Q[answered_Q]]
    return prediction_QD


def predict_contexts(model: nn.Module, context_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the predicted unit vector (B, D) that follows each context (B, T, D) of unit rows."""
    num_rows = context_rows(model) or context_BTD.shape[1]
    return _forward(model, context_BTD[:, -num_rows:])[:, -1]


def _contexts(
    bank: Bank,
    readings: Readings,
    chosen_R: NDArray[np.int64],
    shuffles: Mapping[int, np.random.Generator],
) -> NDArray[np.float32]:
    """Read the rows (R, T, D); shorter ones are padded at the end, where nothing causal looks."""
    longest = int(readings.num_rows_R[chosen_R].max())
    context_RTD = np.zeros((len(chosen_R), longest, bank.dim), dtype=np.float32)
    for place, reading in enumerate(chosen_R):
        first, count = int(readings.first_row_R[reading]), int(readings.num_rows_R[reading])
        context_RTD[place, :count] = bank.unit(slice(first, first + count))
        if reading in shuffles:
            shuffles[reading].shuffle(context_RTD[place, : count - 1])
    return context_RTD


def _forward(model: nn.Module, context_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    was_training = model.training
    model.eval()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    with torch.inference_mode():
        prediction_BTD: Tensor = model(torch.from_numpy(context_BTD).to(device))
    model.train(was_training)
    return prediction_BTD.float().cpu().numpy()


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
