"""One trained cell: a fraction of the data, a width, a seed.

Shapes: Q queries, D vector dim.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.evaluation.metrics import figures
from lvm.models.fits import model_digest
from lvm.prediction.predict import predict_queries
from lvm.retrieval.exact import exact_ranks
from lvm.studies.scaling.fractions import num_documents, part_of
from lvm.studies.scaling.store import CellStore, Kept
from lvm.system.seeding import generator
from lvm.training.batches import Batches
from lvm.training.config import TrainConfig, as_dict, resolve
from lvm.training.loop import train
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

MAX_CHOICE_QUERIES = 1000
ROUNDS = 8  # choices of an epoch in a whole training, where the data allow it


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
    """Ranks (Q,) of the measured queries by the round that the choice queries liked best.

    `rows` and `documents` count what was trained on, `rounds` how often it was validated,
    `was_kept` tells whether an earlier run had trained it.
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
class Questions:
    """val queries in two parts that share no document: `choice` picks rounds, `measured` judges."""

    choice: Queries
    measured: Queries
    document_Q: NDArray[np.integer]

    def digest(self) -> str:
        """Return a hash of the rows that are asked."""
        rows = [self.choice.target_row_Q, self.measured.target_row_Q]
        return hashlib.sha256(b"|".join(row_Q.tobytes() for row_Q in rows)).hexdigest()


def divide_queries(
    bank: Bank, windows: Windows, choice_share: float, max_queries: int | None
) -> Questions:
    """Give whole val documents to the choice until it has its share of the queries.

    At most MAX_CHOICE_QUERIES and `max_queries` (None: MAX_QUERIES) of the two parts are asked.
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
    return Questions(choice, measured, bank.document_N[measured.target_row_Q])


class Trainer:
    """Trains cells over one bank, or reads what an earlier run kept of them.

    All cells share bank, windows, queries and `config`, in which a cell replaces width, seed, steps
    and lr.
    """

    def __init__(
        self,
        bank: Bank,
        windows: Windows,
        questions: Questions,
        config: TrainConfig,
        store: CellStore,
        on_round: Callable[[Cell, dict[str, float]], None] = lambda cell, record: None,
    ) -> None:
        self.bank, self.windows, self.questions = bank, windows, questions
        self.config, self.store, self.on_round = config, store, on_round

    def steps_per_epoch(self) -> float:
        """Return the mean optimiser steps of a pass over all train rows."""
        return self._steps_of(self.windows)

    def result(self, cell: Cell) -> CellResult:
        """Train `cell`, unless an earlier run did, going on from where one was stopped."""
        part, epochs = self._part(cell)
        sizes: dict[str, Any] = {"hidden": cell.width, "seed": cell.seed, "lr": cell.lr}
        # Ended by patience, a cell would be judged before its learning rate has come down.
        rounds: dict[str, Any] = {"epochs": epochs, "patience": epochs}
        config = replace(self.config, **sizes, **rounds, max_steps=cell.steps)
        key = self.store.key(
            {
                "bank": self.bank.sha256,
                "part": part.sha256,
                "config": as_dict(resolve(config, part.ctx)),
                "queries": self.questions.digest(),
            }
        )
        found = self.store.read(key)
        was_kept = found is not None
        if found is None:
            found = self._train(cell, config, part, key)
            self.store.write(key, found)
        return CellResult(cell=cell, rank_Q=found.rank_Q, was_kept=was_kept, **found.facts)

    def ranks(self, model: nn.Module, queries: Queries) -> NDArray[np.float64]:
        """Return the plain filtered ranks over the whole bank."""
        prediction_QD = predict_queries(model, self.bank, queries)
        groups = self.windows.representative_N
        return exact_ranks(prediction_QD, queries, self.bank, groups)[0].rank_Q

    def measured(self, model: nn.Module) -> NDArray[np.float64]:
        """Return the ranks of the measured queries by a model that is not of the grid."""
        parts = {"bank": self.bank.sha256, "windows": self.windows.sha256}
        parts |= {"queries": self.questions.digest(), "model": model_digest(model)}
        key = self.store.key(parts)
        found = self.store.read(key)
        if found is None:
            found = Kept(self.ranks(model, self.questions.measured), {})
            self.store.write(key, found)
        return found.rank_Q

    def _train(self, cell: Cell, config: TrainConfig, part: Windows, key: str) -> Kept:
        result = train(
            self.bank,
            part,
            config,
            validate=lambda model: figures(self.ranks(model, self.questions.choice)),
            on_epoch=lambda record: self.on_round(cell, record),
            state_path=self.store.state_path(key),
        )
        if result.optimiser_steps != cell.steps:  # it would be compared with cells of all steps
            raise RuntimeError(
                f"{cell}: trained {result.optimiser_steps} optimiser steps, not {cell.steps}"
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
        return Kept(self.ranks(result.model, self.questions.measured), facts)

    def _part(self, cell: Cell) -> tuple[Windows, int]:
        """Return the windows of a cell, the epochs that its steps need.

        Windows are repeated so that rounds are as long in all cells: a small part would be
        validated after every few steps otherwise.
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
        """Return the mean optimiser steps of an epoch, since windows take turns."""
        return sum(itertools.islice(self._steps_of_epochs(part), ROUNDS)) / ROUNDS

    def _steps_of_epochs(self, part: Windows) -> Iterator[int]:
        """Yield the optimiser steps of each epoch, from epoch 1 on, without an end."""
        settings = resolve(self.config, part.ctx)
        batches = Batches(self.bank, part, settings.batch_size, settings.seed)
        for epoch in itertools.count(1):
            yield math.ceil(batches.num_batches(epoch) / settings.accumulation)
