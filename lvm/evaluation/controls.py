"""Control experiments of an evaluation: context length, order of rows, model parts.

Only shortened contexts on the same queries show whether a long context helps; neither two models
trained at two lengths nor the other controls do. Shapes: Q queries, N bank rows, D vector dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.evaluation.free_predictors import fit_ridge
from lvm.evaluation.metrics import (
    LEVEL,
    document_interval,
    figures,
    hit_at,
    holm,
    paired_difference,
    reciprocal_rank_at,
)
from lvm.models.predict import predict_queries, predict_shuffled
from lvm.models.skip import Skip, without
from lvm.retrieval.exact import rank_together
from lvm.system.atomic import jsonable
from lvm.system.progress import part
from lvm.windows.planning import SPLITS, Queries, Windows, make_queries, runs

CONTEXTS = (1, 5, 20, 100, 500, 1000, 2000)
MAX_QUERIES = 2000
MAX_REVERSED = 1000
MAX_SHUFFLED_ROWS = 200_000  # queries of shuffled contexts share no pass: 200 queries at ctx 1000
RIDGE_ROWS = 256  # on each side of a target; older rows weigh less than 1e-11 in the ridge
RankArray = NDArray[np.float64]
LAST_ROWS = 20


@dataclass(frozen=True)
class Questions:
    """Queries and the plan under which they are ranked."""

    bank: Bank
    windows: Windows
    queries: Queries

    def head(self, num_queries: int) -> "Questions":
        return replace(self, queries=self.queries.head(num_queries))

    def ranks(self, *predictions: FloatArray) -> list[RankArray]:
        """Return the plain filtered ranks (Q,) of predictions (Q, D), in one pass of the bank.

        The rows of the queries' full contexts are removed, even if the predictor read fewer.
        """
        answers = [(prediction_QD, (None,)) for prediction_QD in predictions]
        groups = self.windows.representative_N
        ranked = rank_together(answers, self.queries, self.bank, groups)
        return [ranks.rank_Q for (ranks,) in ranked]

    def figures(self, rank_Q: RankArray) -> dict[str, Any]:
        """Return the figures with their intervals by document."""
        interval = document_interval(rank_Q, self.document_Q, self.windows.seed)
        return {**figures(rank_Q), "ci95": interval}

    def differences(self, rank_Q: RankArray, other_Q: RankArray) -> dict[str, Any]:
        """Return the paired differences rank - other in Hit@5 and MRR@10."""
        pairs = {
            "hit_at_5_difference": (hit_at(rank_Q, 5), hit_at(other_Q, 5)),
            "mrr_at_10_difference": (reciprocal_rank_at(rank_Q), reciprocal_rank_at(other_Q)),
        }
        seed = self.windows.seed
        return {
            name: vars(paired_difference(*values, self.document_Q, seed))
            for name, values in pairs.items()
        }

    def size(self) -> dict[str, int]:
        return {"queries": len(self.queries), "documents": len(np.unique(self.document_Q))}

    @property
    def document_Q(self) -> NDArray[np.int32]:
        return self.bank.document_N[self.queries.target_row_Q]


def run_controls(
    model: nn.Module,
    bank: Bank,
    windows: Windows,
    queries: Queries,
    rank_Q: RankArray,
    ridge: bool = True,
) -> dict[str, Any]:
    """Return the report of all controls on the first MAX_QUERIES of `queries`, as JSON values.

    `rank_Q` holds the plain filtered ranks of the predictor with its full context. Keys: queries,
    documents, ctx, `context` (one entry per length, the full one last), `shuffled`,
    `reversed_ridge` (None without `ridge`, or if no target has rows on both sides). The last two
    use fewer queries, whose number is in their entries.
    """
    asked = Questions(bank, windows, queries).head(MAX_QUERIES)
    full_Q = rank_Q[: len(asked.queries)]
    report = {
        **asked.size(),
        "ctx": queries.ctx,
        "context": truncated(model, asked, full_Q),
        "shuffled": shuffled(model, asked, full_Q),
        "reversed_ridge": reversed_ridge(asked.head(MAX_REVERSED)) if ridge else None,
    }
    return dict(jsonable(report))


@part("shorter contexts")
def truncated(model: nn.Module, asked: Questions, full_Q: RankArray) -> list[dict[str, Any]]:
    """Evaluate with only the last 1, 5, 20, ... rows, for each length below the full context.

    For a context of L rows, `predict_queries` reads the last 0.8 L rows or more, exactly L for L up
    to 5. Targets, candidates and removed rows are those of the full context. Differences are short
    - full; `p_holm` adjusts the p-value of Hit@5 over all lengths.
    """
    ctx = asked.queries.ctx
    lengths = [length for length in CONTEXTS if length < ctx]
    shortened = [asked.queries.with_ctx(length) for length in lengths]
    predictions = [predict_queries(model, asked.bank, short) for short in shortened]
    entries = []
    for length, rank_Q in zip(lengths, asked.ranks(*predictions), strict=True):
        entry = {"ctx": length, **asked.figures(rank_Q), **asked.differences(rank_Q, full_Q)}
        entries.append(entry)
    p_values = holm([entry["hit_at_5_difference"]["p_value"] for entry in entries])
    for entry, p_value in zip(entries, p_values, strict=True):
        entry["p_holm"] = float(p_value)
    return [*entries, {"ctx": ctx, **asked.figures(full_Q)}]


def longest_beaten(controls: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of the longest shortened context that the full one significantly beats."""
    beaten = None
    for entry in controls["context"][:-1]:
        high = entry["hit_at_5_difference"]["high"]
        if high is not None and high < 0 and entry["p_holm"] < LEVEL:
            beaten = entry
    return beaten


