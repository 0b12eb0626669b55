"""Shared passes answer each query as if its context were read alone."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lvm.bank.bank import Bank
from lvm.models.predict import (
    plan_readings,
    predict_contexts,
    predict_queries,
    predict_routed,
    predict_shuffled,
)
from lvm.models.table import build_model
from lvm.windows.export import plan_windows
from tests.models.test_models import TOY_SIZES


@pytest.mark.parametrize("ctx", [2, 5, 20, 50, 239])
def test_readings_stay_inside_the_context_and_use_most_of_it(tiny_bank: Bank, ctx: int) -> None:
    queries = plan_windows(tiny_bank, ctx).queries["test"]
    readings = plan_readings(queries)
    start_Q = readings.first_row_R[readings.reading_Q]
    assert np.array_equal(start_Q + readings.position_Q + 1, queries.target_row_Q)
    assert (start_Q >= queries.first_row_Q).all()
    read_Q = readings.position_Q + 1
    allowed_Q = queries.target_row_Q - queries.first_row_Q
    assert (read_Q > 0.8 * allowed_Q - 1).all()
    assert (readings.position_Q < readings.num_rows_R[readings.reading_Q]).all()


@pytest.mark.parametrize("name", ["ema", "context-mean", "memory_gru"])
def test_shared_passes_equal_contexts_read_alone(tiny_bank: Bank, name: str) -> None:
    queries = plan_windows(tiny_bank, 20).queries["test"].head(40)
    sizes = TOY_SIZES.get(name, {})
    model = build_model({"model": name, "dim": tiny_bank.dim} | sizes)
    prediction_QD = predict_queries(model, tiny_bank, queries)
    readings = plan_readings(queries)
    for q, target_row in enumerate(queries.target_row_Q):
        first = int(readings.first_row_R[readings.reading_Q[q]])
        context_1TD = tiny_bank.unit(slice(first, int(target_row)))[None]
        alone_1D = predict_contexts(model, context_1TD)
        np.testing.assert_allclose(prediction_QD[q], alone_1D[0], atol=2e-6)


def test_predictions_follow_the_order_of_the_queries(tiny_bank: Bank) -> None:
    queries = plan_windows(tiny_bank, 20).queries["test"]
    model = build_model({"model": "ema", "dim": tiny_bank.dim})
    forward = predict_queries(model, tiny_bank, queries)
    backward = predict_queries(model, tiny_bank, queries.take(slice(None, None, -1)))
    np.testing.assert_allclose(forward[::-1], backward, atol=1e-6)


class LastRows(nn.Module):
    """Predicts the mean of the last `context_rows` vectors; counts the positions it was asked."""

    def __init__(self, rows: int, says_so: bool) -> None:
        super().__init__()
        self.rows, self.num_positions = rows, 0
        if says_so:
            self.context_rows = rows

    def forward(self, context_BTD: Tensor) -> Tensor:
        self.num_positions += context_BTD.shape[0] * context_BTD.shape[1]
        sum_BTD = context_BTD.cumsum(dim=1)
        sum_BTD[:, self.rows :] -= sum_BTD[:, : -self.rows].clone()
        return nn.functional.normalize(sum_BTD, dim=-1)


@pytest.mark.parametrize("rows", [1, 2, 10, 11])
def test_only_the_rows_that_a_predictor_looks_at_are_read(tiny_bank: Bank, rows: int) -> None:
    queries = plan_windows(tiny_bank, 50).queries["test"]
    short, long = LastRows(rows, True), LastRows(rows, False)
    found_QD = predict_queries(short, tiny_bank, queries)
    np.testing.assert_allclose(found_QD, predict_queries(long, tiny_bank, queries), atol=2e-6)
    assert short.num_positions <= rows * len(queries)
    context_BTD = tiny_bank.unit(np.arange(40).reshape(2, 20))
    short.num_positions = 0
    alone_BD = predict_contexts(short, context_BTD)
    np.testing.assert_allclose(alone_BD, predict_contexts(long, context_BTD), atol=2e-6)
    assert short.num_positions == 2 * rows


class Recorder(nn.Module):
    """Predicts the last row; keeps the rows (B, T, D) of its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[Tensor] = []

    def forward(self, context_BTD: Tensor) -> Tensor:
        self.passes.append(context_BTD)
        return context_BTD


def test_a_shuffled_context_holds_the_same_rows_with_the_last_one_last(tiny_bank: Bank) -> None:
    queries = plan_windows(tiny_bank, 20).queries["test"].head(12)
    readings = plan_readings(queries)
    recorder = Recorder()
    prediction_QD = predict_shuffled(recorder, tiny_bank, queries, seed=0)
    np.testing.assert_array_equal(prediction_QD, tiny_bank.unit(queries.target_row_Q - 1))
    passed = torch.cat([one.flatten(0, 1) for one in recorder.passes]).numpy()
    first_row_Q = readings.first_row_R[readings.reading_Q]
    spans = zip(first_row_Q.tolist(), queries.target_row_Q.tolist(), strict=True)
    expected = np.concatenate([tiny_bank.unit(slice(*span)) for span in spans])
    passed = passed[passed.any(axis=1)]
    assert not np.array_equal(passed, expected)
    assert sorted(map(bytes, passed)) == sorted(map(bytes, expected))


def test_a_shuffle_belongs_to_its_query_and_seed(tiny_bank: Bank) -> None:
    queries = plan_windows(tiny_bank, 20).queries["test"].head(12)
    model = build_model({"model": "ema", "dim": tiny_bank.dim, "decay": 0.9})
    whole_QD = predict_shuffled(model, tiny_bank, queries, seed=0)
    part_QD = predict_shuffled(model, tiny_bank, queries.take(slice(8, 3, -1)), seed=0)
    np.testing.assert_allclose(part_QD, whole_QD[8:3:-1], atol=1e-6)
    other_QD = predict_shuffled(model, tiny_bank, queries, seed=1)
    assert (np.abs(other_QD - whole_QD).max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("training", [False, True])
def test_gates_come_with_the_predictions_of_the_same_pass(tiny_bank: Bank, training: bool) -> None:
    queries = plan_windows(tiny_bank, 20).queries["test"]
    sizes = {"model": "tmd_experts", "dim": tiny_bank.dim} | TOY_SIZES["tmd_experts"]
    model = build_model(sizes).train(training)
    prediction_QD, gate_QX = predict_routed(model, tiny_bank, queries)
    assert np.array_equal(prediction_QD, predict_queries(model, tiny_bank, queries))
    assert model.training == model.head.training == training
    assert gate_QX.shape == (len(queries), 4)
    np.testing.assert_allclose(gate_QX.sum(axis=1), 1, rtol=1e-6)
    assert ((gate_QX > 0).sum(axis=1) == 2).all()
