"""Exact ranks in a whole bank, and its exact nearest rows.

`lvm.retrieval.counting` counts the candidates of a rank. Shapes: Q queries, N bank rows, K
candidates, B candidates of one block, k rows returned, D vector dim. Scores are cosines; a row
correction (N, 2) makes them scale * cosine + bias.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm.bank.bank import Bank, FloatArray, SharedBank, share_rows
from lvm.retrieval.counting import (
    AUTO,
    BF16,
    FP32,
    TILES,
    Block,
    Competition,
    Count,
    Job,
    Tally,
    split_by_doubt,
)
from lvm.system.processes import bf16_speedup, share_blocks
from lvm.system.progress import add_products
from lvm.windows.planning import IntArray, Queries

# Returns a mask of the candidates of a tile that do not compete; None if all compete.
Hidden = Callable[[slice, slice], Tensor | None]

QUERY_BLOCK = 512
TOP_BLOCK = 16384


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


def _ranks(parts: Sequence[tuple[Job, Tally]], order_Q: IntArray) -> Ranks:
    """Return the ranks of all queries in the caller's order."""
    rank_2Q, top_row_Q = np.empty((2, len(order_Q))), np.empty(len(order_Q), np.int64)
    for job, one in parts:
        place_Q, competition = order_Q[job.place_Q], job.competition
        for kind, num_Q2 in enumerate((one.num_all_Q2 - one.num_hidden_Q2, one.num_all_Q2)):
            rank_2Q[kind, place_Q] = 1 + num_Q2[:, 0] + num_Q2[:, 1] / 2
        best_row_Q = competition.row_K[one.best_column_Q]
        is_found_Q = one.best_column_Q >= 0
        top_row_Q[place_Q] = np.where(is_found_Q, best_row_Q, competition.target_row_Q)
    return Ranks(rank_2Q[0], rank_2Q[1], top_row_Q)


def count_candidates(
    jobs: Sequence[Job], bank: Bank, product: str = AUTO
) -> list[list[list[tuple[Job, Tally]]]]:
    """Return the counts of each job under each of its row corrections, in one pass of the bank.

    The counts of a job come in parts that together cover its queries: one counted by bf16, one by
    float32. All jobs have the same queries. Processes that assist this one count in their share of
    the blocks; counts are whole numbers, so their sums do not depend on the shares.
    """
    if product == AUTO:
        product = fastest_product()
    parts = [split_by_doubt(job, bank) if product == BF16 else [job] for job in jobs]
    task = CountTask([part for own in parts for part in own], SharedBank(bank), product)
    total, *others = share_rows(bank, task)
    add_products(sum(2.0 * job.unit_QD.numel() for job in jobs) * len(jobs[0].competition.row_K))
    for other in others:
        _merge(total, other)
    by_part = iter(total)
    return [
        [list(zip(own, column, strict=True)) for column in zip(*tallies, strict=True)]
        for own, tallies in [(own, [next(by_part) for _ in own]) for own in parts]
    ]


@dataclass(frozen=True)
class CountTask:
    """Counting for some jobs among the candidates, which processes and their threads share."""

    jobs: list[Job]
    bank: SharedBank
    product: str

    def run(self, rank: int, size: int) -> list[list[Tally]]:
        """Return the tallies of each job under each correction, of every `size`-th block."""
        row_K, bank = self.jobs[0].competition.row_K, self.bank.bank
        device = counting_device()
        num_queries, num_rows = TILES[device.type]
        on_device = [job.on(device) for job in self.jobs]

        def count(starts: Iterator[int]) -> list[list[Tally]]:
            counts = [[Count(job, pair_N2) for pair_N2 in job.corrections] for job in on_device]
            tile = torch.empty(2, num_queries * num_rows, device=device)
            for begin in starts:
                columns = slice(begin, min(begin + num_rows, len(row_K)))
                unit_bD = bank.unit_ascending(row_K[columns])
                block = Block.of(unit_bD, columns, self.product == BF16, device)
                for job, own_counts in zip(on_device, counts, strict=True):
                    job.count(block, own_counts, tile)
            return [[one.tally for one in own] for own in counts]

        total, *others = share_blocks(count, range(0, len(row_K), num_rows)[rank::size], "rank")
        for other in others:
            _merge(total, other)
        return total


def _merge(total: list[list[Tally]], other: list[list[Tally]]) -> None:
    for own_tallies, other_tallies in zip(total, other, strict=True):
        for one, another in zip(own_tallies, other_tallies, strict=True):
            one.merge(another)


