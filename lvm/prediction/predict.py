"""The one way from a predictor to predicted vectors, for training, evaluation or serving.

Shapes: B batch, T time, D vector dim, Q queries, R readings, X experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lvm.bank.store import Bank
from lvm.models.tmd_experts import TMDExperts, top_gates
from lvm.system.seeding import generator
from lvm.windows.queries import Queries

POSITIONS_PER_PASS = 16_000


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


def predict_queries(
    model: nn.Module, bank: Bank, queries: Queries, progress: bool = False
) -> NDArray[np.float32]:
    """Return the predicted unit vector (Q, D) of each query, in the order of `queries`."""
    return _answers(model, bank, plan_readings(queries, context_rows(model)), progress)


def predict_routed(
    model: TMDExperts, bank: Bank, queries: Queries, progress: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what `predict_queries` does, with the weight of each expert (Q, X); one pass.

    The model has a gate.
    """
    readings, num_more = plan_readings(queries), model.head.experts
    both_QV = _answers(WithGates(model), bank, readings, progress, num_more=num_more)
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
    return _answers(model, bank, alone, True, shuffles)


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
    progress: bool = False,
    shuffles: Mapping[int, np.random.Generator] | None = None,
    num_more: int = 0,
) -> NDArray[np.float32]:
    """Run the readings, the shorter ones first, some POSITIONS_PER_PASS positions at a time.

    `num_more` are the columns that the model returns beside those of a vector.
    """
    prediction_QD = np.empty((len(readings.reading_Q), bank.dim + num_more), dtype=np.float32)
    order_R = np.argsort(readings.num_rows_R, kind="stable")
    by_reading_Q = np.argsort(readings.reading_Q, kind="stable")
    bounds = np.searchsorted(readings.reading_Q[by_reading_Q], np.arange(len(order_R) + 1))
    per_pass = max(1, POSITIONS_PER_PASS // int(readings.num_rows_R.max(initial=1)))
    starts = range(0, len(order_R), per_pass)
    for begin in tqdm(
        starts, desc="predict", unit="pass", disable=None if progress else True, leave=False
    ):
        chosen_R = order_R[begin : begin + per_pass]
        prediction_RTD = _forward(model, _contexts(bank, readings, chosen_R, shuffles or {}))
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
