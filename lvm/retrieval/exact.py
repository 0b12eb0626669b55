"""Exact ranks in a whole bank, for one predictor or for several in one pass.

`lvm.retrieval.counting` counts the candidates. Shapes: Q queries, N bank rows, D vector dim. Scores
are cosines; a row correction (N, 2) makes them scale * cosine + bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lvm.bank.store import Bank
from lvm.retrieval.counting import AUTO, Competition, Count, Job, count_candidates
from lvm.retrieval.search import FloatArray, IntArray, checked_correction, unit_predictions
from lvm.windows.planning import Queries


@dataclass(frozen=True)
class Ranks:
    """Exact ranks of the truths, all (Q,).

    `rank_Q` float64 is filtered: groups wholly in the query's context do not compete. In
    `rank_raw_Q` all groups compete. `top_row_Q` int64 is the best row of the filtered ranking: the
    target if no candidate is better, else the first row of the best group.
    """

    rank_Q: NDArray[np.float64]
    rank_raw_Q: NDArray[np.float64]
    top_row_Q: IntArray


def selection_score(rank_Q: NDArray[np.float64]) -> tuple[float, float]:
    """Return (Hit@5, MRR@10); the largest wins a choice on val, so MRR@10 breaks ties of Hit@5."""
    reciprocal_Q = np.where(rank_Q <= 10, 1 / rank_Q, 0.0)
    return float((rank_Q <= 5).mean()), float(reciprocal_Q.mean())


def exact_ranks(
    prediction_QD: FloatArray,
    queries: Queries,
    bank: Bank,
    representative_N: IntArray,
    row_corrections: Sequence[FloatArray | None] = (None,),
    product: str = AUTO,
) -> list[Ranks]:
    """Rank each query's target among all duplicate groups of the bank, under each row correction.

    rank = 1 + number of better groups + ties / 2. The score of a group is the score of its first
    row; scores within SCORE_TIE are ties. A zero prediction ties with everything. A row correction
    of None means plain cosines. `product` changes the speed, never a rank.

    Raises ValueError for predictions that are not finite or have another shape, and for corrections
    of another shape.
    """
    answers = [(prediction_QD, row_corrections)]
    return rank_together(answers, queries, bank, representative_N, product)[0]


def rank_together(
    answers: Sequence[tuple[FloatArray, Sequence[FloatArray | None]]],
    queries: Queries,
    bank: Bank,
    representative_N: IntArray,
    product: str = AUTO,
) -> list[list[Ranks]]:
    """Return `exact_ranks` for several predictors on the same queries, in one pass of the bank.

    `answers` holds the predictions (Q, D) and the row corrections of each predictor.
    """
    order_Q = np.argsort(queries.target_row_Q, kind="stable")
    competition = Competition.of(bank, queries.take(order_Q), representative_N)
    jobs = []
    for prediction_QD, row_corrections in answers:
        unit_QD = unit_predictions(prediction_QD, bank, len(queries))[torch.from_numpy(order_Q)]
        corrections = [checked_correction(pair_N2, bank) for pair_N2 in row_corrections]
        jobs.append(Job.of(unit_QD, competition, bank, corrections))
    by_job = count_candidates(jobs, bank, product)
    return [[_ranks(parts, order_Q) for parts in by_correction] for by_correction in by_job]


def _ranks(parts: Sequence[Count], order_Q: IntArray) -> Ranks:
    """Return the ranks of all queries in the caller's order."""
    rank_2Q, top_row_Q = np.empty((2, len(order_Q))), np.empty(len(order_Q), np.int64)
    for one in parts:
        place_Q, competition = order_Q[one.job.place_Q], one.job.competition
        for kind, num_Q2 in enumerate((one.num_all_Q2 - one.num_hidden_Q2, one.num_all_Q2)):
            rank_2Q[kind, place_Q] = 1 + num_Q2[:, 0] + num_Q2[:, 1] / 2
        best_row_Q = competition.row_K[one.best_column_Q]
        is_found_Q = one.best_column_Q >= 0
        top_row_Q[place_Q] = np.where(is_found_Q, best_row_Q, competition.target_row_Q)
    return Ranks(rank_2Q[0], rank_2Q[1], top_row_Q)
