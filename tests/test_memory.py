"""A small case of the memory battery (`benchmarks/memory.py`): what only the context tells."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from benchmarks.drawn_banks import regimes
from lvm.evaluation.metrics import hit_at
from lvm.models.predict import predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.training.config import TrainConfig
from lvm.training.loop import train
from lvm.windows.export import plan_windows

pytestmark = pytest.mark.slow

# The recipe's defaults, but for what makes it small.
SMALL = TrainConfig(
    max_steps=70, epochs=99, patience=99, batch_size=8, negatives=512, precision="fp32"
)


def test_the_default_model_finds_which_of_eight_rotations_moves_a_sequence(tmp_path: Path) -> None:
    """Nothing but the rows of the sequence tells its rotation; the last eight are too few."""
    drawn = regimes(8, 0.5, sequences=32, rows=250)
    bank = drawn.write(tmp_path / "bank")
    windows = plan_windows(bank, 100)

    def hits(prediction_QD: NDArray[np.float32], split: str) -> float:
        queries = windows.queries[split].head(len(prediction_QD))
        (ranks,) = exact_ranks(prediction_QD, queries, bank, windows.representative_N)
        return float(hit_at(ranks.rank_Q, 5).mean())

    def validate(model: nn.Module) -> dict[str, float]:
        queries = windows.queries["val"].head(50)
        return {"hit_at_5": hits(predict_queries(model, bank, queries), "val")}

    queries = windows.queries["test"].head(300)
    oracle = hits(drawn.answer_ND[queries.target_row_Q].astype(np.float32), "test")
    share = {}
    for name, sizes in {
        "delta_memory": {"hidden": 32, "layers": 1},
        "res_mlp": {"hidden": 32, "layers": 1},
        "skip": {},
    }.items():
        config = dataclasses.replace(SMALL, model=name, **sizes)
        model = train(bank, windows, config, validate=validate).model
        share[name] = hits(predict_queries(model, bank, queries), "test") / oracle
    assert TrainConfig().model == "delta_memory"
    assert share["delta_memory"] > 0.6
    assert max(share["res_mlp"], share["skip"]) < 0.2
