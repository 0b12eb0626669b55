"""Serving index over the passages of a bank (FAISS), tuned against exact search.

A passage is the first row of a duplicate group. Without a row correction passages are [v; 0 ...];
with one they are [scale v; bias; 0 ...]. Queries are [q; 1; 0 ...], so that the inner product is
the corrected score. Shapes: Q queries, N bank rows, K passages, k passages returned, C candidates
of a query, D vector dim, E = D + 1 or more.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import nn

from lvm.bank.bank import Bank, FloatArray
from lvm.bank.duplicates import duplicate_groups
from lvm.bank.files import file_sha256
from lvm.models.facts import Facts
from lvm.models.predict import predict_queries
from lvm.models.weights import model_digest
from lvm.retrieval.exact import checked_correction, top_rows, unit_predictions
from lvm.system.atomic import (
    atomic_replace,
    is_damaged,
    locked,
    with_checksum,
    write_array,
    write_errors_name,
)
from lvm.system.errors import one_line
from lvm.system.progress import part
from lvm.system.seeding import generator
from lvm.windows.export import ensure_windows, plan_windows
from lvm.windows.planning import IntArray

FORMAT = 3
QUERY_BLOCK = (
    512  # from this block size on faiss multiplies matrices; single queries take far longer
)
CANDIDATES = 65_536  # scored again at a time: 200 MB at 768 dims
INDEX, ROWS, CONTENTS = "index.faiss", "rows.npy", "index.json"
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
FOLDER = Path("data/index")
FLAT_PASSAGES = 20_000  # up to this size an exhaustive search takes milliseconds and misses nothing
# At 60,000 passages a graph agreed as well as lists, 0.21 against 0.27 ms a query, but took 14 s to
# build against 4. A graph cannot be memory-mapped, either, so larger banks get lists.
HNSW_PASSAGES = 100_000
MAX_HNSW_EFFORT = 1024
AGREEMENT = 0.98
DEPTH = 10
# Candidates beyond k that are scored again. With 4 k in all, 212 passages of a graph of 92,525 took
# 5.1 ms instead of 2.5, and were the same.
SPARE = 30
TUNING_QUERIES = 500
FLAT, HNSW, IVF = "flat", "hnsw", "ivf"
HNSW_LINKS, HNSW_BUILD_EFFORT = 32, 80
SAMPLE_PER_LIST = 40
KMEANS_STEPS = 10
BLOCK = 16_384
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexFacts:
    """Facts of an index; `agreement` is the mean overlap of its ten best with exact search.

    Agreement was measured on `tuning_queries` predictions of one model on val (none if search is
    exhaustive). `effort` is the number of the `num_lists` lists that a query reads (ivf), or the
    number of passages it keeps as candidates in the graph (hnsw, efSearch).
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
            shape = f"a graph, search effort {self.effort}"
        return (
            f"index of {self.num_passages:,} passages in {shape}; "
            f"agreement with exact search {self.agreement:.3f}"
        )


