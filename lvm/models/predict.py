"""Predict the next vector of contexts, in batches or as a stream.

Training, evaluation and serving all use these functions. A predictor that streams has
`begin(context_TD)`, which reads a context in one pass and returns the prediction (D,) with a cache,
and `step(vector_D, cache)`, which advances the cache by one row.

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

from lvm.bank.bank import Bank, SharedBank, share_rows
from lvm.models.tmd_experts import TMDExperts, top_gates
from lvm.system.progress import add_products, count_products, steps
from lvm.system.seeding import generator
from lvm.windows.planning import Queries, first_read

POSITIONS_PER_PASS = 16_000
LEAST_POSITIONS = 64  # a shorter reading counts as so many, since a memory has a size of its own


def check_contexts(contexts_BTD: NDArray[np.float32], dim: int) -> None:
    """Raise ValueError unless contexts are a batch (B, T, `dim`) of finite, nonzero vectors."""
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
    """Return contexts (B, T, `dim`) scaled to unit vectors; raises as `check_contexts` does.

    Vectors are first scaled by powers of two, which is exact and keeps float32 squares from
    overflowing.
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
    """Forward passes that answer queries: reading r covers num_rows bank rows from first_row on.

    Query q is answered by position `position_Q[q]` of reading `reading_Q[q]`.
    """

    first_row_R: NDArray[np.int64]
    num_rows_R: NDArray[np.int64]
    reading_Q: NDArray[np.int64]
    position_Q: NDArray[np.int64]


def plan_readings(queries: Queries, context_rows: int | None = None) -> Readings:
    """Plan passes that answer up to ctx / 5 neighbouring queries each.

    A reading starts on a grid of ctx / 5 rows, counted from the start of the sequence: at the
    `first_read` row of what stands before a query in its sequence. If the predictor uses at most
    `context_rows` < ctx rows, each query is read with exactly these.
    """
    history_Q = queries.target_row_Q - queries.sequence_start_Q
    if context_rows is not None and context_rows < queries.ctx:
        skipped_Q = np.maximum(history_Q - context_rows, 0)
    else:
        skipped_Q = first_read(history_Q, queries.ctx)
    start_Q = queries.sequence_start_Q + skipped_Q
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
    """Return the result of `predict_queries` and the weight of each expert (Q, X), in one pass.

    The model must have a gate.
    """
    readings, num_more = plan_readings(queries), model.head.experts
    both_QV = _answers(WithGates(model), bank, readings, num_more=num_more)
    return both_QV[:, : bank.dim].copy(), both_QV[:, bank.dim :].copy()


