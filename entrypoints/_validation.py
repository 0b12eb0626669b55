"""The questions that a training asks its models after each epoch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from entrypoints._inputs import Inputs
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.metrics import figures, hit_at
from lvm.prediction.predict import predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.statistics import document_interval, smallest_detectable


class Validation:
    """The questions that `eval -P split=val` asks, put to models in training."""

    def __init__(self, inputs: Inputs) -> None:
        self.bank, self.windows = inputs.bank, inputs.windows
        self.queries = inputs.windows.queries["val"].head(MAX_QUERIES)
        self.truth_QD = inputs.bank.unit(self.queries.target_row_Q)
        self._measured: list[NDArray[np.float64]] = []

    def figures(self, model: nn.Module) -> dict[str, float]:
        """Return the plain filtered figures, with the mean cosine to the truth."""
        prediction_QD = predict_queries(model, self.bank, self.queries, progress=True)
        cosine = float((prediction_QD * self.truth_QD).sum(axis=1).mean())
        return figures(self._ranks(prediction_QD)) | {"cosine": cosine}

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """Return the plain filtered figures with their intervals by document."""
        rank_Q = self._ranks(predict_queries(model, self.bank, self.queries))
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        interval = document_interval(rank_Q, document_Q, self.windows.seed)
        self._measured.append(hit_at(rank_Q, 5))
        return {**figures(rank_Q), "ci95": interval}

    def detectable(self) -> float:
        """Return the least difference of Hit@5 that shows here, by the two best measured so far."""
        second_Q, first_Q = sorted(self._measured, key=lambda hit_Q: float(hit_Q.mean()))[-2:]
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        return smallest_detectable(first_Q - second_Q, document_Q)

    def _ranks(self, prediction_QD: NDArray[np.float32]) -> NDArray[np.float64]:
        groups = self.windows.representative_N
        return exact_ranks(prediction_QD, self.queries, self.bank, groups, progress=True)[0].rank_Q