class ServingIndex:
    """Finds the best passages of a prediction; scores are exact, the choice is approximate."""

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

        Best first, equal scores in row order; row -1 with score -inf if the search met fewer.
        `effort` None means the tuned effort. Raises ValueError for an impossible k, or predictions
        of another shape.
        """
        if not 1 <= k <= len(self._row_K):
            raise ValueError(f"k: {k} is outside 1 ... {len(self._row_K)}, the number of passages")
        unit_QD = unit_predictions(prediction_QD, self.bank, None).numpy()
        # faiss and torch have separate thread pools; a single query uses one thread.
        faiss.omp_set_num_threads(torch.get_num_threads() if len(unit_QD) > 1 else 1)
        parameters = None
        if self.facts.kind == IVF:
            parameters = faiss.SearchParametersIVF(nprobe=effort or self.facts.effort)
        if self.facts.kind == HNSW:
            parameters = faiss.SearchParametersHNSW(efSearch=effort or self.facts.effort)
        row_Qk = np.empty((len(unit_QD), k), np.int64)
        score_Qk = np.empty((len(unit_QD), k), np.float32)
        num_candidates = min(len(self._row_K), k + SPARE)
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
        """Score the candidates again from the bank, since the index rounds; return the k best."""
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
    """Write an index to the folder `path` atomically, replacing an older one."""
    with atomic_replace(path) as folder:
        folder.mkdir()
        with write_errors_name(path / INDEX), (folder / INDEX).open("wb") as file:
            # faiss does not notice a full disk at the last block of a file.
            faiss.write_index(built._index, faiss.PyCallbackIOWriter(file.write))
        with write_errors_name(path / ROWS):
            write_array(folder / ROWS, built._row_K)
        files = {name: file_sha256(folder / name) for name in (INDEX, ROWS)}
        contents = {"format": FORMAT, "files": files, "facts": asdict(built.facts)}
        with write_errors_name(path / CONTENTS):
            (folder / CONTENTS).write_text(json.dumps(with_checksum(contents), indent=1) + "\n")


def open_index(path: Path, bank: Bank, row_correction: FloatArray | None = None) -> ServingIndex:
    """Open an index folder with memory-mapped lists, after checking the files' hashes.

    Raises ValueError if a file is missing or damaged, or if the index belongs to another bank.
    """
    try:
        contents = json.loads((path / CONTENTS).read_text())
        if is_damaged(contents):
            raise ValueError(f"{CONTENTS} differs from the sha256 in it")
        facts = IndexFacts(**contents["facts"])
        recorded = contents["files"]
        damaged = [name for name in (INDEX, ROWS) if file_sha256(path / name) != recorded[name]]
    except UNREADABLE as error:
        raise ValueError(f"index {path}: missing or unreadable ({error}); build it again") from None
    if damaged:
        raise ValueError(f"index {path}: {', '.join(damaged)} is damaged; build it again")
    if facts.bank_sha256 != bank.sha256:
        raise ValueError(
            f"index {path}: belongs to a bank with sha256 {facts.bank_sha256[:12]}, not to "
            f"{bank.path} ({bank.sha256[:12]}); build one for this bank"
        )
    index = faiss.read_index(str(path / INDEX), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    if facts.kind == IVF:
        # Mapped lists start read-ahead threads at every search, which take longer than the search.
        faiss.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
    return ServingIndex(
        facts, index, np.load(path / ROWS, allow_pickle=False), bank, row_correction
    )


@part("serving index")
def ensure_index(
    bank: Bank,
    model: nn.Module,
    facts: Facts,
    row_correction: FloatArray | None = None,
    folder: str | Path = FOLDER,
    sizes: tuple[int, int] = (FLAT_PASSAGES, HNSW_PASSAGES),
) -> ServingIndex:
    """Open the index of a model over a bank; build it in `folder` if it is missing or damaged.

    Building a large one reads the val queries of the bank's windows (ctx, split, seed of `facts`)
    to choose how much of the index a search must read. One process at a time builds. If the folder
    cannot be written, the index is held in memory, and a line is logged. Raises ValueError if the
    bank's files do not match their hashes.
    """
    parts = [FORMAT, faiss.__version__, *sizes, bank.sha256, model_digest(model)]
    parts += [facts.ctx, facts.split, facts.seed]
    digest = hashlib.sha256(json.dumps(parts).encode())
    if row_correction is not None:
        digest.update(np.ascontiguousarray(row_correction, np.float32).data)

    path = Path(folder) / digest.hexdigest()[:16]
    with locked(path):
        try:
            return open_index(path, bank, row_correction)
        except UNREADABLE:
            bank.verify()
            predictions = partial(_val_predictions, bank, model, facts)
            built = build_index(bank, predictions, row_correction, sizes)
        try:
            write_index(built, path)
        except OSError as error:
            reason = one_line(str(error))
            _log.warning("index %s cannot be written (%s); it is kept in memory", path, reason)
            return built
    return open_index(path, bank, row_correction)


def _val_predictions(bank: Bank, model: nn.Module, facts: Facts) -> FloatArray:
    """Return predictions (Q, D) to tune on; unwritable windows are planned in memory."""
    try:
        windows = ensure_windows(bank, facts.ctx, split=facts.split, seed=facts.seed)
    except OSError:
        windows = plan_windows(bank, facts.ctx, split=facts.split, seed=facts.seed)
    return predict_queries(model, bank, windows.queries["val"].head(TUNING_QUERIES))


def build_index(
    bank: Bank,
    tuning_predictions: Callable[[], FloatArray],
    row_correction: FloatArray | None = None,
    sizes: tuple[int, int] = (FLAT_PASSAGES, HNSW_PASSAGES),
) -> ServingIndex:
    """Build the index of a bank: exhaustive, then a graph up to `sizes`, inverted lists beyond.

    A search uses the least effort, by powers of sqrt 2, whose ten best passages reach the AGREEMENT
    with exact search on `tuning_predictions` (Q, D), which are computed only if needed.
    """
    representative_N = duplicate_groups(bank)
    row_K = np.flatnonzero(representative_N == np.arange(bank.num_rows))
    pair_N2 = checked_correction(row_correction, bank)
    kind = FLAT if len(row_K) <= sizes[0] else HNSW if len(row_K) <= sizes[1] else IVF
    index, num_lists = STRUCTURES[kind](bank, row_K, pair_N2)
    facts = IndexFacts(kind, bank.sha256, len(row_K), num_lists, 0, 1.0, 0)
    built = ServingIndex(facts, index, row_K, bank, row_correction)
    if kind != FLAT:
        built.facts = _tuned(built, bank, representative_N, tuning_predictions())
    return built


def agreement(found_Qk: IntArray, exact_Qk: IntArray) -> FloatArray:
    """Return the share (Q,) of the exact rows (Q, k) that the index found, between 0 and 1."""
    return (exact_Qk[:, :, None] == found_Qk[:, None]).any(axis=2).mean(axis=1)


def _tuned(
    whole: ServingIndex, bank: Bank, representative_N: IntArray, prediction_QD: FloatArray
) -> IndexFacts:
    """Return the facts with the least effort that reaches the agreement."""
    depth = min(DEPTH, whole.facts.num_passages)
    exact_Qk, _ = top_rows(
        prediction_QD, bank, depth, whole.pair_N2, representative_N=representative_N
    )
    most = MAX_HNSW_EFFORT if whole.facts.kind == HNSW else whole.facts.num_lists
    num_steps = 2 * round(math.log2(most)) + 1
    for effort in sorted({round(2 ** (step / 2)) for step in range(num_steps)}):
        found_Qk, _ = whole.search(prediction_QD, depth, effort)
        reached = float(agreement(found_Qk, exact_Qk).mean())
        if reached >= AGREEMENT:
            break
    changed = {"effort": effort, "agreement": reached, "tuning_queries": len(prediction_QD)}
    return IndexFacts(**(asdict(whole.facts) | changed))


def _flat(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    return _filled(faiss.IndexFlatIP(_augmented_dim(bank)), bank, row_K, pair_N2), 0


def _graph(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    """Build a graph (Malkov, Yashunin, arXiv 1603.09320) in one thread: insertion order matters."""
    faiss.omp_set_num_threads(1)
    description = f"HNSW{HNSW_LINKS},SQfp16"
    index = faiss.index_factory(_augmented_dim(bank), description, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_BUILD_EFFORT
    index.train(_augmented(bank, row_K[:1], pair_N2))
    return _filled(index, bank, row_K, pair_N2), 0


def _lists(bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> tuple[Any, int]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    num_lists = 2 ** round(math.log2(4 * math.sqrt(len(row_K))))
    description = f"IVF{num_lists},SQfp16"
    index = faiss.index_factory(_augmented_dim(bank), description, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = False
    index.cp.niter = KMEANS_STEPS
    num_sampled = min(len(row_K), SAMPLE_PER_LIST * num_lists)
    sample = generator(0, "index sample").choice(row_K, num_sampled, replace=False)
    index.train(_augmented(bank, np.sort(sample), pair_N2))
    return _filled(index, bank, row_K, pair_N2), num_lists


def _filled(index: Any, bank: Bank, row_K: IntArray, pair_N2: FloatArray | None) -> Any:
    for start in range(0, len(row_K), BLOCK):
        index.add(_augmented(bank, row_K[start : start + BLOCK], pair_N2))
    return index


def _augmented(bank: Bank, rows: IntArray, pair_N2: FloatArray | None) -> FloatArray:
    """Return passages [scale v; bias; 0 ...], (b, E)."""
    augmented = np.zeros((len(rows), _augmented_dim(bank)), np.float32)
    augmented[:, : bank.dim] = bank.unit(rows)
    if pair_N2 is not None:
        augmented[:, : bank.dim] *= pair_N2[rows, :1]
        augmented[:, bank.dim] = pair_N2[rows, 1]
    return augmented


def _augmented_dim(bank: Bank) -> int:
    """Return E, a multiple of 16, for which faiss reads the codes with vector instructions."""
    return -(-(bank.dim + 1) // 16) * 16


# Each returns a filled index with its number of lists.
STRUCTURES: dict[str, Callable[[Bank, IntArray, FloatArray | None], tuple[Any, int]]] = {
    FLAT: _flat,
    HNSW: _graph,
    IVF: _lists,
}
