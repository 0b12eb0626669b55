"""Serving index over the passages of a bank, tuned against exact search.

Shapes: Q queries, N bank rows, K passages (the first row of each duplicate group), D vector dim,
C candidates of a query, E = D + 1 or more. A row correction (N, 2) is folded in, see
`lvm.retrieval.structures`: queries are [q; 1; 0 ...].
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from lvm.bank.files import file_sha256
from lvm.bank.store import Bank
from lvm.retrieval.search import (
    FloatArray,
    IntArray,
    checked_correction,
    unit_predictions,
)
from lvm.retrieval.structures import FLAT, HNSW, IVF
from lvm.system.atomic import (
    atomic_replace,
    is_damaged,
    with_checksum,
    write_array,
    write_errors_name,
)

FORMAT = 3
QUERY_BLOCK = 512  # faiss multiplies matrices from a block size on; single queries cost far more
CANDIDATES = 65_536  # scored anew at a time: 200 MB at 768 dims
INDEX, ROWS, CONTENTS = "index.faiss", "rows.npy", "index.json"
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class IndexFacts:
    """What an index is: `agreement` is the mean overlap of its ten best with exact search.

    It was measured on `tuning_queries` predictions of one model on val (none where search is
    exhaustive). `effort` is how many of `num_lists` lists a query reads (ivf), or how many
    passages it keeps in sight on its way through the graph (hnsw, efSearch).
    """

    kind: str
    bank_sha256: str
    num_passages: int
    num_lists: int
    effort: int
    agreement: float
    tuning_queries: int

    def __str__(self) -> str:
        if self.kind == FLAT:
            return f"exhaustive search of {self.num_passages:,} passages"
        shape = f"{self.num_lists:,} lists, {self.effort} probed"
        if self.kind == HNSW:
            shape = f"a graph, {self.effort} in sight"
        return (
            f"index of {self.num_passages:,} passages in {shape}; "
            f"agreement with exact search {self.agreement:.3f}"
        )


class ServingIndex:
    """Finds the best passages of a prediction; their scores are exact, only the choice is not."""

    def __init__(
        self,
        facts: IndexFacts,
        index: Any,
        row_K: IntArray,
        bank: Bank,
        row_correction: FloatArray | None = None,
    ) -> None:
        self.facts, self._index, self._row_K = facts, index, row_K
        self.bank, self.pair_N2 = bank, checked_correction(row_correction, bank)

    def search(
        self, prediction_QD: FloatArray, k: int, effort: int | None = None
    ) -> tuple[IntArray, FloatArray]:
        """Return the k best passages of each prediction as bank rows with scores, (Q, k).

        Best first, equal scores in row order; row -1 with score -inf where the search met
        fewer. `effort` None means the tuned one. Raises ValueError for an impossible k, or
        predictions of another shape.
        """
        if not 1 <= k <= len(self._row_K):
            raise ValueError(f"k: {k} is outside 1 ... {len(self._row_K)}, the number of passages")
        unit_QD = unit_predictions(prediction_QD, self.bank, None).numpy()
        # faiss and torch have thread pools of their own; one query is searched by one thread.
        faiss.omp_set_num_threads(torch.get_num_threads() if len(unit_QD) > 1 else 1)
        parameters = None
        if self.facts.kind == IVF:
            parameters = faiss.SearchParametersIVF(nprobe=effort or self.facts.effort)
        if self.facts.kind == HNSW:
            parameters = faiss.SearchParametersHNSW(efSearch=effort or self.facts.effort)
        row_Qk = np.empty((len(unit_QD), k), np.int64)
        score_Qk = np.empty((len(unit_QD), k), np.float32)
        num_candidates = min(len(self._row_K), 4 * k)
        block = max(1, min(QUERY_BLOCK, CANDIDATES // num_candidates))
        for start in range(0, len(unit_QD), block):
            lines = slice(start, start + block)
            query_QE = np.zeros((len(unit_QD[lines]), self._index.d), np.float32)
            query_QE[:, : self.bank.dim] = unit_QD[lines]
            query_QE[:, self.bank.dim] = 1
            _, place_QC = self._index.search(query_QE, num_candidates, params=parameters)
            row_Qk[lines], score_Qk[lines] = self._best(unit_QD[lines], place_QC, k)
        return row_Qk, score_Qk

    def _best(self, unit_QD: FloatArray, place_QC: IntArray, k: int) -> tuple[IntArray, FloatArray]:
        """Score the candidates anew from the bank, since the index rounds; return the k best."""
        row_QC = np.sort(np.where(place_QC < 0, -1, self._row_K[place_QC]), axis=1)
        score_QC = np.empty(row_QC.shape, np.float32)
        width = max(1, CANDIDATES // len(row_QC))  # less than all only for a single query
        for start in range(0, row_QC.shape[1], width):
            columns = slice(start, start + width)
            unit_QCD = self.bank.unit(row_QC[:, columns])
            score_QC[:, columns] = np.einsum("qd,qcd->qc", unit_QD, unit_QCD)
        if self.pair_N2 is not None:
            score_QC = self.pair_N2[row_QC, 0] * score_QC + self.pair_N2[row_QC, 1]
        score_QC[row_QC < 0] = -np.inf
        best_Qk = np.argsort(-score_QC, axis=1, kind="stable")[:, :k]
        return (
            np.take_along_axis(row_QC, best_Qk, axis=1),
            np.take_along_axis(score_QC, best_Qk, axis=1),
        )


def write_index(built: ServingIndex, path: Path) -> None:
    """Write an index to the folder `path`, whole or not at all; what stands there is replaced."""
    with atomic_replace(path) as folder:
        folder.mkdir()
        with write_errors_name(path / INDEX), (folder / INDEX).open("wb") as file:
            # faiss itself does not notice that the last block of a file found no space.
            faiss.write_index(built._index, faiss.PyCallbackIOWriter(file.write))
        with write_errors_name(path / ROWS):
            write_array(folder / ROWS, built._row_K)
        files = {name: file_sha256(folder / name) for name in (INDEX, ROWS)}
        contents = {"format": FORMAT, "files": files, "facts": asdict(built.facts)}
        with write_errors_name(path / CONTENTS):
            (folder / CONTENTS).write_text(json.dumps(with_checksum(contents), indent=1) + "\n")


def open_index(path: Path, bank: Bank, row_correction: FloatArray | None = None) -> ServingIndex:
    """Open an index folder, its lists memory-mapped; the files' hashes are checked first.

    Raises ValueError where a file is missing or damaged, or where it is the index of another bank.
    """
    try:
        contents = json.loads((path / CONTENTS).read_text())
        if is_damaged(contents):
            raise ValueError(f"{CONTENTS} differs from the sha256 in it")
        facts = IndexFacts(**contents["facts"])
        recorded = contents["files"]
        damaged = [name for name in (INDEX, ROWS) if file_sha256(path / name) != recorded[name]]
    except UNREADABLE as error:
        raise ValueError(f"index {path}: missing or unreadable ({error}); build it anew") from None
    if damaged:
        raise ValueError(f"index {path}: {', '.join(damaged)} is damaged; build it anew")
    if facts.bank_sha256 != bank.sha256:
        raise ValueError(
            f"index {path}: belongs to a bank with sha256 {facts.bank_sha256[:12]}, not to "
            f"{bank.path} ({bank.sha256[:12]}); build one for this bank"
        )
    index = faiss.read_index(str(path / INDEX), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    if facts.kind == IVF:
        # Mapped lists start threads to read ahead at every search, which takes longer than it.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    return ServingIndex(
        facts, index, np.load(path / ROWS, allow_pickle=False), bank, row_correction
    )
