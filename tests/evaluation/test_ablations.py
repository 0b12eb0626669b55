"""Ablations show which part of a model answers, on a bank where that is known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lvm.evaluation.controls import run_ablations
from lvm.models.predict import predict_queries
from lvm.models.table import build_model
from lvm.report.evaluation import ablations_table
from lvm.windows.export import plan_windows
from tests.reference import ranks
from tests.synthetic import rotation, rotation_bank


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A model whose linear map alone knows the rotation of the bank; its encoder adds little."""
    folder: Path = tmp_path_factory.mktemp("ablations")
    bank = rotation_bank(folder / "bank", num_sequences=12)
    windows = plan_windows(bank, 30)
    model = build_model({"model": "memory_gru", "dim": 16, "hidden": 8, "layers": 2}).eval()
    with torch.no_grad():
        model.skip_change.weight[:, :16] = 50 * torch.from_numpy(rotation(16)).float()
        model.project_out.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    queries = windows.queries["test"]
    prediction_QD = predict_queries(model, bank, queries)
    rank_Q, _ = ranks(prediction_QD, queries, bank, windows.representative_N)
    return run_ablations(model, bank, windows, queries, np.asarray(rank_Q))


def test_the_part_that_knows_the_answer_is_the_one_that_is_missed(report: dict) -> None:
    parts = {entry["part"]: entry for entry in report["without"]}
    assert list(parts) == ["linear", "encoder", "memory", "older_rows"]
    assert report["full"]["hit_at_5"] > 0.99
    lost = parts["linear"]["hit_at_5_difference"]
    assert lost["high"] < -0.3 and parts["linear"]["p_holm"] < 0.05
    for part in ("encoder", "memory", "older_rows"):
        assert abs(parts[part]["hit_at_5_difference"]["mean"]) < 0.02
        assert parts[part]["hit_at_5_difference"]["mean"] == pytest.approx(
            parts[part]["hit_at_5"] - report["full"]["hit_at_5"]
        )


def test_the_table_has_a_line_a_part(report: dict) -> None:
    text = ablations_table(report, leaky=False)
    for word in ("without", "nothing", "linear map", "encoder", "memory", "all but 20 rows"):
        assert word in text
    assert "LEAKY" in ablations_table(report, leaky=True)
