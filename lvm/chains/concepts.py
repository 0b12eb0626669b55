"""Concepts with the chains that are made of them.

Shapes: N concepts of a pool, D vector dim, C chains, L concepts of one chain.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lvm.bank.row_table import IntArray
from lvm.bank.store import Bank, FloatArray, unit_rows


class Chain(NamedTuple):
    """An ordered run of concepts, by their rows in the pool.

    `head` is what its sequence is named after; `lane` is None where the lane is that of its rows.
    """

    head: str
    rows: tuple[int, ...]
    lane: str | None = None


@dataclass(frozen=True, eq=False)
class Concepts:
    """N texts that an encoder has not read yet; `lane_N` holds names, "" where there is none."""

    text_N: list[str]
    lane_N: npt.NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Pool:
    """N concepts with vectors (N, D) as stored; no row is zero.

    `lane_N` holds names, "" where there is none; `text_N` is None where a bank has no texts.
    """

    stored: np.ndarray
    lane_N: npt.NDArray[np.object_]
    text_N: npt.NDArray[np.object_] | None
    encoder: str

    def unit(self, rows: IntArray | slice) -> FloatArray:
        """Return the vectors of `rows` (of any shape) as float32, length 1 along the last axis."""
        return unit_rows(self.stored, rows)


@dataclass(frozen=True)
class Candidates:
    """Chains to be gated, over texts or over the rows of a bank; `notes` are lines for the user.

    `answer_rows` are rows of the base that no chain may repeat: the targets of its queries.
    """

    kind: str
    chains: list[Chain]
    pool: Concepts | Pool
    notes: tuple[str, ...] = ()
    answer_rows: IntArray | None = None


def bank_pool(bank: Bank) -> Pool:
    """Return the rows of a bank as a pool; its vectors stay on disk."""
    return Pool(bank.vectors, row_lane_names(bank), bank.texts(), bank.encoder)


def row_lane_names(bank: Bank) -> npt.NDArray[np.object_]:
    """Lane of each row by name (N,), "" for a row without one."""
    if bank.lane_N is None:
        return np.full(bank.num_rows, "", dtype=object)
    return np.array([*bank.lanes, ""], dtype=object)[bank.lane_N]


def flat_rows(chains: Sequence[Chain]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of all chains one after the other, with where each chain starts (C,)."""
    length_C = np.array([len(chain.rows) for chain in chains], dtype=np.int64)
    rows = np.fromiter((row for chain in chains for row in chain.rows), np.int64, length_C.sum())
    return rows, np.concatenate([[0], np.cumsum(length_C)[:-1]]).astype(np.int64)


def pieces(order: Sequence[int], lengths: Iterator[int]) -> Iterator[tuple[int, ...]]:
    """Cut a walk into consecutive runs of the given lengths; the last is what is left."""
    start = 0
    while start < len(order):
        end = start + next(lengths)
        yield tuple(order[start:end])
        start = end


def drawn_lengths(low: int, high: int, random: np.random.Generator) -> Iterator[int]:
    """Yield lengths from `low` to `high`, each as likely."""
    while True:
        yield from random.integers(low, high + 1, size=1024).tolist()
