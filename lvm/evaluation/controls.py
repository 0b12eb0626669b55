"""Controls of an evaluation: what a predictor owes to the length, to the order of its context.

Truncated contexts on the same queries say whether context pays; nothing else here does, least of
all two models trained at two lengths. Shapes: Q queries, N bank rows, D vector dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.free_predictors import fit_ridge
from lvm.evaluation.intervals import LEVEL, document_interval, holm, paired_difference
from lvm.evaluation.metrics import figures, hit_at, reciprocal_rank_at
from lvm.prediction.predict import predict_queries, predict_shuffled
from lvm.retrieval.exact import exact_ranks
from lvm.system.atomic import jsonable
from lvm.windows.planning import SPLITS, Windows, runs
from lvm.windows.queries import Queries, make_queries

CONTEXTS = (1, 5, 20, 100, 500, 1000, 2000)
MAX_QUERIES = 2000
MAX_SHUFFLED_ROWS = 512_000  # no two shuffled contexts share a pass: about 500 queries at ctx 1000
RIDGE_ROWS = 256  # on either side of a target; older rows weigh less than 1e-11 in the ridge

Ranks = NDArray[np.float64]


@dataclass(frozen=True)
class Questions:
    """Queries with the plan they are ranked under."""

    bank: Bank
    windows: Windows
    queries: Queries

    def head(self, num_queries: int) -> "Questions":
        return replace(self, queries=self.queries.head(num_queries))

    def ranks(self, prediction_QD: NDArray[np.float32]) -> Ranks:
        """Return the plain filtered ranks; the rows of these queries' contexts are removed."""
        groups = self.windows.representative_N
        return exact_ranks(prediction_QD, self.queries, self.bank, groups)[0].rank_Q

    def figures(self, rank_Q: Ranks) -> dict[str, Any]:
        """Return the figures with their intervals by document."""
        interval = document_interval(rank_Q, self.document_Q, self.windows.seed)
        return {**figures(rank_Q), "ci95": interval}

    def differences(self, rank_Q: Ranks, other_Q: Ranks) -> dict[str, Any]:
        """Return the paired differences rank - other of Hit@5, MRR@10."""
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
    model: nn.Module, bank: Bank, windows: Windows, queries: Queries, rank_Q: Ranks
) -> dict[str, Any]:
    """Return the report of all controls on the first MAX_QUERIES of `queries`, as JSON values.

    `rank_Q` holds the plain filtered ranks of the predictor with its full context. Keys: queries,
    documents, ctx, `context` (one entry a length, the full one last), `shuffled`, `reversed_ridge`
    (None where no target has rows on both sides).
    """
    asked = Questions(bank, windows, queries).head(MAX_QUERIES)
    full_Q = rank_Q[: len(asked.queries)]
    report = {
        **asked.size(),
        "ctx": queries.ctx,
        "context": truncated(model, asked, full_Q),
        "shuffled": shuffled(model, asked, full_Q),
        "reversed_ridge": reversed_ridge(asked),
    }
    return dict(jsonable(report))


def truncated(model: nn.Module, asked: Questions, full_Q: Ranks) -> list[dict[str, Any]]:
    """Ask with the last 1, 5, 20, ... rows alone, below the full context.

    The predictions come from `predict_queries`, so that a context of L rows is read with its last
    0.8 L rows or more, exactly L up to 5. Targets, candidates, removed rows stay those of the full
    context. Differences are short - full, `p_holm` is that of Hit@5 over all lengths.
    """
    ctx = asked.queries.ctx
    entries = []
    for length in (length for length in CONTEXTS if length < ctx):
        short = asked.queries.with_ctx(length)
        rank_Q = asked.ranks(predict_queries(model, asked.bank, short, progress=True))
        entry = {"ctx": length, **asked.figures(rank_Q), **asked.differences(rank_Q, full_Q)}
        entries.append(entry)
    p_values = holm([entry["hit_at_5_difference"]["p_value"] for entry in entries])
    for entry, p_value in zip(entries, p_values, strict=True):
        entry["p_holm"] = float(p_value)
    return [*entries, {"ctx": ctx, **asked.figures(full_Q)}]


def longest_beaten(controls: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of the longest shortened context that the full one is shown to beat."""
    beaten = None
    for entry in controls["context"][:-1]:
        high = entry["hit_at_5_difference"]["high"]
        if high is not None and high < 0 and entry["p_holm"] < LEVEL:
            beaten = entry
    return beaten


def shuffled(model: nn.Module, asked: Questions, full_Q: Ranks) -> dict[str, Any]:
    """Ask with the rows permuted, the last one kept in its place; differences shuffled - ordered.

    As many queries as have MAX_SHUFFLED_ROWS rows of context together.
    """
    num_rows = np.cumsum(asked.queries.target_row_Q - asked.queries.first_row_Q)
    num_queries = max(1, int(np.searchsorted(num_rows, MAX_SHUFFLED_ROWS, side="right")))
    part = asked.head(num_queries)
    ordered_Q = full_Q[:num_queries]
    prediction_QD = predict_shuffled(model, part.bank, part.queries, part.windows.seed)
    rank_Q = part.ranks(prediction_QD)
    return {
        **part.size(),
        **part.figures(rank_Q),
        "ordered": part.figures(ordered_Q),
        **part.differences(rank_Q, ordered_Q),
    }


def reversed_ridge(asked: Questions) -> dict[str, Any] | None:
    """Compare a ridge with one that was fitted backwards, asked for the row before its context.

    Both are asked for the same rows, from equally many rows before or after each, RIDGE_ROWS at
    most. The rows after it end with the target's split. Differences are forward - backward; a text
    that is as predictable in either direction has none.
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
    forward_Q, backward_Q = (_ridge_ranks(one) for one in (forward, backward))
    return {
        **forward.size(),
        "forward": forward.figures(forward_Q),
        "backward": forward.figures(backward_Q),
        **forward.differences(forward_Q, backward_Q),
    }


def mirrored(bank: Bank, windows: Windows) -> tuple[Bank, Windows]:
    """Return the bank read from its last row to its first, with the plan for fits on it.

    Row i becomes row N - 1 - i. The plan has split, duplicate groups, val queries; the contexts of
    these end with their split.
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


def _ridge_ranks(asked: Questions) -> Ranks:
    ridge = fit_ridge(asked.bank, asked.windows, asked.windows.seed)
    return asked.ranks(predict_queries(ridge, asked.bank, asked.queries, progress=True))


def _split_end_N(bank: Bank, windows: Windows) -> NDArray[np.int64]:
    """Return the row after the last of each row's run of one sequence in one split."""
    start_R, rows_R = runs(bank.sequence_N.astype(np.int64) * len(SPLITS) + windows.split_N)
    return np.repeat(start_R + rows_R, rows_R)
