"""The lane that comes next: lane codes of a bank, and a calibrated classifier of contexts.

A lane code is an index into `bank.lanes`; rows without a lane have the last code L, a lane of their
own. Shapes: Q queries, L lanes, B batch, T time, D vector dim, F = 2 D features, P train positions,
C lanes seen in training.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.row_table import UNASSIGNED
from lvm.models.weights import Fit, cached_fit
from lvm.retrieval.hubness import MAX_TUNING_QUERIES, train_positions
from lvm.windows.planning import ContextQueries, IntArray, Queries, Windows

UNASSIGNED_LANE = "unassigned"
RECENT_ROWS = 64  # the mean of these is a feature, besides the mean of the whole context
INVERSE_PENALTY = 10.0  # scikit-learn's C
UNSEEN_SHARE = 0.01  # total probability spread over all codes, so that unseen lanes have some
TEMPERATURES = (0.05, 20.0)


def lane_names(bank: Bank) -> tuple[str, ...]:
    """Return the names of the lane codes."""
    return (*bank.lanes, UNASSIGNED_LANE)


def lane_codes(bank: Bank, row_Q: NDArray[np.integer] | slice = slice(None)) -> IntArray:
    """Return the lane code of each row. Raises ValueError for a bank without lanes."""
    if bank.lane_N is None:
        raise ValueError(f"bank {bank.path}: has no lanes; add a column 'lane' to its row table")
    code_Q = bank.lane_N[row_Q].astype(np.int64)
    return np.where(code_Q == UNASSIGNED, len(bank.lanes), code_Q)


def lanes_sha256(bank: Bank) -> str:
    """Return a hash of the lanes' names and of the lane of every row."""
    digest = hashlib.sha256(json.dumps(bank.lanes).encode())
    digest.update(lane_codes(bank).astype("<i8").data)
    return digest.hexdigest()


@dataclass(frozen=True)
class LaneClassifier:
    """p(lane | context): a softmax over linear maps of the context's means, with a temperature.

    `weight` (C, F) and `bias` (C,) are float32; `code_C` are the lane codes of their rows. There
    are `num_codes` codes; the last one belongs to rows without a lane.
    """

    weight: FloatArray
    bias: FloatArray
    code_C: IntArray
    num_codes: int
    temperature: float

    def log_probability(self, feature_QF: FloatArray) -> FloatArray:
        """Return log p(lane | context) of every lane code, (Q, L + 1) float32; none is -inf."""
        logit_QC = (feature_QF @ self.weight.T + self.bias) / self.temperature
        seen_QL = np.zeros((len(feature_QF), self.num_codes))
        seen_QL[:, self.code_C] = softmax(logit_QC.astype(np.float64), axis=1)
        mixed_QL = (1 - UNSEEN_SHARE) * seen_QL + UNSEEN_SHARE / self.num_codes
        return np.log(mixed_QL).astype(np.float32)


def fit_lane_classifier(
    bank: Bank, windows: Windows, seed: int = 0, ctx: int | None = None
) -> LaneClassifier:
    """Fit the classifier on train positions (scikit-learn's logistic regression), then on val.

    The temperature minimises the negative log likelihood on val queries (Guo et al., arXiv
    1706.04599). Rows without a lane, if there are any, are a class of their own. `ctx` None means
    the ctx of the windows. Raises ValueError as `check_lanes` does.
    """
    ctx = ctx or windows.ctx

    def fit() -> Fit:
        from sklearn.linear_model import LogisticRegression  # takes a second to import

        check_lanes(bank, windows, seed)
        positions = train_positions(bank, windows, seed).with_ctx(ctx)
        feature_PF, code_P = context_features(positions, bank), target_codes(positions, bank)
        found = LogisticRegression(C=INVERSE_PENALTY, max_iter=300)
        found.fit(feature_PF, code_P)
        weight, bias = found.coef_, found.intercept_
        if len(found.classes_) == 2:  # scikit-learn stores one map for two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.append(-bias, bias) / 2
        queries = windows.queries["val"].head(MAX_TUNING_QUERIES).with_ctx(ctx)
        logit_QC = context_features(queries, bank) @ weight.T + bias
        place_Q = _places(found.classes_, target_codes(queries, bank))
        tensors = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
        return Fit(
            {name: torch.from_numpy(array).contiguous() for name, array in tensors.items()},
            {"codes": found.classes_.tolist(), "temperature": _temperature(logit_QC, place_Q)},
        )

    inputs = {"lanes": lanes_sha256(bank), "recent": RECENT_ROWS, "ctx": ctx, "seed": seed}
    inputs |= {name: installed_version(name) for name in ("scikit-learn", "scipy")}
    return classifier_of(cached_fit(windows, "lane-classifier", inputs, fit), len(lane_names(bank)))


def check_lanes(bank: Bank, windows: Windows, seed: int = 0) -> None:
    """Raise ValueError unless the sampled train positions have targets of two lanes or more.

    This needs no model.
    """
    code_P = target_codes(train_positions(bank, windows, seed), bank)
    if len(np.unique(code_P[code_P < len(bank.lanes)])) < 2:
        raise ValueError(
            f"rerank: bank {bank.path} has train rows of one lane or none; lanes tell rows "
            "apart only where there are two, use rerank=none"
        )


