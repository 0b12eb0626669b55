"""Exact search of a whole bank: the best rows of each prediction, block by block.

Shapes: Q queries, N bank rows, K candidates, B candidates of one block, k rows returned, D vector
dim. Scores are cosines; a row correction (N, 2) makes them scale * cosine + bias.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvm.bank.store import Bank
from lvm.system.environment import num_cores
from lvm.system.progress import add_products, steps
from lvm.windows.planning import Queries

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Result = TypeVar("Result")
# Returns a mask of the candidates of a tile that do not compete; None if all compete.
Hidden = Callable[[slice, slice], Tensor | None]

QUERY_BLOCK = 512
TOP_BLOCK = 16384


def share_blocks(
    work: Callable[[Iterator[int]], Result], starts: range, title: str
) -> list[Result]:
    """Run `work` in one thread per core on a shared iterator of block starts; return all results.

    Each worker restricts torch to one thread. On a busy machine torch's own threads wait for each
    other at every operation; these workers do not. The progress bar is called `title`.
    """
    num_workers = max(1, min(num_cores(), len(starts)))
    before = torch.get_num_threads()
    bar = steps(starts, title, "blocks")
    supply, lock, stopped = iter(bar), threading.Lock(), threading.Event()

    def next_start() -> int:
        with lock:
            return -1 if stopped.is_set() else next(supply, -1)

    def worker() -> Result:
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                return work(iter(next_start, -1))
        except BaseException:
            stopped.set()  # the other workers stop after their current block
            raise

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(worker) for _ in range(num_workers)]
            try:
                return [future.result() for future in futures]
            finally:
                stopped.set()
    finally:
        bar.close()
        torch.set_num_threads(before)


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
            block_BD = torch.from_numpy(unit_block(bank, row_B))
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


def unit_block(bank: Bank, row_B: IntArray) -> FloatArray:
    """Return the unit vectors of ascending rows, (B, D); contiguous rows are read as one slice."""
    first, last = int(row_B[0]), int(row_B[-1])
    is_run = last - first + 1 == len(row_B)
    return bank.unit(slice(first, last + 1) if is_run else row_B)


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
