"""The shadow replay: all candidates answer the same queries over one bank.

A candidate that cannot be compared fairly is refused; measurements are cached. Shapes: N bank rows,
D vector dim, Q queries, B batch, T time.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from lvm.bank.bank import Bank, open_bank
from lvm.evaluation.evaluate import query_table
from lvm.evaluation.latency import measure_latency
from lvm.models.facts import Facts, omits_own_document
from lvm.models.predict import POSITIONS_PER_PASS, predict_contexts, predict_queries
from lvm.retrieval.exact import exact_ranks, selection_score
from lvm.retrieval.hubness import MAX_TUNING_QUERIES
from lvm.retrieval.rerank import (
    NONE,
    StageInputs,
    chosen_weights,
    reranked_ranks,
    shortlist,
    stage_inputs,
)
from lvm.shadow.comparison import Outcome, ShadowResult, compare, scored
from lvm.system.atomic import Entry, cache_key, read_entry, write_entry
from lvm.system.processes import machine
from lvm.system.progress import part, steps
from lvm.windows.planning import TRAIN, VAL, ContextQueries, Queries, Windows, split_by_document

# Raise this number when equal inputs give other ranks or latencies: cached measurements expire.
MEASUREMENT = 8
ORDERS = ("rank", "rank_corrected")  # of plain cosines, of corrected scores
RERANKED = tuple(f"{order}_reranked" for order in ORDERS)
ANSWERS = ("rank", "rank_raw", "rank_corrected", *RERANKED, "top_row")
COLUMNS = ("query", "target_row", *ANSWERS)
FACTS = ("num_non_finite", "latency_ms", "seconds", "at", "val_hit_at_5")
STORE = Path("data/replays")
MEASURED_NOW, READ_BACK = "measured now", "read from the store"


class MeasurementFailed(Exception):
    """A measurement did not finish; the message says why."""


@dataclass(frozen=True, eq=False)
class Questions:
    """What one predictor is asked, and the rows that its answers are ranked among.

    `queries` hold the contexts that the predictor reads. `removed` are the same queries with the
    contexts whose rows are left out of the ranking, the same for every candidate.
    `representative_N` gives the first row of each row's duplicate group. With a `stage` the answers
    are also re-ranked. `val` are val queries, for a predictor without a logged val figure.

    Pickling stores the bank's path and hash instead of its vectors; unpickling opens it again, and
    raises ValueError if its contents have changed.
    """

    bank: Bank
    representative_N: NDArray[np.int64]
    queries: Queries
    removed: Queries
    stage: StageInputs | None = None
    val: Queries | None = None

    def read_by(self, ctx: int) -> "Questions":
        """Return the questions as a predictor with a context of `ctx` rows reads them."""
        val = None if self.val is None else self.val.with_ctx(ctx)
        return replace(self, queries=self.removed.as_read(ctx), val=val)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"bank": (self.bank.path.resolve(), self.bank.sha256)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, sha256 = state["bank"]
        bank = open_bank(path)
        if bank.sha256 != sha256:
            raise ValueError(f"bank {path}: was replaced while the replay ran")
        vars(self).update(state | {"bank": bank})


@dataclass(frozen=True, eq=False)
class Measurement:
    """The answers of one predictor.

    Attributes:
        ranks: the COLUMNS, one line a query, in the order of the queries; None if
            `num_non_finite` predictions are not finite. `rank_corrected` is NaN without a row
            correction, `rank_reranked` and `rank_corrected_reranked` without a second stage.
        latency_ms: p50 and p95 of one query whose whole context is read again, the model alone.
        val_hit_at_5: of the corrected order (plain without a row correction) on val, if asked.
        seconds: duration of the measurement.
        at: when it began (UTC, ISO 8601).
        origin: MEASURED_NOW or READ_BACK.
    """

    ranks: pd.DataFrame | None
    num_non_finite: int
    latency_ms: dict[str, float]
    seconds: float
    at: str
    val_hit_at_5: float | None = None
    origin: str = MEASURED_NOW


def measure(
    model: nn.Module, asked: Questions, row_correction: NDArray[np.float32] | None = None
) -> Measurement:
    """Rank the answers of a model, plain and with `row_correction` (N, 2), and time it."""
    bank, groups_N, removed = asked.bank, asked.representative_N, asked.removed
    begin, at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    with part("predict"):
        prediction_QD = predict(model, bank, asked.queries)
    num_bad = int((~np.isfinite(prediction_QD).all(axis=1)).sum())
    if num_bad:
        return Measurement(None, num_bad, {}, time.perf_counter() - begin, at)
    corrections = [None] if row_correction is None else [None, row_correction]
    with part("rank"):
        plain, *corrected = exact_ranks(prediction_QD, removed, bank, groups_N, corrections)
    ranks = pd.DataFrame(
        {
            "query": asked.queries.query_Q,
            "target_row": asked.queries.target_row_Q,
            "rank": plain.rank_Q,
            "rank_raw": plain.rank_raw_Q,
            "rank_corrected": corrected[0].rank_Q if corrected else np.nan,
            **dict.fromkeys(RERANKED, np.nan),
            "top_row": plain.top_row_Q,
        }
    )
    if asked.stage is not None:
        stage, clues = asked.stage.stage, asked.stage.asked
        chosen = chosen_weights(model, bank, groups_N, asked.stage, corrections)
        for order, correction, weights in zip(ORDERS, corrections, chosen, strict=False):
            listed = shortlist(prediction_QD, removed, bank, groups_N, correction)
            score_QC = stage.scores(listed, clues, weights[stage.rerank])
            before_Q = ranks[order].to_numpy()
            ranks[f"{order}_reranked"] = reranked_ranks(listed, score_QC, before_Q)
    latency_ms = measure_latency(model, bank, timed_queries(asked.queries, bank))
    val_hit_at_5 = None
    if asked.val is not None:
        val_QD = predict_queries(model, bank, asked.val)
        (found,) = exact_ranks(val_QD, asked.val, bank, groups_N, corrections[-1:])
        val_hit_at_5 = selection_score(found.rank_Q)[0]
    return Measurement(ranks, 0, latency_ms, time.perf_counter() - begin, at, val_hit_at_5)


def predict(model: nn.Module, bank: Bank, queries: Queries) -> NDArray[np.float32]:
    """Return the predicted unit vector of each query, (Q, D).

    Recorded contexts of equal length share a forward pass. Each is read whole, so `queries` must
    already be cut to the model's context length.
    """
    if not isinstance(queries, ContextQueries):
        return predict_queries(model, bank, queries)
    prediction_QD = np.empty((len(queries), bank.dim), dtype=np.float32)
    num_rows_Q = queries.num_rows()
    for length in np.unique(num_rows_Q):
        place_Q = np.flatnonzero(num_rows_Q == length)
        per_pass = max(1, POSITIONS_PER_PASS // int(length))
        for begin in range(0, len(place_Q), per_pass):
            chosen = place_Q[begin : begin + per_pass]
            row_BT = np.stack(list(queries.context_row_Q[chosen]))
            context_BTD = bank.unit(row_BT.ravel()).reshape(*row_BT.shape, bank.dim)
            prediction_QD[chosen] = predict_contexts(model, context_BTD)
    return prediction_QD


def timed_queries(queries: Queries, bank: Bank) -> Queries:
    """Return queries with contexts of the same lengths that are runs of rows, for timing."""
    if not isinstance(queries, ContextQueries):
        return queries
    num_rows_Q = np.minimum(queries.num_rows(), bank.num_rows)
    first_row_Q = np.zeros_like(num_rows_Q)
    return Queries(queries.query_Q, num_rows_Q, first_row_Q, first_row_Q, queries.ctx)


@dataclass(frozen=True, eq=False)
class Job:
    """A measurement to make: of the model in `folder`, cached as the file `result` under `key`."""

    folder: Path
    result: Path
    key: str
    asked: Questions


def measurement_key(model: str, row_correction: str, asked: Questions) -> str:
    """Return a hash of everything that a measurement depends on.

    `model` describes the model, with the sha256 of its weights; `row_correction` is the sha256 of
    its row correction. Torch and the machine count, too: they change latencies, and the last bits
    of scores.
    """
    way = [MEASUREMENT, torch.__version__, machine()]
    asked_for = (asked.queries, asked.removed, *([] if asked.val is None else [asked.val]))
    queries = [[*query_parts(one)] for one in asked_for]
    bank = [asked.bank.sha256, asked.representative_N]
    stage = [] if asked.stage is None else asked.stage.parts()
    if asked.stage is not None:
        stage += [[*query_parts(one)] for one in (asked.stage.val, asked.stage.val_removed)]
    return cache_key(way, model, row_correction, bank, queries, stage)


def query_parts(queries: Queries) -> Iterator[Any]:
    """Yield what tells queries apart: numbers, targets and contexts, in their order."""
    yield from (queries.query_Q, queries.target_row_Q, queries.first_row_Q)
    yield from (queries.sequence_start_Q, queries.ctx)
    if isinstance(queries, ContextQueries):
        yield queries.num_rows()
        yield np.concatenate([np.zeros(0, np.int64), *queries.context_row_Q])


def measurement_path(store: Path, key: str) -> Path:
    """Return the file of the measurement `key`, whether it is there or not."""
    return store / key[:2] / f"{key}.safetensors"


def write_measurement(path: Path, key: str, found: Measurement) -> None:
    """Write a measurement; raises OSError if the disk refuses it."""
    ranks = pd.DataFrame(columns=COLUMNS, dtype=float) if found.ranks is None else found.ranks
    columns = {name: ranks[name].to_numpy() for name in COLUMNS}
    write_entry(path, key, Entry(columns, {name: getattr(found, name) for name in FACTS}))


def read_measurement(path: Path, key: str) -> Measurement | None:
    """Return the measurement `key`; None if it is missing or damaged."""
    found = read_entry(path, key)
    if found is None:
        return None
    ranks = None if found.values["num_non_finite"] else pd.DataFrame(found.arrays)[[*COLUMNS]]
    return Measurement(ranks, **found.values, origin=READ_BACK)


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
    `model_id` are None until it is registered and logged. `val_hit_at_5` is that of the served
    order, NaN where it is not known.
    """

    name: str
    model: nn.Module | None
    facts: Facts
    version: str | None = None
    row_correction: NDArray[np.float32] | None = None
    files: Files | None = None
    model_id: str | None = None
    val_hit_at_5: float = math.nan


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
    for one in steps(candidates, "replay", "candidates"):
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
    is_logged = not math.isnan(candidate.val_hit_at_5)
    val = None if is_logged else windows.queries["val"].head(MAX_TUNING_QUERIES)
    asked = Questions(bank, windows.representative_N, removed, removed, val=val)
    try:
        found = measure(candidate, asked.read_by(candidate.facts.ctx))
    except MeasurementFailed as failure:
        return _unscored(candidate, failure=str(failure))
    origin = {"num_non_finite": found.num_non_finite, "origin": found.origin}
    origin |= {"measured_at": found.at, "seconds": found.seconds}
    if found.ranks is None:
        return _unscored(candidate, **origin)
    leak = leak_of(candidate.facts, bank, windows, removed)
    one = _unscored(candidate, **origin, leak=leak, latency_ms=found.latency_ms)
    if found.val_hit_at_5 is not None:
        one = replace(one, val_hit_at_5=found.val_hit_at_5)
    answers = {name: found.ranks[name] for name in ANSWERS}
    return scored(one, query_table(removed, bank).assign(**answers), bank, seed)


def stage_opener(
    rerank: str, bank: Bank, windows: Windows
) -> Callable[[Queries], StageInputs] | None:
    """Return a function that opens the second stage of a replay, once per length of context."""
    known: dict[int, StageInputs] = {}

    def open_once(queries: Queries) -> StageInputs:
        if queries.ctx not in known:
            known[queries.ctx] = stage_inputs(rerank, bank, windows, queries, windows.seed)
        return known[queries.ctx]

    return None if rerank == NONE else open_once


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
    known |= {"val_hit_at_5": candidate.val_hit_at_5}
    known["counts_own"] = not omits_own_document(facts.fit_version)
    return Outcome(candidate.name, facts.kind, candidate.version, facts.ctx, **known)  # type: ignore[arg-type]
