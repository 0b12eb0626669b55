"""Second stage: the best candidates of a query, re-scored by what its context tells besides.

score + tau (beta log p(lane | context) + gamma BM25(words of the last rows)): lanes, words, both or
neither, as `rerank` names them. Training, evaluation, replay and serving share this file. A rank is
exact up to the shortlist: the truth changes places inside its list alone, and keeps its exact rank
if it is not on it. Shapes: Q queries, C listed candidates, N bank rows, L lanes, B batch, T time, D
vector dim.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import nn

from lvm.bank.bank import Bank, FloatArray
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
from lvm.retrieval.hubness import MAX_TUNING_QUERIES
from lvm.retrieval.lanes import (
    LaneClassifier,
    check_lanes,
    classifier_of,
    context_features,
    fit_lane_classifier,
    lane_codes,
    lanes_sha256,
    means_of,
)
from lvm.retrieval.lexical import DECAY, RECENT_ROWS, RecentWords, WordIndex, ensure_word_index
from lvm.system.progress import part
from lvm.windows.planning import ContextQueries, IntArray, Queries, Windows

RankArray = NDArray[np.float64]

RERANKS = NONE, LANE, LEXICAL, HYBRID = ("none", "lane", "lexical", "hybrid")
# The weights that each order has, and the values among which they are chosen.
TERMS = {NONE: (), LANE: ("beta",), LEXICAL: ("gamma",), HYBRID: ("beta", "gamma")}
GRIDS = {
    "beta": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0),
    "gamma": (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2),
}
KINDS = PLAIN, CORRECTED = ("plain", "corrected")
SIZE = 200
# Of the gain on val that a weight above 0 needs. Log ranks show more than hits: 8 standard errors
# where Hit@5 shows 3 (textbooks, words).
STANDARD_ERRORS = 3.0
SCORE_TEMPERATURES = (0.005, 0.5)
OLD_SHARES = (0.7, 0.3)  # weights of the cosine and of the alignment


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
    """The weights of one order: beta of lanes, gamma of words; tau scales both to scores."""

    tau: float
    beta: float = 0.0
    gamma: float = 0.0


@dataclass(frozen=True)
class Clues:
    """What the contexts of Q queries tell: log p(lane | context) and their last words, if asked."""

    log_p_QL: FloatArray | None
    words_Q: Sequence[RecentWords] | None


@dataclass(frozen=True, eq=False)
class SecondStage:
    """What re-scores the candidates of a bank, whatever predictor found them.

    `code_N` are the lanes of the bank's rows, with the `classifier` of the lane that comes next;
    `index` holds the bank's words. None where `rerank` does not need them.
    """

    rerank: str
    classifier: LaneClassifier | None
    code_N: IntArray | None
    index: WordIndex | None

    def after_queries(self, queries: Queries, bank: Bank) -> Clues:
        """Return the clues of the contexts of queries of the bank."""
        log_p_QL = None
        if self.classifier is not None:
            log_p_QL = self.classifier.log_probability(context_features(queries, bank))
        return Clues(log_p_QL, None if self.index is None else self.index.after_queries(queries))

    def after_contexts(self, unit_BTD: FloatArray, text_BT: Sequence[Sequence[str]]) -> Clues:
        """Return the clues of contexts given as unit vectors, with their texts for words."""
        log_p_BL = None
        if self.classifier is not None:
            log_p_BL = self.classifier.log_probability(means_of(unit_BTD))
        index = self.index
        return Clues(log_p_BL, None if index is None else [index.after_texts(t) for t in text_BT])

    def terms(self, row_QC: IntArray, clues: Clues) -> dict[str, FloatArray]:
        """Return what is known of the candidates besides their score, (Q, C) each, by weight."""
        found = {}
        if clues.log_p_QL is not None:
            assert self.code_N is not None
            found["beta"] = np.take_along_axis(clues.log_p_QL, self.code_N[row_QC], axis=1)
        if clues.words_Q is not None:
            assert self.index is not None
            found["gamma"] = self.index.scores(clues.words_Q, row_QC)
        return found

    def scores(self, listed: Shortlist, clues: Clues, weights: Weights) -> FloatArray:
        """Return the scores of the second stage, (Q, C) float32; -inf stays -inf."""
        return summed(listed, self.terms(listed.row_QC, clues), weights)


def summed(listed: Shortlist, terms: Mapping[str, FloatArray], weights: Weights) -> FloatArray:
    """Return score + tau (the weighted sum of the terms), (Q, C) float32."""
    score_QC = listed.score_QC
    for name, term_QC in terms.items():
        score_QC = score_QC + np.float32(weights.tau * getattr(weights, name)) * term_QC
    return score_QC.astype(np.float32)


def open_stage(
    rerank: str, bank: Bank, windows: Windows, seed: int = 0, ctx: int | None = None
) -> SecondStage:
    """Return the second stage of a bank, its classifier fitted for contexts of `ctx` rows.

    Raises ValueError for a bank without two lanes of train rows, or without texts, where `rerank`
    needs them.
    """
    classifier = code_N = index = None
    if "beta" in TERMS[rerank]:
        check_lanes(bank, windows, seed)
        classifier, code_N = fit_lane_classifier(bank, windows, seed, ctx), lane_codes(bank)
    if "gamma" in TERMS[rerank]:
        index = _own_words(bank)
    return SecondStage(rerank, classifier, code_N, index)


def check_rerank(rerank: str, bank: Bank, windows: Windows, seed: int = 0) -> None:
    """Raise ValueError where `open_stage` would, before anything is fitted."""
    if "beta" in TERMS[rerank]:
        check_lanes(bank, windows, seed)
    if "gamma" in TERMS[rerank]:
        _own_words(bank)


def possible_reranks(bank: Bank, windows: Windows, seed: int = 0) -> list[str]:
    """Return the orders that the lanes and the texts of a bank allow, the richest last."""
    found = []
    for rerank in (LANE, LEXICAL, HYBRID):
        try:
            check_rerank(rerank, bank, windows, seed)
        except ValueError:
            continue
        found.append(rerank)
    return found


def _own_words(bank: Bank) -> WordIndex:
    try:
        return ensure_word_index(bank)
    except ValueError as error:
        raise ValueError(f"rerank: {error}, or use rerank={NONE}, rerank={LANE}") from None


@dataclass(frozen=True)
class StageInputs:
    """A second stage and its clues: the same for all predictors with one length of context.

    `asked` are the clues of the queries to be answered, `val_clues` those of the queries `val`, on
    which the weights are chosen. `val` has the contexts that the predictor reads, `val_removed` the
    contexts whose rows are removed from the ranking.
    """

    stage: SecondStage
    asked: Clues
    val: Queries
    val_removed: Queries
    val_clues: Clues

    def parts(self) -> list[Any]:
        """Return what tells the stage and its lanes apart from others, for `cache_key`.

        The words follow from the index and the queries.
        """
        stage, both = self.stage, (self.asked, self.val_clues)
        lanes = [] if stage.code_N is None else [stage.code_N, *(one.log_p_QL for one in both)]
        words = None if stage.index is None else [stage.index.key, RECENT_ROWS, DECAY]
        return [stage.rerank, lanes, words]


def stage_inputs(
    rerank: str, bank: Bank, windows: Windows, queries: Queries, seed: int = 0
) -> StageInputs:
    """Open the stage for contexts as long as those of `queries`; raises as `open_stage` does."""
    ctx = windows.ctx if isinstance(queries, ContextQueries) else queries.ctx
    stage = open_stage(rerank, bank, windows, seed, ctx)
    removed = windows.queries["val"].head(MAX_TUNING_QUERIES)
    val = removed.with_ctx(ctx)
    asked, tuned = (stage.after_queries(which, bank) for which in (queries, val))
    return StageInputs(stage, asked, val, removed, tuned)


@dataclass(frozen=True)
class Reranker:
    """The second stage as it is logged with a model, in one safetensors file.

    `weights` are those of each order (`rerank`) for each kind of score (KINDS); `classifier` is
    None for a bank without lanes.
    """

    classifier: LaneClassifier | None
    weights: dict[str, dict[str, Weights]]

    def stage(self, rerank: str, bank: Bank) -> SecondStage:
        """Return the stage over the model's own bank; raises ValueError if it has no weights."""
        if rerank not in self.weights:
            raise ValueError(unknown_order(rerank, tuple(self.weights)))
        has_lanes, has_words = ("beta" in TERMS[rerank]), ("gamma" in TERMS[rerank])
        classifier, code_N = (self.classifier, lane_codes(bank)) if has_lanes else (None, None)
        index = _own_words(bank) if has_words else None
        return SecondStage(rerank, classifier, code_N, index)

    def report(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return the weights as JSON values."""
        return {
            name: {kind: asdict(one) for kind, one in own.items()}
            for name, own in self.weights.items()
        }

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors: dict[str, torch.Tensor] = {}
        meta: dict[str, Any] = {"weights": self.report()}
        if self.classifier is not None:
            found = self.classifier
            arrays = {"weight": found.weight, "bias": found.bias}
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            meta |= {"codes": found.code_C.tolist(), "num_codes": found.num_codes}
            meta |= {"temperature": found.temperature}
        save_state(path, tensors, meta)

    @classmethod
    def load(cls, path: Path) -> "Reranker":
        """Read a file written by `save`; raises ValueError if it is damaged."""
        tensors, meta = load_state(path, is_hash_needed=False)
        try:
            # Files of earlier versions hold the weights of lanes alone.
            values = meta.get("weights") or {LANE: {kind: meta[kind] for kind in KINDS}}
            classifier = None
            if tensors:
                classifier = classifier_of(Fit(tensors, meta), int(meta["num_codes"]))
            return cls(classifier, _as_weights(values))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: is not a second stage ({error}); log the model again"
            ) from None


def unknown_order(rerank: str, known: Sequence[str]) -> str:
    """Return why a model cannot order by `rerank`, if it was logged for the orders `known`."""
    lacks = "texts" if LEXICAL not in known and rerank != LANE else "lanes"
    ways = " or ".join((NONE, *known))
    return f"rerank: the model was logged without {lacks}; ask with rerank={ways}"


def _as_weights(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Weights]]:
    return {name: {k: Weights(**own[k]) for k in KINDS} for name, own in values.items()}


@part("second stage")
def fit_reranker(
    model: nn.Module, bank: Bank, windows: Windows, row_correction: FloatArray, seed: int = 0
) -> Reranker | None:
    """Fit all orders that the bank allows (`possible_reranks`); None if there is none.

    The weights are chosen on val queries by `chosen_weights`.
    """
    reranks = possible_reranks(bank, windows, seed)
    if not reranks:
        return None
    richest = reranks[-1]
    stage = open_stage(richest, bank, windows, seed)

    def fit() -> Fit:
        inputs = stage_inputs(richest, bank, windows, windows.queries["val"].head(0), seed)
        groups, corrections = windows.representative_N, (None, row_correction)
        chosen = chosen_weights(model, bank, groups, inputs, corrections, reranks)
        by_order = {
            rerank: dict(zip(KINDS, (own[rerank] for own in chosen), strict=True))
            for rerank in reranks
        }
        return Fit(values=Reranker(None, by_order).report())

    digest = hashlib.sha256(np.ascontiguousarray(row_correction, np.float32).data).hexdigest()
    inputs = {"model": model_digest(model), "row_correction": digest, "seed": seed}
    inputs |= {"lanes": None if stage.code_N is None else lanes_sha256(bank)}
    inputs |= {"words": None if stage.index is None else stage.index.key}
    inputs |= {"grids": GRIDS, "scipy": installed_version("scipy")}
    found = cached_fit(windows, "second-stage", inputs, fit).values
    return Reranker(stage.classifier, _as_weights(found))


def chosen_weights(
    model: nn.Module,
    bank: Bank,
    representative_N: IntArray,
    inputs: StageInputs,
    row_corrections: Sequence[FloatArray | None] = (None,),
    reranks: Sequence[str] = (),
) -> list[dict[str, Weights]]:
    """Return the weights of each order under each row correction, chosen on val.

    tau maximises the likelihood of the true row in a softmax over its shortlist. The others start
    at 0; the one move along the GRIDS with the best Hit@5, then the best MRR@10, then the smallest
    weight is made as long as its gain is shown (`is_gain`). `reranks` are orders that the stage of
    `inputs` includes; none means its own.
    """
    prediction_QD, removed = predict_queries(model, bank, inputs.val), inputs.val_removed
    ranks = exact_ranks(prediction_QD, removed, bank, representative_N, row_corrections)
    document_Q = bank.document_N[removed.target_row_Q]
    found = []
    for correction, before in zip(row_corrections, ranks, strict=True):
        listed = shortlist(prediction_QD, removed, bank, representative_N, correction)
        terms = inputs.stage.terms(listed.row_QC, inputs.val_clues)
        search = _Search(listed, terms, before.rank_Q, document_Q)
        found.append({one: search.best(TERMS[one]) for one in reranks or [inputs.stage.rerank]})
    return found


@dataclass(frozen=True, eq=False)
class _Search:
    """The search for the weights of one kind of score on val queries."""

    listed: Shortlist
    terms: Mapping[str, FloatArray]
    rank_Q: RankArray
    document_Q: NDArray[np.integer]

    def best(self, names: Sequence[str]) -> Weights:
        """Return the weights `names`; the others are 0."""
        weights, rank_Q = Weights(self._tau), self.rank_Q
        while names:
            moves = [
                (selection_score(moved_Q), -value, tried, moved_Q)
                for name in names
                for value in GRIDS[name]
                for tried in [replace(weights, **{name: value})]
                for moved_Q in [self._ranks(tried)]
            ]
            *_, tried, moved_Q = max(moves, key=lambda move: move[:2])
            if not is_gain(moved_Q, rank_Q, self.document_Q):
                break
            weights, rank_Q = tried, moved_Q
        return weights

    def _ranks(self, weights: Weights) -> RankArray:
        score_QC = summed(self.listed, self.terms, weights)
        return reranked_ranks(self.listed, score_QC, self.rank_Q)

    @cached_property
    def _tau(self) -> float:
        return likely_temperature(self.listed)


def is_gain(after_Q: RankArray, before_Q: RankArray, document_Q: NDArray[np.integer]) -> bool:
    """Tell whether log ranks fell by more than STANDARD_ERRORS, with documents as the sample."""
    gain_Q = np.log(before_Q) - np.log(after_Q)
    _, place_Q = np.unique(document_Q, return_inverse=True)
    gain_M = np.bincount(place_Q, weights=gain_Q)
    if len(gain_M) < 2:
        return False
    error = gain_M.std(ddof=1) * np.sqrt(len(gain_M))
    return bool(gain_M.sum() > STANDARD_ERRORS * error)


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
