"""Trainings of one fraction of the data, one width, one seed; results and states are cached.

Shapes: N bank rows, W windows, K blocks of documents, Q queries, D vector dim.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.evaluation.metrics import figures
from lvm.models.predict import predict_queries
from lvm.models.weights import FIT_VERSION, model_digest
from lvm.retrieval.exact import exact_ranks
from lvm.system.atomic import Entry, cache_key, read_entry, write_entry
from lvm.system.seeding import generator
from lvm.training.checkpoint import TRAINING_VERSION
from lvm.training.config import TrainConfig, as_dict, resolve
from lvm.training.data import Batches
from lvm.training.loop import train
from lvm.windows.planning import (
    SPLITS,
    TRAIN,
    Queries,
    Windows,
    contents_sha256,
    runs,
    train_windows,
)

MAX_CHOICE_QUERIES = 1000
ROUNDS = 8  # validations of a training, if the data allow it
LEFT_OUT = len(SPLITS)  # the split of a train row that a part does not have
NO_BLOCK = -1


@dataclass(frozen=True)
class Cell:
    """What is trained; `steps` and `lr` differ from the plan's in the trials before the grid."""

    fraction: float
    width: int
    seed: int
    steps: int
    lr: float


@dataclass(frozen=True, eq=False)
class CellResult:
    """Ranks (Q,) of the measured queries, by the round with the best figures on `choice`.

    `rows` and `documents` count what was trained on, `rounds` the validations. `was_kept` tells
    whether the result was read from the cache.
    """

    cell: Cell
    rank_Q: NDArray[np.float64]
    parameters: int
    rows: int
    documents: int
    steps: int
    best_round: int
    rounds: int
    history: list[dict[str, float]]
    was_kept: bool


@dataclass(frozen=True, eq=False)
class ValQueries:
    """val queries in two parts that share no document: `choice` picks rounds, `measured` judges.

    `document_Q` names the document of each measured query.
    """

    choice: Queries
    measured: Queries
    document_Q: NDArray[np.integer]


def divide_queries(
    bank: Bank, windows: Windows, choice_share: float, max_queries: int | None
) -> ValQueries:
    """Give whole val documents to `choice` until it has its share of the queries.

    `choice` has at most MAX_CHOICE_QUERIES queries, `measured` `max_queries` (None: MAX_QUERIES).
    """
    queries = windows.queries["val"]
    document_Q = bank.document_N[queries.target_row_Q]
    names, code_Q = np.unique(document_Q, return_inverse=True)
    order = generator(windows.seed, "choice documents").permutation(len(names))
    before = np.cumsum(np.bincount(code_Q)[order])
    num_choice = 1 + int(np.searchsorted(before, choice_share * len(queries)))
    for_choice_Q = np.isin(code_Q, order[:num_choice])
    choice = queries.take(np.flatnonzero(for_choice_Q)).head(MAX_CHOICE_QUERIES)
    measured = queries.take(np.flatnonzero(~for_choice_Q)).head(max_queries or MAX_QUERIES)
    return ValQueries(choice, measured, bank.document_N[measured.target_row_Q])


