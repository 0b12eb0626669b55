"""Nearest rows of a whole bank, block by block.

Shapes: Q queries, N bank rows, B rows of one block, D vector dim, P train-time predictions. Scores
are cosines; a row correction (N, 2) makes them scale * cosine + bias.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lvm.bank.store import Bank
from lvm.windows.queries import Queries

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Result = TypeVar("Result")

QUERY_BLOCK = 512
TOP_BLOCK = 16384
NEIGHBOUR_BLOCK = 128


def share_blocks(
    work: Callable[[Iterator[int]], Result], starts: range, title: str | None = None
) -> list[Result]:
    """Run `work` in one thread a core over a common supply of block starts; return all results.

    Each worker keeps torch to its own core: no operation waits for another thread, so a busy
    machine costs its share only (with torch's own threads each barrier waited for a time slice). As
    many workers as cores this process may use, or OMP_NUM_THREADS.
    """
    num_workers = max(1, min(num_cores(), len(starts)))
    before = torch.get_num_threads()
    bar = tqdm(starts, title, unit="block", disable=None if title else True, leave=False)
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
            stopped.set()  # the others end with the block they are in
            raise

    try:
        with ThreadPoolExecutor(num_workers) as pool:
            futures = [pool.submit(worker) for _ in range(num_workers)]
            try:
                return [future.result() for future in futures]
            finally:
                stopped.set()
    finally:
        torch.set_num_threads(before)


def num_cores() -> int:
    """Return how many cores this process may use: OMP_NUM_THREADS, or all it is allowed."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit():
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def top_rows(
    prediction_QD: FloatArray,
    bank: Bank,
    k: int,
    row_correction: FloatArray | None = None,
    exclude: Queries | None = None,
    representative_N: IntArray | None = None,
) -> tuple[IntArray, FloatArray]:
    """Return the k best bank rows of each prediction with their scores, (Q, k), best first.

    Rows of equal score stand in row order. The context rows of `exclude` (one query a prediction)
    are left out, as is every row that is not the first of its group in `representative_N`; where
    fewer than k rows remain, row -1 with score -inf fills up.
    """
    if not 1 <= k <= bank.num_rows:
        raise ValueError(f"k: {k} is outside 1 ... {bank.num_rows}, the number of bank rows")
    search = _TopSearch(
        unit_predictions(prediction_QD, bank, None if exclude is None else len(exclude)),
        bank,
        k,
        checked_correction(row_correction, bank),
        exclude,
        representative_N,
    )
    found = share_blocks(search.run, range(0, bank.num_rows, TOP_BLOCK))
    score_QK, row_QK = found[0]
    for more_score_QK, more_row_QK in found[1:]:
        score_QK, row_QK = merged(k, (score_QK, more_score_QK), (row_QK, more_row_QK))
    return row_QK.numpy(), score_QK.numpy()


@dataclass(frozen=True)
class _TopSearch:
    unit_QD: Tensor
    bank: Bank
    k: int
    pair_N2: FloatArray | None
    exclude: Queries | None
    representative_N: IntArray | None

    def run(self, starts: Iterator[int]) -> tuple[Tensor, Tensor]:
        """Return scores with rows of the best (Q, k) in the blocks of this worker."""
        score_QK = torch.full((len(self.unit_QD), self.k), -torch.inf)
        row_QK = torch.full((len(self.unit_QD), self.k), -1)
        for begin in starts:
            block_BD = torch.from_numpy(self.bank.unit(slice(begin, begin + TOP_BLOCK)))
            for start in range(0, len(self.unit_QD), QUERY_BLOCK):
                lines = slice(start, start + QUERY_BLOCK)
                score_QB = self._scores(lines, begin, block_BD)
                better = torch.nonzero(score_QB.amax(dim=1) > score_QK[lines, -1]).squeeze(1)
                if not len(better):
                    continue
                num_taken = min(self.k, len(block_BD))
                score, column = score_QB[better].topk(num_taken, dim=1)
                row = torch.where(score == -torch.inf, -1, begin + column)
                line = start + better
                score_QK[line], row_QK[line] = merged(
                    self.k, (score_QK[line], score), (row_QK[line], row)
                )
        return score_QK, row_QK

    def _scores(self, lines: slice, begin: int, block_BD: Tensor) -> Tensor:
        score_QB = self.unit_QD[lines] @ block_BD.T
        if self.pair_N2 is not None:
            scale_B, bias_B = torch.from_numpy(self.pair_N2[begin : begin + len(block_BD)].T)
            score_QB.mul_(scale_B).add_(bias_B)
        row_B = np.arange(begin, begin + len(block_BD))
        if self.representative_N is not None:
            is_twin_B = torch.from_numpy(self.representative_N[row_B] != row_B)
            score_QB.masked_fill_(is_twin_B, -torch.inf)
        if self.exclude is not None:
            part = self.exclude.take(lines)
            after_first = row_B >= part.first_row_Q[:, None]
            context_QB = after_first & (row_B < part.target_row_Q[:, None])
            score_QB.masked_fill_(torch.from_numpy(context_QB), -torch.inf)
        return score_QB


def merged(
    k: int, scores: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the k best of two lists a line, by falling score, then by row."""
    score, row = torch.cat(scores, dim=1), torch.cat(rows, dim=1)
    place = row.argsort(dim=1, stable=True)
    row, score = row.gather(1, place), score.gather(1, place)
    place = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return score.gather(1, place), row.gather(1, place)


def neighbour_penalty(mean_N: FloatArray, beta: float) -> FloatArray:
    """Return the row correction (N, 2) of CSLS: scale 1, bias -beta * mean neighbour score.

    Source: Conneau et al., Word Translation Without Parallel Data, ICLR 2018, section 2.3.
    """
    return np.stack([np.ones_like(mean_N), -beta * mean_N], axis=1).astype(np.float32)


def mean_neighbour_score(
    train_prediction_PD: FloatArray, bank: Bank, neighbours: int = 10
) -> FloatArray:
    """Return each bank row's mean cosine to its nearest train-time predictions, (N,) float32."""
    unit_PD = unit_predictions(train_prediction_PD, bank, None)
    if len(unit_PD) < neighbours:
        raise ValueError(f"neighbours: {neighbours} of only {len(unit_PD)} train predictions")
    mean_N = np.empty(bank.num_rows, np.float32)

    def run(starts: Iterator[int]) -> None:
        for begin in starts:
            block = bank.unit(slice(begin, begin + NEIGHBOUR_BLOCK))
            score_BP = torch.from_numpy(block) @ unit_PD.T
            nearest_BK = score_BP.topk(neighbours, dim=1, sorted=False).values
            mean_N[begin : begin + len(block)] = nearest_BK.mean(dim=1).numpy()

    share_blocks(run, range(0, bank.num_rows, NEIGHBOUR_BLOCK))
    return mean_N


def unit_predictions(prediction_QD: FloatArray, bank: Bank, num_queries: int | None) -> Tensor:
    """Check predictions, return them at length 1 (a zero vector stays zero)."""
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
    """Return the row correction as float32; raise where it does not fit the bank."""
    if pair_N2 is None:
        return None
    if pair_N2.shape != (bank.num_rows, 2) or not np.isfinite(pair_N2).all():
        raise ValueError(
            f"row correction: shape {pair_N2.shape}; expected {(bank.num_rows, 2)}, all finite"
        )
    return np.asarray(pair_N2, np.float32)
