"""The best candidates of each query, to be ordered anew by more than their scores.

Shapes: Q queries, N bank rows, K candidates, C candidates on the list, D vector dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm.bank.store import Bank
from lvm.retrieval.competition import Competition
from lvm.retrieval.exact import SCORE_TIE
from lvm.retrieval.search import (
    QUERY_BLOCK,
    TOP_BLOCK,
    FloatArray,
    IntArray,
    checked_correction,
    merged,
    share_blocks,
    unit_predictions,
)
from lvm.windows.queries import Queries

SIZE = 200


@dataclass(frozen=True)
class Shortlist:
    """The C best candidates of each query, best first, all (Q, C).

    `row_QC` are the first rows of their duplicate groups, -1 with score -inf where there are no
    more; `is_truth_QC` marks the group of the query's target.
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
    """Return the candidates that `exact_ranks` puts first; the same groups compete.

    Which of equal scores at the end of a list is on it is left open. Raises ValueError as
    `exact_ranks` does.
    """
    unit_QD = unit_predictions(prediction_QD, bank, len(queries))
    order_Q = np.argsort(queries.target_row_Q, kind="stable")
    search = Competition.of(bank, queries.take(order_Q), representative_N)
    sorted_QD = unit_QD[torch.from_numpy(order_Q)]
    pair_N2 = checked_correction(row_correction, bank)
    num_listed = min(size, len(search.row_K))

    def best(starts: Iterator[int]) -> tuple[Tensor, Tensor]:
        return _best(starts, sorted_QD, bank, search, pair_N2, num_listed)

    found = share_blocks(best, range(0, len(search.row_K), TOP_BLOCK))
    score_QC, row_QC = found[0]
    for more_score_QC, more_row_QC in found[1:]:
        score_QC, row_QC = merged(num_listed, (score_QC, more_score_QC), (row_QC, more_row_QC))
    back_Q = np.argsort(order_Q)
    rows = row_QC.numpy()[back_Q]
    truth_Q = representative_N[queries.target_row_Q]
    return Shortlist(rows, score_QC.numpy()[back_Q], rows == truth_Q[:, None])


def _best(
    starts: Iterator[int],
    sorted_QD: Tensor,
    bank: Bank,
    search: Competition,
    pair_N2: FloatArray | None,
    num_listed: int,
) -> tuple[Tensor, Tensor]:
    """Return scores with rows, (Q, C), of the best in the blocks of one worker."""
    score_QC = torch.full((len(sorted_QD), num_listed), -torch.inf)
    row_QC = torch.full((len(sorted_QD), num_listed), -1)
    for begin in starts:
        columns = slice(begin, min(begin + TOP_BLOCK, len(search.row_K)))
        row_K = search.row_K[columns]
        block_KD = torch.from_numpy(bank.unit(row_K))
        for start in range(0, len(sorted_QD), QUERY_BLOCK):
            lines = slice(start, min(start + QUERY_BLOCK, len(sorted_QD)))
            score_QK = sorted_QD[lines] @ block_KD.T
            if pair_N2 is not None:
                scale_K, bias_K = torch.from_numpy(pair_N2[row_K].T)
                score_QK.mul_(scale_K).add_(bias_K)
            hidden_QK = search.hidden(lines, columns)
            if hidden_QK is not None:
                score_QK.masked_fill_(hidden_QK > 0, -torch.inf)
            score, column = score_QK.topk(min(num_listed, len(row_K)), dim=1)
            row = torch.from_numpy(row_K)[column]
            row = torch.where(score == -torch.inf, -1, row)
            score_QC[lines], row_QC[lines] = merged(
                num_listed, (score_QC[lines], score), (row_QC[lines], row)
            )
    return score_QC, row_QC


def ranks_anew(
    listed: Shortlist, score_QC: FloatArray, rank_Q: NDArray[np.float64], tie: float = SCORE_TIE
) -> NDArray[np.float64]:
    """Return the ranks (Q,) after the list is ordered by `score_QC`, float64.

    rank = 1 + better + ties / 2 among the list; scores closer than `tie` are equal. A truth that is
    not on the list keeps its rank of `rank_Q`.
    """
    is_listed_Q = listed.is_truth_QC.any(axis=1)
    own_score_Q = np.where(listed.is_truth_QC, score_QC, -np.inf).max(axis=1)
    is_other_QC = ~listed.is_truth_QC & (listed.row_QC >= 0)
    with np.errstate(invalid="ignore"):
        ahead_QC = score_QC - own_score_Q[:, None]
    better_Q = (is_other_QC & (ahead_QC > tie)).sum(axis=1)
    equal_Q = (is_other_QC & (np.abs(ahead_QC) <= tie)).sum(axis=1)
    return np.where(is_listed_Q, 1 + better_Q + equal_Q / 2, rank_Q)
