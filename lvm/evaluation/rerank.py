"""Re-ranking of a shortlist by the lane that the context promises.

score = cos / tau + beta log p(lane | context). Shapes: Q queries, C listed candidates, N bank rows,
L lanes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.lane_classifier import (
    LaneClassifier,
    check_lanes,
    classifier_of,
    context_features,
    fit_lane_classifier,
)
from lvm.evaluation.lane_metrics import lane_codes, lanes_sha256
from lvm.evaluation.metrics import selection_score
from lvm.models.fits import Fit, cached_fit, model_digest
from lvm.models.weights import load_state, save_state
from lvm.prediction.predict import predict_queries
from lvm.retrieval.exact import SCORE_TIE, exact_ranks
from lvm.retrieval.hubness import MAX_TUNING_QUERIES
from lvm.retrieval.shortlist import Shortlist, ranks_anew, shortlist
from lvm.windows.context_rows import ContextQueries
from lvm.windows.planning import Queries, Windows

FloatArray = NDArray[np.float32]
Ranks = NDArray[np.float64]

NONE, LANE = "none", "lane"
RERANKS = (NONE, LANE)
BETAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
SCORE_TEMPERATURES = (0.005, 0.5)
OLD_SHARES = (0.7, 0.3)  # of the cosine, of the alignment


@dataclass(frozen=True)
class Weights:
    """tau and beta of one kind of score (plain or corrected), both chosen on val."""

    tau: float
    beta: float


@dataclass(frozen=True)
class Reranker:
    """What orders a shortlist anew; it travels with a logged model as one safetensors file."""

    classifier: LaneClassifier
    plain: Weights
    corrected: Weights

    def save(self, path: Path) -> None:
        """Write it."""
        found = self.classifier
        tensors = {"weight": torch.from_numpy(found.weight), "bias": torch.from_numpy(found.bias)}
        weights = {"plain": vars(self.plain), "corrected": vars(self.corrected)}
        codes = {"codes": found.code_C.tolist(), "num_codes": found.num_codes}
        save_state(path, tensors, weights | codes | {"temperature": found.temperature})

    @classmethod
    def load(cls, path: Path) -> "Reranker":
        """Read what `save` wrote; raises ValueError where it is damaged."""
        tensors, meta = load_state(path, is_hash_needed=False)
        try:
            classifier = classifier_of(Fit(tensors, meta), int(meta["num_codes"]))
            return cls(classifier, Weights(**meta["plain"]), Weights(**meta["corrected"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: is no lane re-ranker ({error}); log the model again"
            ) from None


def lane_scores(
    listed: Shortlist, log_p_QL: FloatArray, code_N: NDArray[np.int64], weight: float
) -> FloatArray:
    """Return score + weight log p(lane of the candidate | context), (Q, C); -inf stays."""
    log_p_QC = np.take_along_axis(log_p_QL, code_N[listed.row_QC], axis=1)
    return (listed.score_QC + np.float32(weight) * log_p_QC).astype(np.float32)


def all_codes(bank: Bank) -> NDArray[np.int64]:
    """Return the lane code of every bank row, (N,)."""
    return lane_codes(bank, np.arange(bank.num_rows))


@dataclass(frozen=True)
class Foretold:
    """What re-ranking a predictor's answers needs beside the predictor; no model is asked for it.

    `code_N` (N,) are the lanes of the bank's rows; `log_p_QL` is log p(lane | context) of the
    queries to be answered, `val_log_p_QL` that of `val`, on which tau and beta are chosen: `val` as
    the predictor reads it, `val_removed` with the contexts that are left out of the ranking.
    """

    code_N: NDArray[np.int64]
    log_p_QL: FloatArray
    val: Queries
    val_removed: Queries
    val_log_p_QL: FloatArray


def foretell(bank: Bank, windows: Windows, queries: Queries, seed: int = 0) -> Foretold:
    """Fit the classifier for contexts as long as those of `queries`, ask it.

    Raises ValueError for a bank without two lanes of train rows.
    """
    ctx = windows.ctx if isinstance(queries, ContextQueries) else queries.ctx
    classifier = fit_lane_classifier(bank, windows, seed, ctx)
    removed = windows.queries["val"].head(MAX_TUNING_QUERIES)
    val = removed.with_ctx(ctx)
    asked, tuned = (
        classifier.log_probability(context_features(which, bank)) for which in (queries, val)
    )
    return Foretold(all_codes(bank), asked, val, removed, tuned)


def fit_reranker(
    model: nn.Module, bank: Bank, windows: Windows, row_correction: FloatArray, seed: int = 0
) -> Reranker:
    """Fit the classifier, then tau with beta on val queries, for plain and for corrected scores.

    tau makes the true row's softmax over its shortlist likeliest; beta has the best Hit@5, then
    MRR@10, the smaller on a tie: without a gain on val it is 0. Raises ValueError for a bank that
    has no lanes.
    """
    classifier = fit_lane_classifier(bank, windows, seed)

    def fit() -> Fit:
        foretold = foretell(bank, windows, windows.queries["val"].head(0), seed)
        groups = windows.representative_N
        plain, corrected = chosen_weights(model, bank, groups, foretold, (None, row_correction))
        return Fit(values={"plain": vars(plain), "corrected": vars(corrected)})

    digest = hashlib.sha256(np.ascontiguousarray(row_correction, np.float32).data).hexdigest()
    inputs = {"model": model_digest(model), "row_correction": digest, "seed": seed}
    inputs |= {"lanes": lanes_sha256(bank), "scipy": installed_version("scipy")}
    found = cached_fit(windows, "lane-reranker", inputs, fit).values
    return Reranker(classifier, Weights(**found["plain"]), Weights(**found["corrected"]))


def reranker_if_lanes(
    model: nn.Module, bank: Bank, windows: Windows, row_correction: FloatArray, seed: int = 0
) -> Reranker | None:
    """Return `fit_reranker`'s; None for a bank that `check_lanes` refuses."""
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
    representative_N: NDArray[np.int64],
    foretold: Foretold,
    row_corrections: Sequence[FloatArray | None] = (None,),
) -> list[Weights]:
    """Return tau with beta under each row correction, both chosen on val."""
    prediction_QD, removed = predict_queries(model, bank, foretold.val), foretold.val_removed
    ranks = exact_ranks(prediction_QD, removed, bank, representative_N, row_corrections)
    found = []
    for correction, before in zip(row_corrections, ranks, strict=True):
        listed = shortlist(prediction_QD, removed, bank, representative_N, correction)
        found.append(_chosen(listed, before.rank_Q, foretold.val_log_p_QL, foretold.code_N))
    return found


