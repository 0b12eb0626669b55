"""Second stage: re-rank the best candidates of a query by the predicted lane.

score = cosine / tau + beta log p(lane | context), with a calibrated classifier of the lane that
comes next. A lane code is an index into `bank.lanes`; rows without a lane have the last code L, a
lane of their own. Shapes: Q queries, C listed candidates, N bank rows, L lanes, B batch, T time, D
vector dim, F = 2 D features; C lanes seen in training where the classifier is fitted.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.row_table import UNASSIGNED
from lvm.models.predict import predict_queries
from lvm.models.weights import Fit, cached_fit, load_state, model_digest, save_state
from lvm.retrieval.counting import SCORE_TIE, Competition
from lvm.retrieval.exact import (
    best_candidates,
    checked_correction,
    exact_ranks,
    selection_score,
    unit_predictions,
)
from lvm.retrieval.hubness import MAX_TUNING_QUERIES, train_positions
from lvm.system.progress import part
from lvm.windows.planning import ContextQueries, IntArray, Queries, Windows

NONE, LANE = "none", "lane"
RERANKS = (NONE, LANE)
SIZE = 200
BETAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
SCORE_TEMPERATURES = (0.005, 0.5)
OLD_SHARES = (0.7, 0.3)  # weights of the cosine and of the alignment
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


@dataclass(frozen=True)
class Shortlist:
    """The C best candidates of each query, best first; all arrays (Q, C).

    `row_QC` are the first rows of duplicate groups, padded with -1 and score -inf; `is_truth_QC`
    marks the group of the query's target.
    """

    row_QC: IntArray
    score_QC: FloatArray
    is_truth_QC: NDArray[np.bool_]


def shortlist(
    prediction_QD: FloatArray,
    queries: Queries,
    bank: Bank,
    representative_N: IntArray,
    row_correction: FloatArray | None = None,
    size: int = SIZE,
) -> Shortlist:
    """Return the candidates that `exact_ranks` puts first, among the same groups.

    The order of equal scores at the end of a list is undefined. Raises ValueError as `exact_ranks`
    does.
    """
    order_Q = np.argsort(queries.target_row_Q, kind="stable")
    unit_QD = unit_predictions(prediction_QD, bank, len(queries))[torch.from_numpy(order_Q)]
    competition = Competition.of(bank, queries.take(order_Q), representative_N)
    row_K, pair_N2 = competition.row_K, checked_correction(row_correction, bank)
    num_listed = min(size, len(row_K))
    hidden = competition.hidden
    row_QC, score_QC = best_candidates(unit_QD, bank, row_K, num_listed, pair_N2, hidden)
    back_Q = np.argsort(order_Q)
    is_truth_QC = row_QC[back_Q] == representative_N[queries.target_row_Q, None]
    return Shortlist(row_QC[back_Q], score_QC[back_Q], is_truth_QC)


def reranked_ranks(
    listed: Shortlist, score_QC: FloatArray, rank_Q: NDArray[np.float64], tie: float = SCORE_TIE
) -> NDArray[np.float64]:
    """Return the ranks (Q,) after re-ranking the lists by `score_QC`, float64.

    rank = 1 + better + ties / 2 within the list; scores closer than `tie` are equal. A truth that
    is not on its list keeps its rank of `rank_Q`.
    """
    is_listed_Q = listed.is_truth_QC.any(axis=1)
    own_score_Q = np.where(listed.is_truth_QC, score_QC, -np.inf).max(axis=1)
    is_other_QC = ~listed.is_truth_QC & (listed.row_QC >= 0)
    with np.errstate(invalid="ignore"):
        lead_QC = score_QC - own_score_Q[:, None]
    better_Q = (is_other_QC & (lead_QC > tie)).sum(axis=1)
    equal_Q = (is_other_QC & (np.abs(lead_QC) <= tie)).sum(axis=1)
    return np.where(is_listed_Q, 1 + better_Q + equal_Q / 2, rank_Q)


@dataclass(frozen=True)
class Weights:
    """tau and beta of one kind of score (plain or corrected), both chosen on val."""

    tau: float
    beta: float


@dataclass(frozen=True)
class Reranker:
    """The lane classifier and its weights; logged with a model as one safetensors file."""

    classifier: LaneClassifier
    plain: Weights
    corrected: Weights

    def save(self, path: Path) -> None:
        """Write the file."""
        found = self.classifier
        tensors = {"weight": torch.from_numpy(found.weight), "bias": torch.from_numpy(found.bias)}
        weights = {"plain": vars(self.plain), "corrected": vars(self.corrected)}
        codes = {"codes": found.code_C.tolist(), "num_codes": found.num_codes}
        save_state(path, tensors, weights | codes | {"temperature": found.temperature})

    @classmethod
    def load(cls, path: Path) -> "Reranker":
        """Read a file written by `save`; raises ValueError if it is damaged."""
        tensors, meta = load_state(path, is_hash_needed=False)
        try:
            classifier = classifier_of(Fit(tensors, meta), int(meta["num_codes"]))
            return cls(classifier, Weights(**meta["plain"]), Weights(**meta["corrected"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is not a lane re-ranker ({error}); log the model again"
            ) from None


def lane_scores(
    listed: Shortlist, log_p_QL: FloatArray, code_N: IntArray, weight: float
) -> FloatArray:
    """Return score + weight log p(lane of the candidate | context), (Q, C); -inf stays -inf."""
    log_p_QC = np.take_along_axis(log_p_QL, code_N[listed.row_QC], axis=1)
    return (listed.score_QC + np.float32(weight) * log_p_QC).astype(np.float32)


@dataclass(frozen=True)
class LanePrediction:
    """The inputs of re-ranking that are the same for all predictors.

    `code_N` (N,) are the lanes of the bank's rows; `log_p_QL` is log p(lane | context) of the
    queries to be answered, `val_log_p_QL` that of the queries `val`, on which tau and beta are
    chosen. `val` has the contexts that the predictor reads, `val_removed` the contexts whose rows
    are removed from the ranking.
    """

    code_N: IntArray
    log_p_QL: FloatArray
    val: Queries
    val_removed: Queries
    val_log_p_QL: FloatArray


def predict_lanes(bank: Bank, windows: Windows, queries: Queries, seed: int = 0) -> LanePrediction:
    """Fit the classifier for contexts as long as those of `queries`; predict the next lanes.

    Raises ValueError for a bank without two lanes of train rows.
    """
    ctx = windows.ctx if isinstance(queries, ContextQueries) else queries.ctx
    classifier = fit_lane_classifier(bank, windows, seed, ctx)
    removed = windows.queries["val"].head(MAX_TUNING_QUERIES)
    val = removed.with_ctx(ctx)
    asked, tuned = (
        classifier.log_probability(context_features(which, bank)) for which in (queries, val)
    )
    return LanePrediction(lane_codes(bank), asked, val, removed, tuned)


@part("second stage")
def fit_reranker(
    model: nn.Module, bank: Bank, windows: Windows, row_correction: FloatArray, seed: int = 0
) -> Reranker:
    """Fit the classifier, then tau and beta on val queries, for plain and for corrected scores.

    tau maximises the likelihood of the true row in a softmax over its shortlist. beta has the best
    Hit@5, then the best MRR@10, then is the smallest: without a gain on val it is 0. Raises
    ValueError for a bank without lanes.
    """
    classifier = fit_lane_classifier(bank, windows, seed)

    def fit() -> Fit:
        lanes = predict_lanes(bank, windows, windows.queries["val"].head(0), seed)
        groups = windows.representative_N
        plain, corrected = chosen_weights(model, bank, groups, lanes, (None, row_correction))
        return Fit(values={"plain": vars(plain), "corrected": vars(corrected)})

    digest = hashlib.sha256(np.ascontiguousarray(row_correction, np.float32).data).hexdigest()
    inputs = {"model": model_digest(model), "row_correction": digest, "seed": seed}
    inputs |= {"lanes": lanes_sha256(bank), "scipy": installed_version("scipy")}
    found = cached_fit(windows, "lane-reranker", inputs, fit).values
    return Reranker(classifier, Weights(**found["plain"]), Weights(**found["corrected"]))


def reranker_if_lanes(
    model: nn.Module, bank: Bank, windows: Windows, row_correction: FloatArray, seed: int = 0
) -> Reranker | None:
    """Return `fit_reranker`'s result, or None for a bank that `check_lanes` rejects."""
    if bank.lane_N is None:
        return None
    try:
        check_lanes(bank, windows, seed)
    except ValueError:
        return None
    return fit_reranker(model, bank, windows, row_correction, seed)


