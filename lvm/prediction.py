"""The one way from a predictor to predicted vectors, for training, evaluation or serving.

Shapes: B batch, T time, D vector dim, Q queries, R readings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lvm.bank import Bank
from lvm.windows import Queries

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


def plan_readings(queries: Queries) -> Readings:
    """Share passes among neighbouring queries, so that a pass answers up to ctx / 5 of them.

    A reading starts on a grid of ctx / 5 rows from the sequence's start. A query is therefore read
    with all of its context while that is shorter than ctx, and with its last 0.8 ctx rows or more
    otherwise; never with a row outside of its context.
    """
    stride = max(1, queries.ctx // 5)
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
    readings = plan_readings(queries)
    prediction_QD = np.empty((len(queries), bank.dim), dtype=np.float32)
    order_R = np.argsort(readings.num_rows_R, kind="stable")
    by_reading_Q = np.argsort(readings.reading_Q, kind="stable")
    bounds = np.searchsorted(readings.reading_Q[by_reading_Q], np.arange(len(order_R) + 1))
    per_pass = max(1, POSITIONS_PER_PASS // queries.ctx)
    starts = range(0, len(order_R), per_pass)
    for begin in tqdm(
        starts, desc="predict", unit="pass", disable=None if progress else True, leave=False
    ):
        chosen_R = order_R[begin : begin + per_pass]
        prediction_RTD = _read(model, bank, readings, chosen_R)
        for place, reading in enumerate(chosen_R):
            answered_Q = by_reading_Q[bounds[reading] : bounds[reading + 1]]
            prediction_QD[answered_Q] = prediction_RTD[place, readings.position_Q[answered_Q]]
    return prediction_QD


def predict_contexts(model: nn.Module, context_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the predicted unit vector (B, D) that follows each context (B, T, D) of unit rows."""
    return _forward(model, context_BTD)[:, -1]


def _read(
    model: nn.Module, bank: Bank, readings: Readings, chosen_R: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Run one pass over readings, shorter ones padded at the end, where nothing causal looks."""
    longest = int(readings.num_rows_R[chosen_R].max())
    context_RTD = np.zeros((len(chosen_R), longest, bank.dim), dtype=np.float32)
    for place, reading in enumerate(chosen_R):
        first, count = int(readings.first_row_R[reading]), int(readings.num_rows_R[reading])
        context_RTD[place, :count] = bank.unit(slice(first, first + count))
    return _forward(model, context_RTD)


def _forward(model: nn.Module, context_BTD: NDArray[np.float32]) -> NDArray[np.float32]:
    was_training = model.training
    model.eval()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    with torch.inference_mode():
        prediction_BTD: Tensor = model(torch.from_numpy(context_BTD).to(device))
    model.train(was_training)
    return prediction_BTD.float().cpu().numpy()
