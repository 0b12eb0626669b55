"""Shared passes answer each query as if its context were read alone."""

import numpy as np
import pytest

from lvm.bank import Bank
from lvm.prediction import plan_readings, predict_contexts, predict_queries
from lvm.windows import plan_windows
from tests.test_models import TOY_SIZES, build_model


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
