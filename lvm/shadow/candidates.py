"""The candidates of a shadow replay, and what keeps one from a fair comparison.

Shapes: N bank rows.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lvm.bank.store import Bank
from lvm.models.facts import Facts
from lvm.windows.planning import TRAIN, VAL, Windows, split_by_document
from lvm.windows.queries import Queries


class Files(Protocol):
    """The stored files of a predictor; both methods raise ValueError if they cannot be read."""

    def describe(self, folder: Path) -> None:
        """Write config.json, and row_correction.npy if there is one, into `folder`."""

    def fetch(self, folder: Path) -> None:
        """Write these files and the weights into `folder`."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A predictor that may become the baseline.

    Either `model` is in memory, with its `row_correction` (N, 2), or its `files` are fetched when
    it is measured. Without a row correction there are no corrected figures. `version` and
    `model_id` are None until it is registered and logged.
    """

    name: str
    model: nn.Module | None
    facts: Facts
    version: str | None = None
    row_correction: NDArray[np.float32] | None = None
    files: Files | None = None
    model_id: str | None = None


def is_made_from(facts: Facts, bank: Bank) -> bool:
    """Tell whether a predictor was made from this bank, or from one that the bank extends."""
    return facts.bank_sha256 in (bank.sha256, *bank.bases)


def refusal_of(facts: Facts, bank: Bank) -> str | None:
    """Return why a candidate cannot be compared on this bank; None if it can."""
    if facts.dim != bank.dim:
        return f"predicts {facts.dim} dims, the bank has {bank.dim}"
    if not is_made_from(facts, bank):
        theirs, ours = facts.bank_sha256[:12] or "unknown", bank.sha256[:12]
        return f"made from another bank ({theirs}, this one is {ours})"
    return None


def leak_of(facts: Facts, bank: Bank, windows: Windows, queries: Queries) -> str | None:
    """Return how a candidate may have seen the answers of the queries; None if it has not."""
    if facts.leaky:
        return "trained on leaky windows (split=random)"
    split_N = windows.split_N
    if windows.leaky or facts.seed != windows.seed:
        split_N = split_by_document(bank, facts.seed)
    in_train = np.zeros(bank.num_rows, dtype=bool)
    in_train[windows.representative_N[split_N == TRAIN]] = True
    num_seen = int(in_train[windows.representative_N[queries.target_row_Q]].sum())
    if num_seen:
        return f"{num_seen:,} of {len(queries):,} answers were among its train rows"
    num_chosen = int((split_N[queries.target_row_Q] == VAL).sum())
    if num_chosen:
        return f"{num_chosen:,} of {len(queries):,} answers were val rows, by which it was chosen"
    return None


def split_seed(baseline: Facts | None, trained: Sequence[Facts], bank: Bank) -> int:
    """Return the seed to split the bank by: the baseline's, else the most common one, else 0.

    A candidate trained under another seed has seen some of the answers as train rows.
    """
    if baseline is not None and is_made_from(baseline, bank) and not baseline.leaky:
        return baseline.seed
    counts = Counter(facts.seed for facts in trained if not facts.leaky)
    return min(counts, key=lambda seed: (-counts[seed], seed), default=0)


def unique_names(candidates: Sequence[Candidate]) -> list[str]:
    """Return a name for each candidate: its model's, with ctx or else version if that repeats.

    The names that the candidates have now are not read.
    """
    names = []
    for one in candidates:
        rivals = [other for other in candidates if other.facts.model == one.facts.model]
        lengths = {other.facts.ctx for other in rivals}
        if len(rivals) == 1:
            names.append(one.facts.model)
        elif len(lengths) == len(rivals):
            names.append(f"{one.facts.model}-ctx{one.facts.ctx}")
        elif one.version is not None:
            names.append(f"{one.facts.model}-v{one.version}")
        else:
            number = "new" if one.model_id is None else one.model_id[:10]
            names.append(f"{one.facts.model}-{number}")
    return names