def _chosen(
    listed: Shortlist, rank_Q: Ranks, log_p_QL: FloatArray, code_N: NDArray[np.int64]
) -> Weights:
    tau = likely_temperature(listed)

    def quality(beta: float) -> tuple[float, float]:
        score_QC = lane_scores(listed, log_p_QL, code_N, tau * beta)
        return selection_score(ranks_anew(listed, score_QC, rank_Q))

    return Weights(tau, max(BETAS, key=lambda beta: (quality(beta), -beta)))


def likely_temperature(listed: Shortlist) -> float:
    """Return the tau at which the truths are likeliest among their lists, within its bounds."""
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


def old_rule_scores(
    listed: Shortlist, log_p_QL: FloatArray, code_N: NDArray[np.int64]
) -> FloatArray:
    """Return the replaced system's 0.7 cos + 0.3 alignment, (Q, C).

    Alignment is 1 where the candidate is of the likeliest lane. Cosines on a list differ by less
    than a tenth or so: it is a hard filter.
    """
    aligned_QC = code_N[listed.row_QC] == log_p_QL.argmax(axis=1)[:, None]
    cosine_share, lane_share = OLD_SHARES
    return (cosine_share * listed.score_QC + lane_share * aligned_QC).astype(np.float32)


def true_lane_ranks(
    listed: Shortlist, rank_Q: Ranks, true_code_Q: NDArray[np.int64], code_N: NDArray[np.int64]
) -> Ranks:
    """Return the ranks (Q,) where the true lane were known: its candidates come first.

    No classifier can do better than that with the same lists. The truth is of its own lane, though
    the row that stands for its duplicates may be of another.
    """
    is_own_QC = (code_N[listed.row_QC] == true_code_Q[:, None]) | listed.is_truth_QC
    return ranks_anew(listed, np.where(is_own_QC, listed.score_QC, -10.0), rank_Q, SCORE_TIE)