def chosen_weights(
    model: nn.Module,
    bank: Bank,
    representative_N: IntArray,
    lanes: LanePrediction,
    row_corrections: Sequence[FloatArray | None] = (None,),
) -> list[Weights]:
    """Return tau and beta under each row correction, both chosen on val."""
    prediction_QD, removed = predict_queries(model, bank, lanes.val), lanes.val_removed
    ranks = exact_ranks(prediction_QD, removed, bank, representative_N, row_corrections)
    found = []
    for correction, before in zip(row_corrections, ranks, strict=True):
        listed = shortlist(prediction_QD, removed, bank, representative_N, correction)
        tau = likely_temperature(listed)
        scores = {}
        for beta in BETAS:
            score_QC = lane_scores(listed, lanes.val_log_p_QL, lanes.code_N, tau * beta)
            scores[beta] = selection_score(reranked_ranks(listed, score_QC, before.rank_Q))
        found.append(Weights(tau, max(BETAS, key=lambda beta: (scores[beta], -beta))))
    return found


def likely_temperature(listed: Shortlist) -> float:
    """Return the tau in SCORE_TEMPERATURES at which the truths are likeliest within their lists."""
    is_listed_Q = listed.is_truth_QC.any(axis=1)
    if not is_listed_Q.any():
        return 0.05
    score_QC = listed.score_QC[is_listed_Q].astype(np.float64)
    own_Q = score_QC[listed.is_truth_QC[is_listed_Q]]

    def loss(log_tau: float) -> float:
        tau = np.exp(log_tau)
        return float((logsumexp(score_QC / tau, axis=1) - own_Q / tau).mean())

    found = minimize_scalar(loss, bounds=np.log(SCORE_TEMPERATURES), method="bounded")
    return float(np.exp(found.x))


def old_rule_scores(listed: Shortlist, log_p_QL: FloatArray, code_N: IntArray) -> FloatArray:
    """Return the old system's 0.7 cosine + 0.3 alignment, (Q, C).

    Alignment is 1 for candidates of the likeliest lane. The cosines of a list differ by less than
    about a tenth, so the rule acts as a hard filter.
    """
    is_aligned_QC = code_N[listed.row_QC] == log_p_QL.argmax(axis=1)[:, None]
    cosine_share, lane_share = OLD_SHARES
    return (cosine_share * listed.score_QC + lane_share * is_aligned_QC).astype(np.float32)


def true_lane_ranks(
    listed: Shortlist, rank_Q: NDArray[np.float64], true_code_Q: IntArray, code_N: IntArray
) -> NDArray[np.float64]:
    """Return the ranks (Q,) if the true lane were known: candidates of that lane come first.

    This is the ceiling of any lane classifier on the same lists. The truth counts as of its own
    lane, even if the first row of its duplicate group has another.
    """
    is_own_QC = (code_N[listed.row_QC] == true_code_Q[:, None]) | listed.is_truth_QC
    return reranked_ranks(listed, np.where(is_own_QC, listed.score_QC, -10.0), rank_Q)
