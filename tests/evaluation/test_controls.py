"""Controls show what was planted: a need for context, its order, a direction of time."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from torch import Tensor, nn

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation import controls
from lvm.evaluation.controls import Questions, longest_beaten, mirrored, run_controls
from lvm.evaluation.evaluate import evaluate
from lvm.evaluation.free_predictors import fit_ridge
from lvm.evaluation.metrics import hit_at
from lvm.models.baselines import ContextMean, CopyLast, MovingAverage, ridge_features
from lvm.models.predict import predict_queries
from lvm.report.evaluation import controls_table
from lvm.system.seeding import generator
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows
from tests import reference
from tests.synthetic import rotation, rotation_bank

pytestmark = pytest.mark.slow

LAG, DIM, CTX = 10, 16, 30
SHAPE = (4, 40, 6)  # sequences, documents, rows of a document


def written(path: Path, vector_ND: np.ndarray) -> Bank:
    """Write vectors as SHAPE says."""
    sequences, documents, rows = SHAPE
    names = [
        (f"sequence-{sequence}", f"document-{document}")
        for sequence in range(sequences)
        for document in range(documents)
        for _ in range(rows)
    ]
    table = pd.DataFrame(names, columns=["sequence", "document"])
    unit_ND = vector_ND / np.linalg.norm(vector_ND, axis=1, keepdims=True)
    return write_bank(path, unit_ND, table, "synthetic", "test_controls", "float32")


@pytest.fixture(scope="module")
def lag_bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Each row is a rotation of the row LAG places before it, the first ones are random."""
    random, matrix_DD = generator(0, "lag"), rotation(DIM)
    vector_ND = random.standard_normal((np.prod(SHAPE), DIM))
    for row in range(len(vector_ND)):
        if row % (SHAPE[1] * SHAPE[2]) >= LAG:
            vector_ND[row] = matrix_DD @ vector_ND[row - LAG]
    return written(tmp_path_factory.mktemp("lag") / "bank", vector_ND)


