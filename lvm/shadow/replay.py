"""Shadow replay: all candidates answer the same queries over one bank, compared in pairs.

Shapes: N bank rows, D vector dim, Q queries.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from lvm.bank.store import Bank
from lvm.evaluation.evaluate import query_table
from lvm.models.facts import Facts
from lvm.shadow.comparison import Replay, ShadowResult, compare
from lvm.shadow.measuring import Measurement, MeasurementFailed, Questions, measure
from lvm.windows.planning import TRAIN, VAL, Windows, split_by_document
from lvm.windows.queries import Queries


class Files(Protocol):
    """The files of a predictor somewhere else; both raise ValueError where they cannot be had."""

    def describe(self, folder: Path) -> None:
        """Write config.json, and row_correction.npy where it has one, into `folder`."""

    def fetch(self, folder: Path) -> None:
        """Write these and the weights into `folder`."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A predictor that may become the baseline, with the facts of its making.

    It is here, as `model` with a `row_correction` (N, 2), or it lies in `files`. Without a row
    correction there are no corrected figures.
    """

    name: str
    model: nn.Module | None
    facts: Facts
    version: str | None = None
    row_correction: NDArray[np.float32] | None = None
    files: Files | None = None


Measure = Callable[[Candidate, Bank, Windows, Queries], Measurement]


def measure_here(
    candidate: Candidate, bank: Bank, windows: Windows, removed: Queries
) -> Measurement:
    """Measure a candidate whose model is here in this process, with its own length of context."""
    assert candidate.model is not None
    queries = removed.as_read(candidate.facts.ctx)
    asked = Questions(queries, removed)
    groups = windows.representative_N
    return measure(candidate.model, bank, groups, asked, candidate.row_correction)


def replay(
    candidates: Sequence[Candidate],
    bank: Bank,
    windows: Windows,
    queries: Queries,
    baseline_name: str | None = None,
    seed: int = 0,
    measure: Measure = measure_here,
) -> ShadowResult:
    """Replay `queries` through every candidate that fits the bank, each with its own context.

    `measure` does the work of one candidate; where it raises MeasurementFailed, that candidate is
    left unscored for this reason, the others go on.

    Raises:
        ValueError: there is no candidate, a name stands for two, no query is given.
    """
    _check(candidates, queries)
    refusals = {candidate.name: _refusal(candidate, bank) for candidate in candidates}
    accepted = [one for one in candidates if refusals[one.name] is None]
    removed = queries
    if accepted:
        removed = queries.with_ctx(max(candidate.facts.ctx for candidate in accepted))
    replays = []
    for candidate in tqdm(candidates, desc="replay", unit="candidate", disable=None, leave=False):
        refusal = refusals[candidate.name]
        if refusal is None:
            replays.append(replay_candidate(candidate, bank, windows, removed, measure))
        else:
            replays.append(_unscored(candidate, refusal=refusal))
    return compare(replays, bank, windows, removed, baseline_name, seed)


def replay_candidate(
    candidate: Candidate,
    bank: Bank,
    windows: Windows,
    removed: Queries,
    measure: Measure = measure_here,
) -> Replay:
    """Rank the answers of one candidate; the rows of the contexts of `removed` are left out."""
    try:
        found = measure(candidate, bank, windows, removed)
    except MeasurementFailed as failure:
        return _unscored(candidate, failure=str(failure))
    measured = dataclasses.replace(
        _unscored(candidate, num_non_finite=found.num_non_finite),
        origin=found.origin,
        measured_at=found.at,
        seconds=found.seconds,
    )
    if found.ranks is None:
        return measured
    return dataclasses.replace(
        measured,
        leak=_leak(candidate, bank, windows, removed),
        latency_ms=found.latency_ms,
        per_query=query_table(removed, bank).assign(**found.answers()),
    )


def _check(candidates: Sequence[Candidate], queries: Queries) -> None:
    if not candidates:
        raise ValueError("candidates: none given; name registered versions or free predictors")
    if not len(queries):
        raise ValueError(
            "queries: none given; export windows with a test split, or give a query log"
        )
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"candidates: {', '.join(repeated)} given twice; name each one once")


def _refusal(candidate: Candidate, bank: Bank) -> str | None:
    """Say why the candidate cannot be compared on this bank; None where it can."""
    if candidate.facts.dim != bank.dim:
        return f"predicts {candidate.facts.dim} dims, the bank has {bank.dim}"
    if candidate.facts.bank_sha256 not in (bank.sha256, *bank.bases):
        theirs, ours = candidate.facts.bank_sha256[:12] or "unknown", bank.sha256[:12]
        return f"made from another bank ({theirs}, this one is {ours})"
    return None


def _leak(candidate: Candidate, bank: Bank, windows: Windows, queries: Queries) -> str | None:
    """Say how the candidate may have seen the answers of the queries; None where it has not."""
    if candidate.facts.leaky:
        return "trained on leaky windows (split=random)"
    split_N = windows.split_N
    if windows.leaky or candidate.facts.seed != windows.seed:
        split_N = split_by_document(bank, candidate.facts.seed)
    in_train = np.zeros(bank.num_rows, dtype=bool)
    in_train[windows.representative_N[split_N == TRAIN]] = True
    num_seen = int(in_train[windows.representative_N[queries.target_row_Q]].sum())
    if num_seen:
        return f"{num_seen:,} of {len(queries):,} answers were among its train rows"
    num_chosen = int((split_N[queries.target_row_Q] == VAL).sum())
    if num_chosen:
        return f"{num_chosen:,} of {len(queries):,} answers were val rows, by which it was chosen"
    return None


def _unscored(
    candidate: Candidate,
    refusal: str | None = None,
    failure: str | None = None,
    num_non_finite: int = 0,
) -> Replay:
    return Replay(
        name=candidate.name,
        kind=candidate.facts.kind,
        version=candidate.version,
        ctx=candidate.facts.ctx,
        refusal=refusal,
        failure=failure,
        num_non_finite=num_non_finite,
    )