@part("shuffled contexts")
def shuffled(model: nn.Module, asked: Questions, full_Q: RankArray) -> dict[str, Any]:
    """Evaluate with all rows but the last permuted; differences are shuffled - ordered.

    Only the first queries are used, up to MAX_SHUFFLED_ROWS context rows in all.
    """
    num_rows = np.cumsum(asked.queries.target_row_Q - asked.queries.first_row_Q)
    num_queries = max(1, int(np.searchsorted(num_rows, MAX_SHUFFLED_ROWS, side="right")))
    part = asked.head(num_queries)
    ordered_Q = full_Q[:num_queries]
    prediction_QD = predict_shuffled(model, part.bank, part.queries, part.windows.seed)
    (rank_Q,) = part.ranks(prediction_QD)
    return {
        **part.size(),
        **part.figures(rank_Q),
        "ordered": part.figures(ordered_Q),
        **part.differences(rank_Q, ordered_Q),
    }


@part("reversed ridge")
def reversed_ridge(asked: Questions) -> dict[str, Any] | None:
    """Compare a ridge with one fitted on the reversed bank; differences are forward - backward.

    Both predict the same rows from equally many rows (at most RIDGE_ROWS) before or after them. The
    rows after a target end with its split. For a text that is equally predictable in both
    directions the difference is zero.
    """
    bank, queries = asked.bank, asked.queries
    end_N = _split_end_N(bank, asked.windows)
    target_row_Q = queries.target_row_Q
    before_Q = target_row_Q - bank.sequence_start_N()[target_row_Q]
    after_Q = end_N[target_row_Q] - target_row_Q - 1
    num_rows_Q = np.minimum(np.minimum(before_Q, after_Q), RIDGE_ROWS)
    has_rows_Q = num_rows_Q > 0
    if not has_rows_Q.any():
        return None
    number_Q, target_row_Q, num_rows_Q = (
        values_Q[has_rows_Q] for values_Q in (queries.query_Q, target_row_Q, num_rows_Q)
    )
    start_Q = target_row_Q - num_rows_Q
    forward = replace(asked, queries=make_queries(number_Q, target_row_Q, start_Q, RIDGE_ROWS))
    mirror_Q = bank.num_rows - 1 - target_row_Q
    backward = Questions(
        *mirrored(bank, asked.windows),
        make_queries(number_Q, mirror_Q, mirror_Q - num_rows_Q, RIDGE_ROWS),
    )
    ranked = []
    for one in (forward, backward):
        ridge = fit_ridge(one.bank, one.windows, one.windows.seed)
        ranked += one.ranks(predict_queries(ridge, one.bank, one.queries))
    forward_Q, backward_Q = ranked
    return {
        **forward.size(),
        "forward": forward.figures(forward_Q),
        "backward": forward.figures(backward_Q),
        **forward.differences(forward_Q, backward_Q),
    }


