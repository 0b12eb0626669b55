"""The questions that a training asks its models after each epoch."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.evaluation.metrics import document_interval, figures, hit_at, smallest_detectable
from lvm.models.tmd_experts import TMDExperts, has_gate
from lvm.prediction.predict import predict_queries, predict_routed
from lvm.report.evaluation import experts_figure
from lvm.retrieval.exact import exact_ranks
from lvm.tracking.datasets import Inputs
from lvm.training.expert_gate import lane_table, mutual_information
from lvm.training.warnings import validation_warnings


class Validation:
    """The questions that `eval -P split=val` asks, put to models in training."""

    def __init__(self, inputs: Inputs) -> None:
        self.bank, self.windows = inputs.bank, inputs.windows
        self.queries = inputs.windows.queries["val"].head(MAX_QUERIES)
        self.truth_QD = inputs.bank.unit(self.queries.target_row_Q)
        self._measured: list[NDArray[np.float64]] = []

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the plain filtered figures, with the mean cosine to the truth."""
        found = {}
        if has_gate(model):
            asked = (model, self.bank, self.queries)
            prediction_QD, gate_QX = predict_routed(*asked, progress=True)
            found["gate_lane_mi"] = mutual_information(self.lane_table(gate_QX))
        else:
            prediction_QD = predict_queries(model, self.bank, self.queries, progress=True)
        found["cosine"] = float((prediction_QD * self.truth_QD).sum(axis=1).mean())
        return figures(self._ranks(prediction_QD)) | found

    def lane_table(self, gate_QX: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the weight of each expert over the val queries of each lane, (L, X)."""
        if self.bank.lane_N is None:
            return gate_QX.sum(axis=0, keepdims=True)
        lane_Q = self.bank.lane_N[self.queries.target_row_Q]
        return lane_table(gate_QX, lane_Q, len(self.bank.lanes))

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Return the plain filtered figures with their intervals by document."""
        rank_Q = self._ranks(predict_queries(model, self.bank, self.queries))
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        interval = document_interval(rank_Q, document_Q, self.windows.seed)
        self._measured.append(hit_at(rank_Q, 5))
        return {**figures(rank_Q), "ci95": interval}

    def warnings(self) -> list[str]:
        """Return what these queries cannot see, by the two best predictors measured so far."""
        second_Q, first_Q = sorted(self._measured, key=lambda hit_Q: float(hit_Q.mean()))[-2:]
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        detectable = smallest_detectable(first_Q - second_Q, document_Q)
        return validation_warnings(len(self.queries), detectable)

    def _ranks(self, prediction_QD: NDArray[np.float32]) -> NDArray[np.float64]:
        groups = self.windows.representative_N
        return exact_ranks(prediction_QD, self.queries, self.bank, groups, progress=True)[0].rank_Q

    def experts_figure(self, model: TMDExperts) -> Figure:
        """Draw which experts the model chooses, lane by lane."""
        table_LX = self.lane_table(predict_routed(model, self.bank, self.queries)[1])
        return experts_figure(table_LX, self.bank.lanes or ("no lanes",), self.windows.leaky)