class WithGates(nn.Module):
    """Returns predictions with the weights of the experts appended, (B, T, D + X)."""

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
    """Return predictions (Q, D) from contexts with permuted rows; the last row stays last.

    A query is read with the same rows as in `predict_queries`. `seed` and the target row determine
    the permutation, independent of the other queries. Queries share no passes.
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
    """Return how many of the last rows the predictor uses; None if it uses all."""
    return getattr(model, "context_rows", None)


def on_train_rows(model: nn.Module) -> nn.Module:
    """Return the predictor to use on train rows; one that stores train rows skips them."""
    blind = getattr(model, "on_train_rows", None)
    return model if blind is None else blind()


def _answers(
    model: nn.Module,
    bank: Bank,
    readings: Readings,
    shuffles: Mapping[int, np.random.Generator] | None = None,
    num_more: int = 0,
) -> NDArray[np.float32]:
    """Run the readings, longer ones first, about POSITIONS_PER_PASS positions per pass.

    `num_more` is the number of columns that the model returns beyond the vector.
    """
    prediction_QD = np.empty((len(readings.reading_Q), bank.dim + num_more), dtype=np.float32)
    task = _PassTask(model, SharedBank(bank), readings, shuffles or {})
    for answers in share_rows(bank, task):
        for answered_Q, predicted in answers:
            prediction_QD[answered_Q] = predicted
    return prediction_QD


@dataclass(frozen=True)
class _PassTask:
    """The passes of a predictor over its readings; each process makes every `size`-th one.

    A pass has the same readings however many processes there are, and so the same result.
    """

    model: nn.Module
    bank: SharedBank
    readings: Readings
    shuffles: Mapping[int, np.random.Generator]

    def run(self, rank: int, size: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Return the queries that are answered, with the answers, of each pass."""
        readings, bank = self.readings, self.bank.bank
        order_R = np.argsort(readings.num_rows_R, kind="stable")
        by_reading_Q = np.argsort(readings.reading_Q, kind="stable")
        bounds = np.searchsorted(readings.reading_Q[by_reading_Q], np.arange(len(order_R) + 1))
        longest = int(readings.num_rows_R.max(initial=1))
        per_pass = max(1, POSITIONS_PER_PASS // max(longest, LEAST_POSITIONS))
        starts = range(0, len(order_R), per_pass)[::-1][rank::size]
        answers = []
        # Operations a position, counted in the first pass, which has the longest readings.
        a_position = None
        for begin in steps(starts, "predict", "passes", len(starts)):
            chosen_R = order_R[begin : begin + per_pass]
            context_RTD = _contexts(bank, readings, chosen_R, self.shuffles)
            num_positions = context_RTD.shape[0] * context_RTD.shape[1]
            if a_position is None:
                forward = partial(_forward, self.model, context_RTD)
                prediction_RTD, operations = count_products(forward)
                a_position = operations / num_positions
            else:
                prediction_RTD = _forward(self.model, context_RTD)
            add_products(a_position * num_positions)
            for place, reading in enumerate(chosen_R):
                answered_Q = by_reading_Q[bounds[reading] : bounds[reading + 1]]
                position_Q = readings.position_Q[answered_Q]
                answers.append((answered_Q, prediction_RTD[place, position_Q]))
        return answers


def predict_contexts(
    model: nn.Module, context_BTD: NDArray[np.float32], ctx: int | None = None
) -> NDArray[np.float32]:
    """Return the predicted unit vector (B, D) that follows each context (B, T, D) of unit rows.

    With `ctx`, contexts are read from their row `first_read` on.
    """
    if ctx is not None:
        context_BTD = context_BTD[:, first_read(context_BTD.shape[1], ctx) :]
    num_rows = context_rows(model) or context_BTD.shape[1]
    return _forward(model, context_BTD[:, -num_rows:])[:, -1]


def _contexts(
    bank: Bank,
    readings: Readings,
    chosen_R: NDArray[np.int64],
    shuffles: Mapping[int, np.random.Generator],
) -> NDArray[np.float32]:
    """Return the rows (R, T, D), padded at the end, where causal models do not look."""
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
    """A predictor with `begin` and `step`."""

    config: dict[str, Any]

    def begin(self, context_TD: Tensor) -> tuple[Tensor, Any]: ...

    def step(self, vector_D: Tensor, cache: Any) -> Tensor: ...


class Stream:
    """Predicts the next vector after each appended one; equals `forward` over the same rows.

    Without `ctx` a stream uses all its rows. With `ctx` it is bounded like a query of the
    evaluation: a row beyond ctx drops the oldest fifth, and the remaining rows are read again in
    one pass, so a prediction uses the last 0.8 ctx to ctx rows. Not thread-safe.
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
        """Restart with a context (T, D); return the prediction (D,) of its successor.

        Vectors need not have unit length. Raises ValueError for another D, no rows, zero or
        non-finite vectors.
        """
        unit_TD = self._unit(np.asarray(context_TD, dtype=np.float32))
        if self._ctx is not None:
            unit_TD = unit_TD[first_read(len(unit_TD), self._ctx) :]
        prediction_D = self._begin(unit_TD)
        if (
            self._ctx is not None
        ):  # after the pass, so that a failed pass leaves the stream unchanged
            self._row_TD[: len(unit_TD)] = unit_TD
        return prediction_D

    def append(self, vector_D: ArrayLike) -> NDArray[np.float32]:
        """Return the prediction (D,) of the vector that follows `vector_D`; raises as `warm` does.

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

    `ctx` bounds the rows that it uses, see `Stream`. A stream has its own copy of the weights;
    streams opened on the same `laid_out_for_steps(model)` share one copy.
    """
    return Stream(model, ctx)


def laid_out_for_steps(model: nn.Module) -> nn.Module:
    """Return a copy with column-major matrices; the model itself if its matrices are so already.

    The values are the same. A matrix-vector product is bound by memory: a 1536 x 512 matrix is read
    at 23 GB/s by columns and 15 by rows, a 512 x 1536 matrix at 21 and 18 (torch, one AMD EPYC
    core).
    """
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    if all(weight.t().is_contiguous() for weight in matrices):
        return model
    turned = copy.deepcopy(model)
    for weight in turned.parameters():
        if weight.ndim == 2:
            weight.data = weight.data.t().contiguous().t()
    return turned
