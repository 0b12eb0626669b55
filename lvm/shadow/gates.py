"""The gates on the way to the alias, each a pure function of one replay."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from lvm.evaluation.intervals import holm, points, smallest_p
from lvm.models.facts import FREE
from lvm.shadow.comparison import Comparison, Outcome, ShadowResult
from lvm.system.thresholds import GateRules


@dataclass(frozen=True)
class Check:
    """One gate for one candidate; `detail` gives the numbers it was decided by."""

    candidate: str
    gate: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Case:
    """One candidate before its gates; `incumbent` is what it has to take the alias from.

    `is_withdrawn` tells whether a rollback took the alias from it.
    """

    outcome: Outcome
    result: ShadowResult
    baseline: str | None
    incumbent: str | None
    rules: GateRules
    is_withdrawn: bool = False


Verdict = tuple[bool, str]


def run_gates(case: Case) -> list[Check]:
    """Run the gates in order, up to the first failure after which no figure means anything."""
    decisive = set(MEASURED) | ({"beats best free"} if case.outcome.kind == FREE else set())
    checks = []
    for gate, check in (MEASURED | EARNED).items():
        passed, detail = check(case)
        checks.append(Check(case.outcome.name, gate, passed, detail))
        if gate in decisive and not passed:
            break
    return checks


def _same_bank(case: Case) -> Verdict:
    refusal = case.outcome.refusal
    return refusal is None, refusal or f"bank {case.result.bank_sha256[:12]}"


def _finite(case: Case) -> Verdict:
    num_bad = case.outcome.num_non_finite
    if case.outcome.failure is not None:
        return False, f"gave no answers: {case.outcome.failure}"
    if num_bad:
        return False, f"{num_bad:,} of {case.result.num_queries:,} predictions are not finite"
    if not case.outcome.is_scored or not all(map(math.isfinite, case.outcome.figures.values())):
        return False, "has no finite figures"
    return True, f"all {case.result.num_queries:,} predictions are finite"


def _no_leak(case: Case) -> Verdict:
    if case.result.leaky:
        return False, "the windows are leaky (split=random); export them with split=document"
    if case.outcome.leak is not None:
        return False, case.outcome.leak
    return True, "no query was among its train rows"


def _enough_queries(case: Case) -> Verdict:
    result, rules = case.result, case.rules
    enough = result.num_queries >= rules.min_queries and result.num_documents >= rules.min_documents
    detail = f"{result.num_queries:,} queries from {result.num_documents:,} documents"
    if not enough:
        detail += f"; at least {rules.min_queries:,} from {rules.min_documents:,} are needed"
    return enough, detail


def _above_floor(case: Case) -> Verdict:
    floor = case.rules.floor_over_chance * 5 / case.result.num_answers
    low = case.outcome.ci95["hit_at_5"][0]
    return low > floor, (
        f"Hit@5 {100 * case.outcome.figures['hit_at_5']:.2f} %, interval from {100 * low:.2f} %; "
        f"floor {100 * floor:.2f} % = {case.rules.floor_over_chance:g} x chance"
    )


def _fast_enough(case: Case) -> Verdict:
    p95, limit = case.outcome.latency_ms.get("p95", math.nan), case.rules.latency_p95_ms
    measured = "one query, its whole context read anew, model only"
    return p95 <= limit, f"P95 {p95:.1f} ms ({measured}), limit {limit:g} ms"


def _beats_best_free(case: Case) -> Verdict:
    best = case.result.best_free
    if case.outcome.kind == FREE:
        is_best = case.outcome.name == best
        return (
            is_best,
            "is the best free predictor" if is_best else f"{best} is the better free predictor",
        )
    if best is None:
        return False, "no free predictor was replayed beside it"
    return _beats(case, case.result.comparison(case.outcome.name, best), best)


def _beats_baseline(case: Case) -> Verdict:
    if case.baseline is None:
        return True, "there is no baseline yet"
    baseline = case.result.outcome(case.baseline)
    why = "it was not replayed" if baseline is None else baseline.why_unscored or baseline.leak
    if why is not None:
        return False, f"no comparison with the baseline {case.baseline}: {why}; {_anew(case)}"
    return _beats(case, case.result.comparison(case.outcome.name, case.baseline), case.baseline)


def _anew(case: Case) -> str:
    """Say how the alias comes to a predictor that can be a reference here: the best free one."""
    best = None if case.result.best_free is None else case.result.outcome(case.result.best_free)
    start = case.outcome if best is None or best.version is None else best
    named = f"version={start.version or '<version>'}"
    return (
        f'to start anew with {start.name}: `mlflow run . -e promote -P {named} -P reason="a new '
        'start" --env-manager local`, then shadow-eval again'
    )


def _beats(case: Case, comparison: Comparison | None, reference: str) -> Verdict:
    if comparison is None:
        return False, f"was not compared with {reference}"
    difference, p_holm = comparison.hit_at_5, comparison.p_holm
    passed = difference.low > 0 and p_holm <= case.rules.alpha
    detail = f"Hit@5 {points(difference)} points against {reference}, p = {p_holm:.4f} (Holm)"
    if difference.low <= 0 <= difference.high and comparison.detectable > 0:
        detail += f"; less than {100 * comparison.detectable:.1f} points is not detectable here"
    reachable = comparison.num_contenders * smallest_p(difference.num_documents)
    if reachable > case.rules.alpha:
        detail += (
            f"; {difference.num_documents} documents cannot give the best of "
            f"{comparison.num_contenders} contenders less than p = {min(1, reachable):.4f} (Holm)"
        )
    return passed, detail


def _no_lane_falls(case: Case) -> Verdict:
    """A lane falls when even the upper end of its paired interval is below the allowed fall.

    Its p-value must tell so, too, after Holm over the judged lanes: of many lanes one falls by
    chance.
    """
    if case.incumbent is None or case.incumbent == case.outcome.name:
        return True, "nothing to compare with"
    comparison = case.result.comparison(case.outcome.name, case.incumbent)
    if comparison is None:
        return False, f"was not compared with {case.incumbent}"
    rules = case.rules
    judged = [
        lane
        for lane in comparison.lanes
        if lane.num_queries >= rules.lane_min_queries
        and lane.hit_at_5.num_documents >= rules.lane_min_documents
    ]
    if not judged:
        return True, f"none of {len(comparison.lanes)} lanes has enough queries to be judged"
    adjusted = holm([lane.hit_at_5.p_value for lane in judged])
    fallen = [
        lane
        for lane, p_holm in zip(judged, adjusted, strict=True)
        if not lane.hit_at_5.high >= -rules.lane_max_fall and p_holm <= rules.alpha
    ]
    if fallen:
        falls = ", ".join(f"{lane.lane} {points(lane.hit_at_5)} points" for lane in fallen)
        return False, f"falls against {case.incumbent} in {falls}"
    return True, f"none of {len(judged)} judged lanes (of {len(comparison.lanes)}) falls"


def _not_withdrawn(case: Case) -> Verdict:
    if not case.is_withdrawn:
        return True, "no rollback took the alias from it"
    return False, (
        f"a rollback took the alias from version {case.outcome.version}; only the entry point "
        "promote gives it back"
    )


# Conditions of a measurement: where one fails, the figures behind it mean nothing.
MEASURED: dict[str, Callable[[Case], Verdict]] = {
    "same bank": _same_bank,
    "finite": _finite,
    "no leak": _no_leak,
    "enough queries": _enough_queries,
}
# What a candidate must show.
EARNED: dict[str, Callable[[Case], Verdict]] = {
    "beats best free": _beats_best_free,
    "above floor": _above_floor,
    "beats baseline": _beats_baseline,
    "no lane falls": _no_lane_falls,
    "fast enough": _fast_enough,
    "not withdrawn": _not_withdrawn,
}
