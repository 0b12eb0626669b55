"""Fit the free predictors on train rows; val Hit@5 chooses their settings.

A new one is a class in `lvm.models.baselines`, a name in `lvm.models.table` and a fit function in
FITS. Shapes: D vector dim, F = 4 D ridge features, T time, M stored rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor, nn

from lvm.bank.bank import Bank
from lvm.models.baselines import (
    ContextMean,
    ContextRidge,
    CopyLast,
    MovingAverage,
    NearestSuccessor,
    Ridge,
    ridge_features,
)
from lvm.models.predict import predict_queries
from lvm.models.table import FREE_MODELS
from lvm.models.weights import Fit, cached_fit
from lvm.retrieval.exact import rank_together, selection_score
from lvm.system.progress import add_products, part
from lvm.system.seeding import generator
from lvm.windows.planning import SPLITS, TRAIN, Windows, runs

FREE = tuple(FREE_MODELS)
DECAYS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Ridge penalties, as multiples of the mean squared size of a feature over all positions.
PENALTIES = (0.001, 0.01, 0.1, 1.0)
MAX_TUNING_QUERIES = 2000
# Of the ridge regression inside a context: penalties, weights beside the moving average.
CONTEXT_PENALTIES = (3.0, 30.0)
CONTEXT_WEIGHTS = (0.5, 2.0, 100.0)
MAX_CONTEXT_QUERIES = 500
MAX_RIDGE_ROWS = 200_000
SEGMENT = 2048
MAX_STORED_ROWS = 100_000  # 154 MB at 768 dims, logged with the model
STORED_SEGMENT = 512
HISTORY = (
    256  # rows read before a segment: 0.9^256, the slowest decay, is below float32's resolution
)


def fit_free_predictors(
    bank: Bank, windows: Windows, names: Sequence[str] = FREE, seed: int = 0
) -> dict[str, nn.Module]:
    """Return the free predictors named in `names`; raises ValueError for an unknown name."""
    unknown = [name for name in names if name not in FITS]
    if unknown:
        raise ValueError(f"predictor: {unknown[0]!r} is unknown; choose from {', '.join(FREE)}")
    models = {}
    for name in names:
        with part(f"fit {name}"):
            models[name] = FITS[name](bank, windows, seed).eval()
    return models


def tuned_decay(bank: Bank, windows: Windows) -> float:
    """Return the decay of the moving average with the best val Hit@5."""

    def fit() -> Fit:
        best = _best_on_val(decay_models(bank), bank, windows)
        return Fit(values={"decay": DECAYS[best]})

    return float(cached_fit(windows, "ema", {}, fit).values["decay"])


def tuned_context_ridge(bank: Bank, windows: Windows) -> ContextRidge:
    """Return the regression inside each context whose settings have the best val Hit@5.

    The decay is that of the moving average. Keys are rows or averages of that decay. One pass reads
    at most MAX_CONTEXT_QUERIES val queries and serves all weights.
    """
    decay = tuned_decay(bank, windows)

    def fit() -> Fit:
        queries = windows.queries["val"].head(MAX_CONTEXT_QUERIES)
        average_QD = predict_queries(MovingAverage(bank.dim, decay), bank, queries)
        choices, answers = [], []
        for key_decay, penalty in itertools.product((0.0, decay), CONTEXT_PENALTIES):
            ridge = ContextRidge(bank.dim, decay, key_decay, penalty)
            read_QD = predict_queries(_Reads(ridge), bank, queries)
            for weight in CONTEXT_WEIGHTS:
                sum_QD = average_QD + np.float32(weight) * read_QD
                unit_QD = sum_QD / np.linalg.norm(sum_QD, axis=1, keepdims=True)
                choices.append({"key_decay": key_decay, "penalty": penalty, "weight": weight})
                answers.append((unit_QD, (None,)))
        ranked = rank_together(answers, queries, bank, windows.representative_N)
        scores = [selection_score(ranks.rank_Q) for (ranks,) in ranked]
        return Fit(values=choices[scores.index(max(scores))])

    choice = cached_fit(windows, "context-ridge", {"decay": decay}, fit).values
    return ContextRidge(bank.dim, decay, **choice)


class _Reads(nn.Module):
    """Returns the unweighted term that a `ContextRidge` adds to its average."""

    def __init__(self, ridge: ContextRidge) -> None:
        super().__init__()
        self.ridge = ridge

    def forward(self, context_BTD: Tensor) -> Tensor:
        return self.ridge.read(context_BTD)


def decay_models(bank: Bank) -> list[MovingAverage]:
    """Return the moving averages among which `tuned_decay` chooses."""
    return [MovingAverage(bank.dim, decay) for decay in DECAYS]


def fit_ridge(bank: Bank, windows: Windows, seed: int = 0) -> Ridge:
    """Return the ridge regression of train rows on `ridge_features` of the train rows before them.

    The penalty has the best val Hit@5.
    """

    def fit() -> Fit:
        models = ridge_models(bank, windows, seed)
        best = models[_best_on_val(models, bank, windows)]
        return Fit(dict(best.state_dict()), {"alpha": best.config["alpha"]})

    found = cached_fit(windows, "ridge", {"seed": seed}, fit)
    model = Ridge(bank.dim, found.values["alpha"])
    model.load_state_dict(found.tensors)
    return model


def ridge_models(bank: Bank, windows: Windows, seed: int = 0) -> list[Ridge]:
    """Return the ridge regressions among which `fit_ridge` chooses, one per penalty.

    The normal equations are summed over segments drawn by seed, up to MAX_RIDGE_ROWS positions, so
    that memory does not grow with the bank.
    """
    moments = _Moments(bank.dim)
    for feature_TF, target_TD in ridge_pairs(bank, windows, seed):
        moments.add(feature_TF, target_TD)
        add_products(2.0 * feature_TF.size * (feature_TF.shape[1] + bank.dim))
    return [moments.solve(penalty) for penalty in PENALTIES]


def fit_nearest_successor(bank: Bank, windows: Windows, seed: int = 0) -> NearestSuccessor:
    """Return the predictor that stores train rows, at most MAX_STORED_ROWS.

    From a larger bank, segments of STORED_SEGMENT consecutive rows of one sequence are drawn, so
    that all stored rows but the last of a segment have their successor. Nothing is chosen on val.
    The fit is not cached, because copying the rows takes no longer than reading a cached copy.
    """
    segments = _train_segments(bank, windows, STORED_SEGMENT)
    order = generator(seed, "stored segments").permutation(len(segments))
    num_rows = np.cumsum([segments[place][2] - segments[place][1] for place in order])
    num_taken = max(1, int(np.searchsorted(num_rows, MAX_STORED_ROWS, side="right")))
    taken = sorted(segments[place] for place in order[:num_taken])
    row_M = np.concatenate([np.arange(first, end) for _, first, end in taken])
    run_M = np.repeat([start for start, _, _ in taken], [end - first for _, first, end in taken])
    is_end_M = np.append((np.diff(row_M) != 1) | (np.diff(run_M) != 0), True)
    model = NearestSuccessor(bank.dim, len(row_M))
    for first in range(0, len(row_M), SEGMENT):
        part = slice(first, first + SEGMENT)
        model.row_MD[part] = torch.from_numpy(bank.unit(row_M[part])).half()
    model.is_end_M.copy_(torch.from_numpy(is_end_M))
    return model


def ridge_pairs(
    bank: Bank, windows: Windows, seed: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Yield features (T, F) and their successors (T, D), both of train rows of one sequence."""
    segments = _train_segments(bank, windows, SEGMENT, skipped=1)
    num_rows = 0
    for place in generator(seed, "ridge segments").permutation(len(segments)):
        start, first, end = segments[place]
        origin = max(start, first - HISTORY)
        unit_TD = bank.unit(slice(origin, end))
        feature_1TF = ridge_features(torch.from_numpy(unit_TD[None, :-1]))
        skipped = first - 1 - origin
        yield feature_1TF[0, skipped:].numpy(), unit_TD[skipped + 1 :]
        num_rows += end - first
        if num_rows >= MAX_RIDGE_ROWS:
            return


