"""Building a serving index, tuned against exact search.

Shapes: Q queries, N bank rows, K passages, D vector dim.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import faiss
import numpy as np
from filelock import FileLock
from torch import nn

from lvm.bank.duplicates import duplicate_groups
from lvm.bank.store import Bank
from lvm.models.facts import Facts
from lvm.models.fits import model_digest
from lvm.prediction.predict import predict_queries
from lvm.retrieval.index import (
    FORMAT,
    UNREADABLE,
    IndexFacts,
    ServingIndex,
    open_index,
    write_index,
)
from lvm.retrieval.search import FloatArray, IntArray, checked_correction, top_rows
from lvm.retrieval.structures import FLAT, HNSW, IVF, STRUCTURES
from lvm.system.errors import one_line
from lvm.windows.export import ensure_windows, plan_windows

FOLDER = Path("data/index")
FLAT_PASSAGES = 20_000  # an exhaustive search of these takes milliseconds, and cannot miss
# At 60,000 passages a graph agreed as well as lists, 0.21 against 0.27 ms a query, but took 14 s to
# build against 4; it cannot be memory-mapped either, so that larger banks get lists.
HNSW_PASSAGES = 100_000
MAX_HNSW_EFFORT = 1024
AGREEMENT = 0.98
DEPTH = 10
TUNING_QUERIES = 500
_log = logging.getLogger(__name__)


def ensure_index(
    bank: Bank,
    model: nn.Module,
    facts: Facts,
    row_correction: FloatArray | None = None,
    folder: str | Path = FOLDER,
    sizes: tuple[int, int] = (FLAT_PASSAGES, HNSW_PASSAGES),
) -> ServingIndex:
    """Open the index of a model over a bank, built in `folder` where it is missing or damaged.

    Building a large one reads the val queries of the bank's windows (ctx, split, seed of `facts`),
    to choose how much of the index a search must read. One process at a time builds. Where nothing
    can be written, the built one is kept in memory, with a line in the log. Raises ValueError where
    the bank's files do not match their hashes.
    """
    parts = [FORMAT, faiss.__version__, *sizes, bank.sha256, model_digest(model)]
    parts += [facts.ctx, facts.split, facts.seed]
    digest = hashlib.sha256(json.dumps(parts).encode())
    if row_correction is not None:
        digest.update(np.ascontiguousarray(row_correction, np.float32).data)

    path = Path(folder) / digest.hexdigest()[:16]
    with _one_builder(path):
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


@contextmanager
def _one_builder(path: Path) -> Iterator[None]:
    """Let one process at a time build; on a disk that takes no lock, each for itself."""
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path.parent / f".{path.name}.lock"))
        except OSError:
            pass  # whether there is something to write is not known yet
        yield


def _val_predictions(bank: Bank, model: nn.Module, facts: Facts) -> FloatArray:
    """Return predictions (Q, D) to tune on; where no windows can be written, they are planned."""
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

    A search makes the least effort, by powers of sqrt 2, whose ten best passages agree with exact
    search by AGREEMENT on `tuning_predictions` (Q, D), which are asked for only then.
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
    """Return the share (Q,) of the exact rows (Q, k) that were found too, between 0 and 1."""
    return (exact_Qk[:, :, None] == found_Qk[:, None]).any(axis=2).mean(axis=1)


def _tuned(
    whole: ServingIndex, bank: Bank, representative_N: IntArray, prediction_QD: FloatArray
) -> IndexFacts:
    """Return the facts with the least effort that agrees well enough."""
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