class Trainer:
    """Trains cells over one bank, or reads the results that earlier runs cached in `folder`.

    All cells share the bank, the windows, the queries and `config`, in which a cell replaces width,
    seed, steps and learning rate. A training that is interrupted resumes from its last round.
    """

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
        queries: ValQueries,
        config: TrainConfig,
        folder: Path,
        on_round: Callable[[Cell, dict[str, float]], None] = lambda cell, record: None,
    ) -> None:
        self.bank, self.windows, self.queries = bank, windows, queries
        # All cells have the batches of the whole bank, however few rows they train on.
        batch_size = resolve(config, windows.ctx, windows.num_train_rows).batch_size
        self.config = replace(config, batch_size=batch_size)
        self.folder, self.on_round = folder, on_round

    def steps_per_epoch(self) -> float:
        """Return the mean optimizer steps of a pass over all train rows."""
        return self._steps_of(self.windows)

    def result(self, cell: Cell) -> CellResult:
        """Return the cached result of `cell`, or train it."""
        part, epochs = self._part(cell)
        sizes: dict[str, Any] = {"hidden": cell.width, "seed": cell.seed, "lr": cell.lr}
        # Ended by patience, a cell would be judged before its learning rate has come down.
        rounds: dict[str, Any] = {"epochs": epochs, "patience": epochs}
        config = replace(self.config, **sizes, **rounds, max_steps=cell.steps)
        key = self._key(part.sha256, as_dict(resolve(config, part.ctx)))
        found = read_entry(self._path(key), key)
        was_kept = found is not None
        if found is None:
            state = self.folder / f"{key[:16]}-state.safetensors"
            found = self._train(cell, config, part, state)
            write_entry(self._path(key), key, found)
            state.unlink(missing_ok=True)
        rank_Q = found.arrays["rank_Q"]
        return CellResult(cell=cell, rank_Q=rank_Q, was_kept=was_kept, **found.values)

    def ranks(self, model: nn.Module, queries: Queries) -> NDArray[np.float64]:
        """Return the plain filtered ranks over the whole bank, (Q,)."""
        prediction_QD = predict_queries(model, self.bank, queries)
        groups_N = self.windows.representative_N
        return exact_ranks(prediction_QD, queries, self.bank, groups_N)[0].rank_Q

    def measured(self, model: nn.Module) -> NDArray[np.float64]:
        """Return the cached ranks of the measured queries by a model that is not of the grid."""
        key = self._key(self.windows.sha256, model_digest(model))
        found = read_entry(self._path(key), key)
        if found is None:
            found = Entry({"rank_Q": self.ranks(model, self.queries.measured)})
            write_entry(self._path(key), key, found)
        return found.arrays["rank_Q"]

    def _key(self, windows_sha256: str, model: Any) -> str:
        asked = [self.queries.choice.target_row_Q, self.queries.measured.target_row_Q]
        versions = [TRAINING_VERSION, FIT_VERSION, torch.__version__]
        return cache_key(versions, self.bank.sha256, windows_sha256, asked, model)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key[:16]}.safetensors"

    def _train(self, cell: Cell, config: TrainConfig, part: Windows, state: Path) -> Entry:
        result = train(
            self.bank,
            part,
            config,
            validate=lambda model: figures(self.ranks(model, self.queries.choice)),
            on_epoch=lambda record: self.on_round(cell, record),
            state_path=state,
        )
        if result.optimiser_steps != cell.steps:  # it would be compared with cells of all steps
            raise RuntimeError(
                f"{cell}: trained {result.optimiser_steps} optimizer steps, not {cell.steps}"
            )
        facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in result.model.parameters()),
            "rows": len(part.train_rows()),
            "documents": num_documents(self.bank, part),
            "steps": result.optimiser_steps,
            "best_round": result.best_epoch,
            "rounds": len(result.history),
            "history": result.history,
        }
        return Entry({"rank_Q": self.ranks(result.model, self.queries.measured)}, facts)

    def _part(self, cell: Cell) -> tuple[Windows, int]:
        """Return the windows of a cell and the number of epochs that its steps need.

        Windows are repeated so that rounds are equally long in all cells. Otherwise a small part
        would be validated after every few steps.
        """
        whole = self.steps_per_epoch()
        round_steps = whole * max(1, math.ceil(cell.steps / ROUNDS / whole))
        part = part_of(self.bank, self.windows, cell.fraction, cell.seed)
        repeats = 1
        for _ in range(2):  # the first count holds batches that are not full
            repeats = max(1, round(repeats * round_steps / self._steps_of(part)))
            part = part_of(self.bank, self.windows, cell.fraction, cell.seed, repeats)
        steps_by_now = itertools.accumulate(self._steps_of_epochs(part))
        return part, 1 + sum(1 for _ in itertools.takewhile(cell.steps.__gt__, steps_by_now))

    def _steps_of(self, part: Windows) -> float:
        """Return the mean optimizer steps of an epoch; they vary, since windows take turns."""
        return sum(itertools.islice(self._steps_of_epochs(part), ROUNDS)) / ROUNDS

    def _steps_of_epochs(self, part: Windows) -> Iterator[int]:
        """Yield the optimizer steps of epoch 1, 2, 3 and so on."""
        settings = resolve(self.config, part.ctx)
        batches = Batches(self.bank, part, settings.batch_size, settings.seed)
        for epoch in itertools.count(1):
            yield math.ceil(batches.num_batches(epoch) / settings.accumulation)