class Lagged(nn.Module):
    """Predicts the rotation of the row LAG - 1 places back, the last row where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix_DD", torch.from_numpy(rotation(DIM)).float())

    def forward(self, context_BTD: Tensor) -> Tensor:
        prediction_BTD = context_BTD.clone()
        prediction_BTD[:, LAG - 1 :] = context_BTD[:, : 1 - LAG or None] @ self.matrix_DD.T
        return prediction_BTD


def measured(model: nn.Module, bank: Bank, windows: Windows) -> dict:
    queries = windows.queries["test"]
    asked = Questions(bank, windows, queries)
    (rank_Q,) = asked.ranks(predict_queries(model, bank, queries))
    return run_controls(model, bank, windows, queries, rank_Q)


@pytest.fixture(scope="module")
def lagged(lag_bank: Bank) -> dict:
    return measured(Lagged(), lag_bank, plan_windows(lag_bank, CTX))


def test_context_pays_exactly_as_far_as_the_predictor_needs_it(lagged: dict):
    hits = {entry["ctx"]: entry["hit_at_5"] for entry in lagged["context"]}
    assert list(hits) == [1, 5, 20, CTX]
    assert hits[20] == hits[CTX] > 0.9 > 0.2 > hits[5] >= hits[1] - 0.05
    for entry in lagged["context"][:-1]:
        difference = entry["hit_at_5_difference"]
        assert difference["mean"] == pytest.approx(entry["hit_at_5"] - hits[CTX])
        assert (difference["high"] < 0) == (entry["ctx"] < LAG)
        assert entry["p_holm"] >= difference["p_value"]
    beaten = longest_beaten(lagged)
    assert beaten is not None and beaten["ctx"] == 5
    shown = controls_table(lagged, leaky=False)
    assert "Context helps beyond 5 rows" in shown
    assert "LEAKY" in controls_table(lagged, leaky=True)


def test_a_shuffled_context_is_useless_where_order_matters(lagged: dict):
    assert lagged["shuffled"]["ordered"]["hit_at_5"] > 0.9
    assert lagged["shuffled"]["hit_at_5"] < 0.3
    assert lagged["shuffled"]["hit_at_5_difference"]["high"] < 0


def test_no_context_is_needed_where_only_the_last_row_counts(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, CTX)
    report = measured(CopyLast(DIM), tiny_bank, windows)
    assert longest_beaten(report) is None
    assert "Context is not shown to help" in controls_table(report, leaky=False)
    for entry in [*report["context"][:-1], report["shuffled"]]:
        difference = entry["hit_at_5_difference"]
        assert (difference["mean"], difference["p_value"]) == (0, 1)


def test_order_is_nothing_to_a_mean(tiny_bank: Bank):
    shuffled = measured(ContextMean(DIM), tiny_bank, plan_windows(tiny_bank, CTX))["shuffled"]
    assert shuffled["hit_at_5_difference"]["mean"] == 0


def test_shorter_contexts_are_ranked_as_the_slow_reference_does(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, CTX)
    queries = windows.queries["test"].head(80)
    model = MovingAverage(DIM, 0.7)
    (full_Q,) = Questions(tiny_bank, windows, queries).ranks(
        predict_queries(model, tiny_bank, queries)
    )
    report = run_controls(model, tiny_bank, windows, queries, full_Q)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["queries"], report["ctx"]) == (80, CTX)
    weight_T = 0.7 ** np.arange(5)[::-1]
    for length in (1, 5):
        prediction_QD = np.stack(
            [
                weight_T[-len(rows) :] @ tiny_bank.unit(rows)
                for target, start in zip(
                    queries.target_row_Q, queries.sequence_start_Q, strict=True
                )
                for rows in [np.arange(max(start, target - length), target)]
            ]
        )
        rank_Q = reference.ranks(prediction_QD, queries, tiny_bank, windows.representative_N)[0]
        entry = next(one for one in report["context"] if one["ctx"] == length)
        expected = reference.figures(rank_Q.tolist())
        assert {name: entry[name] for name in expected} == pytest.approx(expected)


def test_the_full_context_has_the_figures_of_the_evaluation(tiny_bank: Bank, monkeypatch):
    windows = plan_windows(tiny_bank, CTX)
    model = MovingAverage(DIM, 0.7)
    report, (own,) = evaluate("mine", model, tiny_bank, windows, baselines=False)
    rank_Q = own.per_query["rank"].to_numpy()
    queries = windows.queries["test"]
    full = run_controls(model, tiny_bank, windows, queries, rank_Q)["context"][-1]
    assert full["hit_at_5"] == report["hit_at_5"]
    assert full["ci95"] == report["ci95"]
    monkeypatch.setattr(controls, "MAX_QUERIES", 50)
    monkeypatch.setattr(controls, "MAX_SHUFFLED_ROWS", 20 * CTX)
    part = run_controls(model, tiny_bank, windows, queries, rank_Q)
    assert part["queries"] == 50
    assert part["context"][-1]["hit_at_5"] == hit_at(rank_Q[:50], 5).mean()
    assert 20 <= part["shuffled"]["queries"] < 50
    num = part["shuffled"]["queries"]
    assert part["shuffled"]["ordered"]["hit_at_5"] == hit_at(rank_Q[:num], 5).mean()


def test_a_mirrored_bank_is_the_bank_read_backwards(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, CTX)
    backward, plan = mirrored(tiny_bank, windows)
    assert np.array_equal(backward.unit(slice(0, 9)), tiny_bank.unit(slice(-9, None))[::-1])
    assert plan.sha256 != windows.sha256, "else fits of one would be taken for the other's"
    groups = pd.Series(np.arange(tiny_bank.num_rows)).groupby(plan.representative_N)
    assert (groups.min() == groups.min().index).all()
    forward_groups = windows.representative_N[::-1]
    assert pd.Series(forward_groups).groupby(plan.representative_N).nunique().eq(1).all()
    assert len(groups) == len(np.unique(forward_groups))
    val = plan.queries["val"]
    assert (plan.split_N[val.target_row_Q] == 1).all()
    for first, target in zip(val.first_row_Q, val.target_row_Q, strict=True):
        assert first < target
        assert (plan.split_N[first:target] == 1).all(), "no test row is read to choose a penalty"
        assert len(set(backward.sequence_N[first : target + 1])) == 1


def test_the_reversed_ridge_is_scikit_learns_on_reversed_sequences(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, CTX)
    found = fit_ridge(*mirrored(tiny_bank, windows))
    features, targets = [], []
    for code in range(len(tiny_bank.sequences)):
        rows = np.flatnonzero((tiny_bank.sequence_N == code) & (windows.split_N == 0))[::-1]
        unit_TD = tiny_bank.unit(rows)
        features.append(ridge_features(torch.from_numpy(unit_TD[None, :-1]))[0].numpy())
        targets.append(unit_TD[1:])
    fitted = SklearnRidge(alpha=found.config["alpha"])
    fitted.fit(np.concatenate(features), np.concatenate(targets))
    assert np.allclose(found.weight.numpy(), fitted.coef_, atol=1e-4)
    assert np.allclose(found.bias.numpy(), fitted.intercept_, atol=1e-4)


def test_a_rotation_has_no_arrow_of_time(tmp_path: Path):
    bank = rotation_bank(tmp_path / "bank")
    ridge = measured(CopyLast(DIM), bank, plan_windows(bank, 20))["reversed_ridge"]
    assert ridge["forward"]["hit_at_1"] > 0.95
    assert ridge["backward"]["hit_at_1"] > 0.95
    assert abs(ridge["hit_at_5_difference"]["mean"]) < 0.05


def test_a_lossy_process_has_an_arrow_of_time(tmp_path: Path):
    """Every second row is a function of a quarter of the row before it, the others are random."""
    vector_ND = generator(0, "lossy").standard_normal((np.prod(SHAPE), DIM))
    lift_DD = generator(0, "lift").standard_normal((DIM // 4, DIM))
    vector_ND[1::2] = vector_ND[::2, : DIM // 4] @ lift_DD
    bank = written(tmp_path / "bank", vector_ND)
    report = measured(CopyLast(DIM), bank, plan_windows(bank, 20))
    ridge = report["reversed_ridge"]
    assert ridge["mrr_at_10_difference"]["low"] > 0
    assert ridge["forward"]["hit_at_5"] > ridge["backward"]["hit_at_5"] + 0.1
    assert "Arrow of time" in controls_table(report, leaky=False)


def test_both_ways_are_asked_for_the_same_rows_with_as_much_context(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, CTX)
    queries = windows.queries["test"]
    last_rows = np.append(np.flatnonzero(np.diff(tiny_bank.sequence_N)), tiny_bank.num_rows - 1)
    ridge = measured(CopyLast(DIM), tiny_bank, windows)["reversed_ridge"]
    assert ridge["queries"] == (~np.isin(queries.target_row_Q, last_rows)).sum()


def test_leaky_windows_have_no_rows_after_their_targets(tiny_bank: Bank):
    windows = plan_windows(tiny_bank, 2, 1, split="random")
    lonely = dataclasses.replace(windows, split_N=(np.arange(tiny_bank.num_rows) % 2).astype("i1"))
    report = measured(CopyLast(DIM), tiny_bank, lonely)
    assert report["reversed_ridge"] is None
    assert "Arrow" not in controls_table(report, leaky=False)