def _train_segments(
    bank: Bank, windows: Windows, length: int, skipped: int = 0
) -> list[tuple[int, int, int]]:
    """Cut runs of train rows, without the first `skipped` of each: (start of run, first, end)."""
    run_start, run_rows = runs(bank.sequence_N.astype(np.int64) * len(SPLITS) + windows.split_N)
    in_train = windows.split_N[run_start] == TRAIN
    return [
        (start, first, min(first + length, start + rows))
        for start, rows in zip(
            run_start[in_train].tolist(), run_rows[in_train].tolist(), strict=True
        )
        for first in range(start + skipped, start + rows, length)
    ]


class _Moments:
    """Sums of products of features with features and of features with targets."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.num_rows = 0
        self.feature_F = np.zeros(4 * dim)
        self.target_D = np.zeros(dim)
        self.gram_FF = np.zeros((4 * dim, 4 * dim))
        self.cross_FD = np.zeros((4 * dim, dim))

    def add(self, feature_TF: NDArray[np.float32], target_TD: NDArray[np.float32]) -> None:
        self.num_rows += len(feature_TF)
        self.feature_F += feature_TF.sum(axis=0, dtype=np.float64)
        self.target_D += target_TD.sum(axis=0, dtype=np.float64)
        self.gram_FF += feature_TF.T @ feature_TF
        self.cross_FD += feature_TF.T @ target_TD

    def solve(self, penalty: float) -> Ridge:
        """Return the regression of centred targets on centred features."""
        mean_F, mean_D = self.feature_F / self.num_rows, self.target_D / self.num_rows
        gram_FF = self.gram_FF - self.num_rows * np.outer(mean_F, mean_F)
        cross_FD = self.cross_FD - self.num_rows * np.outer(mean_F, mean_D)
        alpha = penalty * float(self.gram_FF.trace()) / (4 * self.dim)
        gram_FF[np.diag_indices_from(gram_FF)] += alpha
        weight_FD = linalg.solve(gram_FF, cross_FD, assume_a="pos")
        model = Ridge(self.dim, alpha)
        model.weight.copy_(torch.from_numpy(weight_FD.T))
        model.bias.copy_(torch.from_numpy(mean_D - mean_F @ weight_FD))
        return model


def _best_on_val(models: Sequence[nn.Module], bank: Bank, windows: Windows) -> int:
    """Return the index of the model with the best val Hit@5, then MRR@10, then the first.

    The frozen order of the val queries is random: the first MAX_TUNING_QUERIES are a random sample,
    and the choice on it agrees with the choice on all queries (benchmarks/choices.py).
    """
    queries = windows.queries["val"].head(MAX_TUNING_QUERIES)
    answers = [(predict_queries(model, bank, queries), (None,)) for model in models]
    ranked = rank_together(answers, queries, bank, windows.representative_N)
    scores = [selection_score(ranks.rank_Q) for (ranks,) in ranked]
    return max(range(len(models)), key=lambda place: (scores[place], -place))


FITS: dict[str, Callable[[Bank, Windows, int], nn.Module]] = {
    "copy-last": lambda bank, windows, seed: CopyLast(bank.dim),
    "ema": lambda bank, windows, seed: MovingAverage(bank.dim, tuned_decay(bank, windows)),
    "context-mean": lambda bank, windows, seed: ContextMean(bank.dim),
    "ridge": fit_ridge,
    "nn-successor": fit_nearest_successor,
    "context-ridge": lambda bank, windows, seed: tuned_context_ridge(bank, windows),
}
