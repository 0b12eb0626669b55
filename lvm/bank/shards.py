"""Vectors in several files that are read as one array; blocks of rows cut into shards.

Shapes: N bank rows, D vector dim, S shards, b rows of one block.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# A kill loses at most one unfinished shard a process; 10^9 rows are 3,815 shards.
SHARD_ROWS = 2**18


class Shards:
    """Vectors (N, D) of several arrays, one after the other; indexed by rows as one array is.

    A slice without a step that lies in one shard is a view; other rows are copied. `[::-1]` is a
    reversed view.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = tuple(parts)
        self._end_S = np.cumsum([len(part) for part in self.parts])
        self.dtype = self.parts[0].dtype
        self.shape = (int(self._end_S[-1]), int(self.parts[0].shape[1]))
        self.ndim = 2
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return self._slice(rows)
        row = np.asarray(rows)
        if row.dtype == bool:
            row = np.flatnonzero(row)
        row = np.where(row < 0, row + len(self), row)
        shard = np.searchsorted(self._end_S, row, side="right")
        if row.size and (row.min() < 0 or shard.max() == len(self.parts)):
            raise IndexError(f"row {rows} of {len(self)}")
        found = np.empty((*row.shape, self.shape[1]), self.dtype)
        for number in np.unique(shard):
            part, is_here = self.parts[number], shard == number
            found[is_here] = part[row[is_here] - (self._end_S[number] - len(part))]
        return found

    def _slice(self, rows: slice) -> Any:
        if rows == slice(None, None, -1):
            return Shards([part[::-1] for part in reversed(self.parts)])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            return self[np.arange(start, stop, step)]
        first, last = np.searchsorted(self._end_S, (start, max(start, stop - 1)), side="right")
        found = []
        for number in range(first, min(last, len(self.parts) - 1) + 1):
            begin = int(self._end_S[number]) - len(self.parts[number])
            found.append(self.parts[number][max(0, start - begin) : max(0, stop - begin)])
        if not found:
            return self.parts[0][:0]
        return found[0] if len(found) == 1 else np.concatenate(found)


Vectors = np.ndarray | Shards


def are_stored(vectors: Vectors) -> bool:
    """Return whether these are the whole files of a bank as they are mapped, in row order."""
    parts = vectors.parts if isinstance(vectors, Shards) else (vectors,)
    return all(isinstance(part.base, mmap.mmap) for part in parts)


def shard_files(number: int) -> tuple[str, str]:
    """Return the names of the files of a shard: its vectors, its row table."""
    return f"vectors-{number:05d}.npy", f"rows-{number:05d}.parquet"


class Cut:
    """Cuts a stream of blocks (b, D) into runs of rows that are read one after the other."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self._blocks, self._rest = iter(blocks), np.empty((0, 0))

    def take(self, num_rows: int) -> Iterator[np.ndarray]:
        """Yield the next `num_rows` rows, or those that are left."""
        while num_rows > 0:
            block = self._rest if len(self._rest) else next(self._blocks, None)
            if block is None:
                return
            wanted, self._rest = block[:num_rows], block[num_rows:]
            num_rows -= len(wanted)
            yield wanted