def part_of(bank: Bank, windows: Windows, fraction: float, seed: int, repeats: int = 1) -> Windows:
    """Return windows over a fraction of the train rows, in whole documents; the rest is unchanged.

    The blocks of neighbouring documents (`train_blocks`) are shuffled by `seed`; a part is the
    shortest prefix with `fraction` of the rows. So a smaller part lies within a larger one, and its
    windows are equally long. Each window appears `repeats` times, so that parts of different size
    can have epochs of one length; overlapping windows take turns as those of more documents would.
    """
    block_N = train_blocks(bank, windows)
    size_K = np.bincount(block_N[block_N != NO_BLOCK])
    order_K = generator(seed, "blocks of the train rows").permutation(len(size_K))
    needed = fraction * size_K.sum()
    num_chosen = 1 + int(np.searchsorted(np.cumsum(size_K[order_K]), needed - 0.5))
    chosen_K = np.zeros(len(size_K) + 1, bool)  # the last place is that of NO_BLOCK
    chosen_K[order_K[:num_chosen]] = True
    split_N = windows.split_N.copy()
    split_N[(split_N == TRAIN) & ~chosen_K[block_N]] = LEFT_OUT
    run_start, run_rows = _train_runs(bank, split_N)
    cut_W2 = train_windows(run_start, run_rows, windows.ctx, windows.overlap)
    cut_W2 = np.tile(cut_W2, (repeats, 1))
    part = dataclasses.replace(
        windows,
        split_N=split_N,
        window_start_W=cut_W2[:, 0].copy(),
        window_rows_W=cut_W2[:, 1].astype(np.int32),
        window_split_W=np.full(len(cut_W2), TRAIN, np.int8),
        folder=None,
    )
    return dataclasses.replace(part, sha256=contents_sha256(part))


def train_blocks(bank: Bank, windows: Windows) -> NDArray[np.int64]:
    """Return the block of each row (N,), NO_BLOCK outside the train rows.

    A block ends with the first document that brings it to more than ctx rows. The rows left at the
    end of a run of train rows join the block before them.
    """
    block_N = np.full(bank.num_rows, NO_BLOCK, np.int64)
    begins_N = np.flatnonzero(np.diff(bank.document_N, prepend=-1))
    num_blocks = 0
    for start, rows in zip(*_train_runs(bank, windows.split_N), strict=True):
        end = start + rows
        borders = np.append(begins_N[(begins_N > start) & (begins_N < end)], end)
        first = start
        for border in borders.tolist():
            if border - first > windows.ctx:
                block_N[first:border] = num_blocks
                first, num_blocks = border, num_blocks + 1
        if first < end and first > start:
            block_N[first:end] = num_blocks - 1
        elif first < end:
            block_N[first:end] = num_blocks
            num_blocks += 1
    return block_N


def num_documents(bank: Bank, windows: Windows) -> int:
    """Return the number of documents with train rows."""
    return len(np.unique(bank.document_N[windows.train_rows()]))


def _train_runs(
    bank: Bank, split_N: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row and the length of each run of train rows within a sequence."""
    run_start, run_rows = runs(bank.sequence_N.astype(np.int64) * (LEFT_OUT + 1) + split_N)
    in_train = split_N[run_start] == TRAIN
    return run_start[in_train], run_rows[in_train]