def mirrored(bank: Bank, windows: Windows) -> tuple[Bank, Windows]:
    """Return the reversed bank with a plan for fits on it.

    Row i becomes row N - 1 - i. The plan has the split, the duplicate groups and the val queries,
    whose contexts end with their split.
    """
    last_row = bank.num_rows - 1
    backward = replace(
        bank,
        vectors=bank.vectors[::-1],
        sequence_N=bank.sequence_N[::-1],
        document_N=bank.document_N[::-1],
        lane_N=None if bank.lane_N is None else bank.lane_N[::-1],
    )
    last_of_group_N = np.zeros(bank.num_rows, np.int64)
    last_of_group_N[windows.representative_N] = np.arange(bank.num_rows)  # the last one stays
    val = windows.queries["val"]
    start_Q = bank.num_rows - _split_end_N(bank, windows)[val.target_row_Q]
    mirror_Q = last_row - val.target_row_Q
    seen = np.flatnonzero(mirror_Q > start_Q)
    queries = make_queries(val.query_Q[seen], mirror_Q[seen], start_Q[seen], val.ctx)
    plan = replace(
        windows,
        split_N=windows.split_N[::-1],
        representative_N=last_row - last_of_group_N[windows.representative_N][::-1],
        queries={"val": queries},
        sha256=f"mirrored {windows.sha256}",
    )
    return backward, plan


def _split_end_N(bank: Bank, windows: Windows) -> NDArray[np.int64]:
    """Return for each row the end of its run of rows of one sequence and one split."""
    start_R, rows_R = runs(bank.sequence_N.astype(np.int64) * len(SPLITS) + windows.split_N)
    return np.repeat(start_R + rows_R, rows_R)


@part("ablations")
def run_ablations(
    model: Skip, bank: Bank, windows: Windows, queries: Queries, rank_Q: RankArray
) -> dict[str, Any]:
    """Return the report of all ablations on the first MAX_QUERIES of `queries`, as JSON values.

    `rank_Q` holds the plain filtered ranks of the whole predictor. Keys: queries, documents, `full`
    (its figures), `without`: one entry per part with the figures of the predictor without it; the
    part `older_rows` is all but the last LAST_ROWS rows of the context. The other weights are not
    trained again. Differences are without - full; `p_holm` adjusts the p-value of Hit@5 over all
    parts.
    """
    asked = Questions(bank, windows, queries).head(MAX_QUERIES)
    full_Q = rank_Q[: len(asked.queries)]
    predictors: list[tuple[str, Skip, Queries]] = [
        (part, without(model, part), asked.queries) for part in model.ablations
    ]
    if asked.queries.ctx > LAST_ROWS:
        predictors.append(("older_rows", model, asked.queries.with_ctx(LAST_ROWS)))
    answers = [predict_queries(part, bank, short) for _, part, short in predictors]
    entries: list[dict[str, Any]] = [
        {"part": name, **asked.figures(part_Q), **asked.differences(part_Q, full_Q)}
        for (name, _, _), part_Q in zip(predictors, asked.ranks(*answers), strict=True)
    ]
    p_values = holm([entry["hit_at_5_difference"]["p_value"] for entry in entries])
    for entry, p_value in zip(entries, p_values, strict=True):
        entry["p_holm"] = float(p_value)
    report = {**asked.size(), "full": asked.figures(full_Q), "without": entries}
    return dict(jsonable(report))
