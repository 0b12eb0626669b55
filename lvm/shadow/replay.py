"""The shadow replay: all candidates answer the same queries over one bank.

A candidate that cannot be compared fairly is refused. Shapes: N bank rows.
"""

from collections import Counter
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
from lvm.retrieval.rerank import LanePrediction, predict_lanes
from lvm.shadow.comparison import Outcome, ShadowResult, compare, scored
from lvm.shadow.measuring import ANSWERS, Measurement, MeasurementFailed, Questions, measure
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


Measure = Callable[[Candidate, Questions], Measurement]


def measure_here(candidate: Candidate, asked: Questions) -> Measurement:
    """Measure a candidate whose model is in memory, in this process."""
    assert candidate.model is not None
    return measure(candidate.model, asked, candidate.row_correction)


def replay(
    candidates: Sequence[Candidate],
    bank: Bank,
    windows: Windows,
    queries: Queries,
    baseline_name: str | None = None,
    seed: int = 0,
    measure: Measure = measure_here,
) -> ShadowResult:
    """Ask every candidate that fits the bank, each with its own context length, and compare.

    The rows of the longest of these contexts are removed from every ranking. A candidate for which
    `measure` raises MeasurementFailed is left unscored; the others go on.

    Raises:
        ValueError: there is no candidate, two share a name, or no query is given.
    """
    _check(candidates, queries)
    refusals = {one.name: refusal_of(one.facts, bank) for one in candidates}
    accepted = [one.facts.ctx for one in candidates if refusals[one.name] is None]
    removed = queries.with_ctx(max(accepted)) if accepted else queries
    outcomes = []
    for one in tqdm(candidates, desc="replay", unit="candidate", disable=None, leave=False):
        refusal = refusals[one.name]
        if refusal is None:
            outcomes.append(replay_candidate(one, bank, windows, removed, seed, measure))
        else:
            outcomes.append(_unscored(one, refusal=refusal))
    return compare(outcomes, bank, windows, removed, baseline_name, seed)


def replay_candidate(
    candidate: Candidate,
    bank: Bank,
    windows: Windows,
    removed: Queries,
    seed: int = 0,
    measure: Measure = measure_here,
) -> Outcome:
    """Ask one candidate; the rows of the contexts of `removed` are left out of its ranking."""
    asked = Questions(bank, windows.representative_N, removed, removed)
    try:
        found = measure(candidate, asked.read_by(candidate.facts.ctx))
    except MeasurementFailed as failure:
        return _unscored(candidate, failure=str(failure))
    told = {"num_non_finite": found.num_non_finite, "origin": found.origin}
    told |= {"measured_at": found.at, "seconds": found.seconds}
    if found.ranks is None:
        return _unscored(candidate, **told)
    leak = leak_of(candidate.facts, bank, windows, removed)
    one = _unscored(candidate, **told, leak=leak, latency_ms=found.latency_ms)
    answers = {name: found.ranks[name] for name in ANSWERS}
    return scored(one, query_table(removed, bank).assign(**answers), bank, seed)


def lane_predictor(bank: Bank, windows: Windows) -> Callable[[Queries], LanePrediction]:
    """Return a function that predicts the lanes of a replay's queries, once per context length."""
    known: dict[int, LanePrediction] = {}

    def predict_once(queries: Queries) -> LanePrediction:
        if queries.ctx not in known:
            known[queries.ctx] = predict_lanes(bank, windows, queries, windows.seed)
        return known[queries.ctx]

    return predict_once


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


def _unscored(candidate: Candidate, **known: object) -> Outcome:
    facts = candidate.facts
    return Outcome(candidate.name, facts.kind, candidate.version, facts.ctx, **known)  # type: ignore[arg-type]