def classifier_of(found: Fit, num_codes: int) -> LaneClassifier:
    """Return the classifier stored in a fit."""
    return LaneClassifier(
        weight=found.tensors["weight"].numpy(),
        bias=found.tensors["bias"].numpy(),
        code_C=np.array(found.values["codes"], np.int64),
        num_codes=num_codes,
        temperature=float(found.values["temperature"]),
    )


def context_features(queries: Queries, bank: Bank) -> FloatArray:
    """Return the features (`means_of`) of the queries' contexts, (Q, F) float32."""
    if isinstance(queries, ContextQueries):
        each = [means_of(bank.unit(rows)[None]) for rows in queries.context_row_Q]
        return np.concatenate([np.zeros((0, 2 * bank.dim), np.float32), *each])
    end_Q = queries.target_row_Q
    recent_Q = np.maximum(queries.first_row_Q, end_Q - RECENT_ROWS)
    means = [_range_means(first_Q, end_Q, bank) for first_Q in (recent_Q, queries.first_row_Q)]
    return np.concatenate(means, axis=1)


def means_of(context_BTD: FloatArray) -> FloatArray:
    """Return the unit mean of the last RECENT_ROWS rows and the unit mean of all rows, (B, F).

    For a shorter context the first mean covers all its rows.
    """
    means = [context_BTD[:, -RECENT_ROWS:].mean(axis=1), context_BTD.mean(axis=1)]
    return np.concatenate([_unit(mean_BD) for mean_BD in means], axis=1)


def _range_means(first_Q: IntArray, end_Q: IntArray, bank: Bank) -> FloatArray:
    """Return the unit means (Q, D) of the bank rows [first, end).

    A running sum adds and subtracts each row once, however far the ranges overlap.
    """
    mean_QD = np.empty((len(end_Q), bank.dim), np.float32)
    total_D, first, end = np.zeros(bank.dim), 0, 0
    for place in np.lexsort((first_Q, end_Q)):
        next_first, next_end = int(first_Q[place]), int(end_Q[place])
        if next_first >= end or next_first < first:
            total_D, first, end = np.zeros(bank.dim), next_first, next_first
        total_D += bank.unit(slice(end, next_end)).sum(axis=0, dtype=np.float64)
        total_D -= bank.unit(slice(first, next_first)).sum(axis=0, dtype=np.float64)
        first, end = next_first, next_end
        mean_QD[place] = _unit(total_D / (end - first))
    return mean_QD


def _unit(vector_BD: NDArray[Any]) -> NDArray[Any]:
    """Return vectors of unit length; zero stays zero."""
    return vector_BD / np.maximum(np.linalg.norm(vector_BD, axis=-1, keepdims=True), 1e-12)


def target_codes(queries: Queries, bank: Bank) -> IntArray:
    """Return the lane code of each query's target, (Q,)."""
    return lane_codes(bank, queries.target_row_Q)


def calibration(log_p_QL: FloatArray, code_Q: IntArray, bins: int = 15) -> dict[str, Any]:
    """Return accuracy, mean negative log likelihood (nats), expected calibration error.

    The error is the mean gap between confidence and accuracy over `bins` equal ranges of
    confidence, each weighted by its number of queries (Guo et al., arXiv 1706.04599, eq. 5).
    """
    best_Q = log_p_QL.argmax(axis=1)
    confidence_Q, is_right_Q = np.exp(log_p_QL.max(axis=1)), best_Q == code_Q
    bin_Q = np.minimum((confidence_Q * bins).astype(int), bins - 1)
    gap = np.bincount(bin_Q, weights=is_right_Q - confidence_Q, minlength=bins)
    return {
        "accuracy": float(is_right_Q.mean()),
        "loss": float(-np.take_along_axis(log_p_QL, code_Q[:, None], axis=1).mean()),
        "calibration_error": float(np.abs(gap).sum() / len(code_Q)),
    }


def _places(code_C: IntArray, code_Q: IntArray) -> IntArray:
    """Return the position of each code among the seen codes, -1 for unseen ones."""
    place_Q = np.searchsorted(code_C, code_Q).clip(max=len(code_C) - 1)
    return np.where(code_C[place_Q] == code_Q, place_Q, -1)


def _temperature(logit_QC: FloatArray, place_Q: IntArray) -> float:
    """Return the temperature of the least loss over queries with a seen lane; 1 without any."""
    seen_Q = place_Q >= 0
    if not seen_Q.any():
        return 1.0
    logit_QC, place_Q1 = logit_QC[seen_Q], place_Q[seen_Q, None]

    def loss(log_temperature: float) -> float:
        log_p_QC = log_softmax(logit_QC / np.exp(log_temperature), axis=1)
        return float(-np.take_along_axis(log_p_QC, place_Q1, axis=1).mean())

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return float(np.exp(found.x))