def counting_device() -> torch.device:
    """Return where blocks are multiplied: this process's GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # The bound on the error of a product assumes float32 sums.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", torch.cuda.current_device())


def fastest_product() -> str:
    """Return the faster product where blocks are multiplied, FP32 or BF16."""
    is_bf16 = counting_device().type == "cuda" or bf16_speedup() > 1
    return BF16 if is_bf16 else FP32


def top_rows(
    prediction_QD: FloatArray,
    bank: Bank,
    k: int,
    row_correction: FloatArray | None = None,
    exclude: Queries | None = None,
    representative_N: IntArray | None = None,
) -> tuple[IntArray, FloatArray]:
    """Return the k best bank rows of each prediction and their scores, (Q, k), best first.

    Equal scores are in row order. With `exclude` (one query per prediction) the rows of each
    query's context are omitted; with `representative_N` only the first row of each duplicate group
    is searched. If fewer than k rows remain, the rest is row -1 with score -inf. Raises ValueError
    for an impossible k, or predictions of another shape.
    """
    if not 1 <= k <= bank.num_rows:
        raise ValueError(f"k: {k} is outside 1 ... {bank.num_rows}, the number of bank rows")
    num_queries = None if exclude is None else len(exclude)
    unit_QD = unit_predictions(prediction_QD, bank, num_queries)
    row_K = np.arange(bank.num_rows)
    if representative_N is not None:
        row_K = np.flatnonzero(representative_N == row_K)

    def in_context(lines: slice, columns: slice) -> Tensor | None:
        if exclude is None:
            return None
        part, row_B = exclude.take(lines), row_K[columns]
        after_first_QB = row_B >= part.first_row_Q[:, None]
        return torch.from_numpy(after_first_QB & (row_B < part.target_row_Q[:, None]))

    pair_N2 = checked_correction(row_correction, bank)
    return best_candidates(unit_QD, bank, row_K, k, pair_N2, in_context)


def best_candidates(
    unit_QD: Tensor, bank: Bank, row_K: IntArray, k: int, pair_N2: FloatArray | None, hidden: Hidden
) -> tuple[IntArray, FloatArray]:
    """Return the k best of the bank rows `row_K` (ascending) and their scores, (Q, k).

    Equal scores are in row order; the rest is row -1 with score -inf.
    """

    def search(starts: Iterator[int]) -> tuple[Tensor, Tensor]:
        score_Qk = torch.full((len(unit_QD), k), -torch.inf)
        row_Qk = torch.full((len(unit_QD), k), -1)
        for begin in starts:
            columns = slice(begin, min(begin + TOP_BLOCK, len(row_K)))
            row_B = row_K[columns]
            block_BD = torch.from_numpy(bank.unit_ascending(row_B))
            for start in range(0, len(unit_QD), QUERY_BLOCK):
                lines = slice(start, min(start + QUERY_BLOCK, len(unit_QD)))
                score_QB = unit_QD[lines] @ block_BD.T
                if pair_N2 is not None:
                    scale_B, bias_B = torch.from_numpy(pair_N2[row_B].T)
                    score_QB.mul_(scale_B).add_(bias_B)
                hidden_QB = hidden(lines, columns)
                if hidden_QB is not None:
                    score_QB.masked_fill_(hidden_QB, -torch.inf)
                improved = torch.nonzero(score_QB.amax(dim=1) > score_Qk[lines, -1]).squeeze(1)
                if not len(improved):
                    continue
                score, column = score_QB[improved].topk(min(k, len(row_B)), dim=1)
                row = torch.where(score == -torch.inf, -1, torch.from_numpy(row_B)[column])
                line = start + improved
                score_Qk[line], row_Qk[line] = _merged(
                    k, (score_Qk[line], score), (row_Qk[line], row)
                )
        return score_Qk, row_Qk

    found = share_blocks(search, range(0, len(row_K), TOP_BLOCK), "search")
    add_products(2.0 * unit_QD.numel() * len(row_K))
    score_Qk, row_Qk = found[0]
    for other_score_Qk, other_row_Qk in found[1:]:
        score_Qk, row_Qk = _merged(k, (score_Qk, other_score_Qk), (row_Qk, other_row_Qk))
    return row_Qk.numpy(), score_Qk.numpy()


def _merged(
    k: int, scores: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the k best of two lists per query, by falling score, then by row."""
    score, row = torch.cat(scores, dim=1), torch.cat(rows, dim=1)
    place = row.argsort(dim=1, stable=True)
    row, score = row.gather(1, place), score.gather(1, place)
    place = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return score.gather(1, place), row.gather(1, place)


def unit_predictions(prediction_QD: FloatArray, bank: Bank, num_queries: int | None) -> Tensor:
    """Check predictions; return them with length 1 (a zero vector stays zero)."""
    num_rows = len(prediction_QD) if num_queries is None else num_queries
    if prediction_QD.shape != (num_rows, bank.dim):
        raise ValueError(
            f"predictions: shape {prediction_QD.shape}; expected {(num_rows, bank.dim)}, "
            "one vector of the bank's dim for each query"
        )
    bad = ~np.isfinite(prediction_QD).all(axis=1)
    if bad.any():
        raise ValueError(
            f"predictions: {bad.sum()} of {num_rows} are not finite, first number {bad.argmax()}"
        )
    tensor_QD = torch.from_numpy(np.ascontiguousarray(prediction_QD, dtype=np.float32))
    return torch.nn.functional.normalize(tensor_QD, dim=1)


def checked_correction(pair_N2: FloatArray | None, bank: Bank) -> FloatArray | None:
    """Return the row correction as float32; raise ValueError if it does not fit the bank."""
    if pair_N2 is None:
        return None
    if pair_N2.shape != (bank.num_rows, 2) or not np.isfinite(pair_N2).all():
        raise ValueError(
            f"row correction: shape {pair_N2.shape}; expected {(bank.num_rows, 2)}, all finite"
        )
    return np.asarray(pair_N2, np.float32)
