"""The shadow replay: all candidates answer the same queries over one bank."""

from collections.abc import Callable, Sequence

from tqdm import tqdm

from lvm.bank.store import Bank
from lvm.evaluation.evaluate import query_table
from lvm.retrieval.rerank import LanePrediction, predict_lanes
from lvm.shadow.candidates import Candidate, leak_of, refusal_of
from lvm.shadow.comparison import Outcome, ShadowResult, compare, scored
from lvm.shadow.measuring import ANSWERS, Measurement, MeasurementFailed, Questions, measure
from lvm.windows.planning import Windows
from lvm.windows.queries import Queries

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
