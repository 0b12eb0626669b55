"""Exact ranks in a whole bank, block by block.

Shapes: Q queries, N bank rows, K candidates (one bank row per duplicate group), D vector dim.
Scores are cosines; a row correction (N, 2) makes them scale * cosine + bias.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm.bank.store import Bank
from lvm.retrieval.competition import Competition
from lvm.retrieval.search import (
    FloatArray,
    IntArray,
    checked_correction,
    share_blocks,
    unit_predictions,
)
from lvm.windows.queries import Queries

SCORE_TIE = 1e-6  # float32 cosines closer than this are ties
# Score tile of 2 MB: it stays in the last-level cache with its mask, so that counting costs a few
# per cent of the matrix product (measured on two AMD EPYC cores with 32 MB of L3).
QUERY_BLOCK = 256
BANK_BLOCK = 2048


@dataclass(frozen=True)
class Ranks:
    """Exact ranks of the truths, all (Q,).

    `rank_Q` float64 is filtered (the groups that lie wholly in the query's context do not compete),
    `rank_raw_Q` is not; `top_row_Q` int64 is the best row of the filtered ranking: the target where
    no candidate is better, a group's first row otherwise.
    """

    rank_Q: NDArray[np.float64]
    rank_raw_Q: NDArray[np.float64]
    top_row_Q: IntArray


def exact_ranks(
    prediction_QD: FloatArray,
    queries: Queries,
    bank: Bank,
    representative_N: IntArray,
    row_corrections: Sequence[FloatArray | None] = (None,),
    progress: bool = False,
) -> list[Ranks]:
    """Rank each query's target among all duplicate groups of the bank, under each row correction.

    rank = 1 + number of better groups + ties / 2, where a group scores what its first row scores;
    scores within SCORE_TIE tie. One pass over the bank serves all corrections (None: plain cosine).
    A zero prediction ties with everything. Raises ValueError on predictions that are not finite or
    have another shape, on corrections of another shape.
    """
    unit_QD = unit_predictions(prediction_QD, bank, len(queries))
    order_Q = np.argsort(queries.target_row_Q, kind="stable")
    search = Competition.of(bank, queries.take(order_Q), representative_N)
    unit_QD = unit_QD[torch.from_numpy(order_Q)]
    cosine_Q = _truth_cosines(unit_QD, bank, representative_N[search.target_row_Q])
    corrections = [checked_correction(pair_N2, bank) for pair_N2 in row_corrections]

    def count(starts: Iterator[int]) -> list[_Tally]:
        tallies = [_Tally(search, cosine_Q, pair_N2) for pair_N2 in corrections]
        tile = torch.empty(3, QUERY_BLOCK * BANK_BLOCK)
        for begin in starts:
            _count_block(begin, unit_QD, bank, tallies, tile)
        return tallies

    starts = range(0, len(search.row_K), BANK_BLOCK)
    by_worker = share_blocks(count, starts, "rank" if progress else None)
    return [_Tally.merged(list(tallies)).ranks(order_Q) for tallies in zip(*by_worker, strict=True)]


def _count_block(
    begin: int, unit_QD: Tensor, bank: Bank, tallies: list["_Tally"], tile: Tensor
) -> None:
    """Score one block of candidates against all queries, tile by tile."""
    search = tallies[0].search
    columns = slice(begin, min(begin + BANK_BLOCK, len(search.row_K)))
    block_KD = torch.from_numpy(bank.unit(search.row_K[columns]))
    for start in range(0, len(unit_QD), QUERY_BLOCK):
        lines = slice(start, min(start + QUERY_BLOCK, len(unit_QD)))
        part_QD = unit_QD[lines]
        cosine, score, mask = _shaped(tile, len(part_QD), len(block_KD))
        torch.matmul(part_QD, block_KD.T, out=cosine)
        hidden_QK = search.hidden(lines, columns)
        for tally in tallies:
            tally.add(lines, columns, (cosine, score, mask), hidden_QK)


class _Tally:
    """Counts of better or equal candidates under one row correction."""

    def __init__(
        self, search: Competition, cosine_Q: NDArray[np.float64], pair_N2: FloatArray | None
    ):
        self.search = search
        self.pair_2K = None
        truth_Q = cosine_Q
        if pair_N2 is not None:
            pair_K2 = pair_N2[search.row_K]
            self.pair_2K = torch.from_numpy(pair_K2.T.copy())
            scale_Q, bias_Q = pair_K2[search.own_column_Q].astype(np.float64).T
            truth_Q = scale_Q * cosine_Q + bias_Q
        self.thresholds = [
            torch.from_numpy((truth_Q + shift).astype(np.float32))[:, None]
            for shift in (SCORE_TIE, -SCORE_TIE)
        ]
        # Q, (better, better or equal); all candidates, or those hidden by the context
        self.num_all_Q2 = torch.zeros(len(truth_Q), 2, dtype=torch.float64)
        self.num_hidden_Q2 = torch.zeros_like(self.num_all_Q2)
        self.best_score_Q = torch.full((len(truth_Q),), -torch.inf)
        self.best_column_Q = torch.zeros(len(truth_Q), dtype=torch.int64)

    def add(
        self,
        lines: slice,
        columns: slice,
        tile: tuple[Tensor, Tensor, Tensor],
        hidden_QK: Tensor | None,
    ) -> None:
        """Count one tile of cosines; `tile` holds them with two scratch tiles of the same shape."""
        cosine_QK, score_QK, mask_QK = tile
        if self.pair_2K is None:
            score_QK.copy_(cosine_QK)
        else:
            scale_K, bias_K = self.pair_2K[:, columns]
            torch.addcmul(bias_K, cosine_QK, scale_K, out=score_QK)
        own_Q = self.search.own_column_Q[lines] - columns.start
        mine = np.flatnonzero((own_Q >= 0) & (own_Q < score_QK.shape[1]))
        score_QK[torch.from_numpy(mine), torch.from_numpy(own_Q[mine])] = -torch.inf
        for side, (compare, limit_Q1) in enumerate(
            zip((torch.gt, torch.ge), self.thresholds, strict=True)
        ):
            compare(score_QK, limit_Q1[lines], out=mask_QK)
            self.num_all_Q2[lines, side] += mask_QK.sum(dim=1)
            if hidden_QK is not None:
                self.num_hidden_Q2[lines, side] += mask_QK.mul_(hidden_QK).sum(dim=1)
        if hidden_QK is not None:
            score_QK.masked_fill_(hidden_QK > 0, -torch.inf)
        self._keep_best(lines, columns.start, score_QK)

    def _keep_best(self, lines: slice, first_column: int, score_QK: Tensor) -> None:
        """Take the arg-max only of the few queries whose best candidate is in this tile."""
        peak_Q = score_QK.amax(dim=1)
        higher = torch.nonzero(peak_Q > self.best_score_Q[lines]).squeeze(1)
        if len(higher):
            self.best_score_Q[lines][higher] = peak_Q[higher]
            self.best_column_Q[lines][higher] = first_column + score_QK[higher].argmax(dim=1)

    @classmethod
    def merged(cls, tallies: list["_Tally"]) -> "_Tally":
        """Add up the counts of all workers; the best candidate is the first of equal ones."""
        total = tallies[0]
        for other in tallies[1:]:
            total.num_all_Q2 += other.num_all_Q2
            total.num_hidden_Q2 += other.num_hidden_Q2
            equal = other.best_score_Q == total.best_score_Q
            earlier = equal & (other.best_column_Q < total.best_column_Q)
            wins = (other.best_score_Q > total.best_score_Q) | earlier
            total.best_score_Q[wins] = other.best_score_Q[wins]
            total.best_column_Q[wins] = other.best_column_Q[wins]
        return total

    def ranks(self, order_Q: IntArray) -> Ranks:
        """Return the ranks in the callers' order of queries."""
        num_Q2 = (self.num_all_Q2 - self.num_hidden_Q2).numpy()
        top_row_Q = self.search.row_K[self.best_column_Q.numpy()]
        top_row_Q = np.where(num_Q2[:, 0] == 0, self.search.target_row_Q, top_row_Q)
        back = np.argsort(order_Q)
        return Ranks(
            1 + num_Q2.mean(axis=1)[back],
            1 + self.num_all_Q2.numpy().mean(axis=1)[back],
            top_row_Q[back],
        )


def _truth_cosines(unit_QD: Tensor, bank: Bank, row_Q: IntArray) -> NDArray[np.float64]:
    cosine_Q = np.empty(len(row_Q))
    for start in range(0, len(row_Q), BANK_BLOCK):
        lines = slice(start, start + BANK_BLOCK)
        truth_QD = bank.unit(row_Q[lines])
        cosine_Q[lines] = np.einsum("qd,qd->q", unit_QD[lines].numpy(), truth_QD, dtype=np.float64)
    return cosine_Q


def _shaped(tile: Tensor, num_queries: int, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous views of the three scratch tiles, as large as this tile needs."""
    views = tile[:, : num_queries * num_candidates].view(3, num_queries, num_candidates)
    return views[0], views[1], views[2]
