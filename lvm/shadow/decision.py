"""Decide who takes the alias after a replay, gate by gate; equal input gives an equal decision."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvm.evaluation.metrics import holm, points, smallest_p
from lvm.models.facts import FREE, TRAINED
from lvm.shadow.comparison import Comparison, Outcome, ShadowResult
from lvm.system.settings import GateRules


@dataclass(frozen=True)
class Check:
    """One gate for one candidate; `detail` gives the numbers it was decided by."""

    candidate: str
    gate: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Decision:
    """The result of a contest.

    Attributes:
        promote: names that take the alias, in this order; empty if nothing changes.
        winner: the baseline afterwards; None while there is none.
        baseline: the baseline before.
        reasons: sentences for a reader, the outcome first.
        checks: every gate of every candidate.
    """

    promote: tuple[str, ...]
    winner: str | None
    baseline: str | None
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]

    def report(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return asdict(self)

    def not_carried_out(self, moved: Sequence[str], reason: str) -> str:
        """Return the line for a promotion that failed after the names `moved` took the alias."""
        holder = moved[-1] if moved else self.baseline or "none"
        missed = ", then ".join(self.promote[len(moved) :])
        return f"NOT CARRIED OUT: {missed} did not take the alias ({reason}); baseline is {holder}"


@dataclass(frozen=True)
class Contest:
    """What the gates read beside the candidate; `withdrawn` names those that were rolled back."""

    result: ShadowResult
    baseline: str | None
    rules: GateRules
    withdrawn: frozenset[str] = frozenset()

    @property
    def incumbent(self) -> str | None:
        """Return what a candidate has to take the alias from."""
        return self.baseline or self.result.best_free


Passed = tuple[bool, str]
Gate = Callable[[Outcome, Contest], Passed]


def decide(
    result: ShadowResult,
    baseline_name: str | None,
    rules: GateRules,
    withdrawn: frozenset[str] = frozenset(),
) -> Decision:
    """Decide by the gates.

    With a baseline, the best candidate that passes every gate takes the alias. Without one, the
    best free predictor takes it first, and a trained model may take it from there. If the alias has
    moved since the replay, nothing changes.
    """
    if baseline_name != result.baseline_name:
        reason = (
            f"{_or_none(baseline_name)} stays baseline: the replay compared with "
            f"{_or_none(result.baseline_name)}, which is no longer the baseline; "
            "run shadow-eval again"
        )
        return Decision((), baseline_name, baseline_name, (reason,), ())
    contest = Contest(result, baseline_name, rules, withdrawn)
    checks: list[Check] = []
    passing: list[Outcome] = []
    for outcome in result.outcomes:
        if outcome.name != baseline_name:
            own = run_gates(outcome, contest)
            checks += own
            if all(check.passed for check in own):
                passing.append(outcome)
    promote = _promotions(contest, passing)
    winner = promote[-1] if promote else baseline_name
    reasons = _reasons(result, promote, checks)
    return Decision(tuple(promote), winner, baseline_name, tuple(reasons), tuple(checks))


def run_gates(outcome: Outcome, contest: Contest) -> list[Check]:
    """Run the gates in order, up to the first failure that makes the other figures meaningless."""
    decisive = {*VALIDITY, *(["beats best free"] if outcome.kind == FREE else [])}
    checks = []
    for name, gate in (VALIDITY | MERIT).items():
        passed, detail = gate(outcome, contest)
        checks.append(Check(outcome.name, name, passed, detail))
        if name in decisive and not passed:
            break
    return checks


def _promotions(contest: Contest, passing: Sequence[Outcome]) -> list[str]:
    """Choose among the passing candidates, which are in ranking order."""
    if contest.baseline is not None:
        return [passing[0].name] if passing else []
    first = [one.name for one in passing if one.name == contest.result.best_free]
    trained = [one.name for one in passing if one.kind == TRAINED]
    return first + trained[:1]


def _reasons(result: ShadowResult, promote: Sequence[str], checks: Sequence[Check]) -> list[str]:
    """Return the promotions first, then why each other candidate is not promoted."""
    incumbent = result.baseline_name
    reasons = []
    for name in promote:
        reasons.append(_promotion_reason(result, incumbent, name))
        incumbent = name
    if not promote:
        stays = "there is no baseline" if incumbent is None else f"{incumbent} stays baseline"
        reasons.append(f"{stays}: no candidate passed every gate")
    for name in dict.fromkeys(check.candidate for check in checks):
        if name in promote:
            continue
        failed = [check for check in checks if check.candidate == name and not check.passed]
        why = failed[0].detail if failed else f"passed every gate, but {promote[-1]} ranks higher"
        also = ", ".join(check.gate for check in failed[1:])
        reasons.append(f"{name} is not promoted: {why}" + (f" (nor: {also})" if also else ""))
    return reasons


def _promotion_reason(result: ShadowResult, incumbent: str | None, name: str) -> str:
    outcome = result.outcome(name)
    assert outcome is not None
    if incumbent is None:
        low, high = (100 * value for value in outcome.ci95["hit_at_5"])
        what = "the best free predictor" if outcome.kind == FREE else "better than the free ones"
        return (
            f"{name} becomes the first baseline, {what}: Hit@5 "
            f"{100 * outcome.figures['hit_at_5']:.1f} % [{low:.1f}, {high:.1f}]"
        )
    comparison = result.comparison(name, incumbent)
    assert comparison is not None
    return (
        f"{name} takes the alias from {incumbent}: Hit@5 {points(comparison.hit_at_5)} points, "
        f"p = {comparison.p_holm:.4f} (Holm)"
    )


def _or_none(name: str | None) -> str:
    return name if name is not None else "none"


def _same_bank(outcome: Outcome, contest: Contest) -> Passed:
    refusal = outcome.refusal
    return refusal is None, refusal or f"bank {contest.result.bank_sha256[:12]}"


def _finite(outcome: Outcome, contest: Contest) -> Passed:
    num_queries = contest.result.num_queries
    if outcome.failure is not None:
        return False, f"gave no answers: {outcome.failure}"
    if outcome.num_non_finite:
        return False, f"{outcome.num_non_finite:,} of {num_queries:,} predictions are not finite"
    if not outcome.is_scored or not all(map(math.isfinite, outcome.figures.values())):
        return False, "has no finite figures"
    return True, f"all {num_queries:,} predictions are finite"


def _no_leak(outcome: Outcome, contest: Contest) -> Passed:
    if contest.result.leaky:
        return False, "the windows are leaky (split=random); export them with split=document"
    if outcome.leak is not None:
        return False, outcome.leak
    return True, "no query was among its train rows"


def _enough_queries(outcome: Outcome, contest: Contest) -> Passed:
    result, rules = contest.result, contest.rules
    enough = result.num_queries >= rules.min_queries and result.num_documents >= rules.min_documents
    detail = f"{result.num_queries:,} queries from {result.num_documents:,} documents"
    if not enough:
        detail += f"; at least {rules.min_queries:,} from {rules.min_documents:,} are needed"
    return enough, detail


def _beats_best_free(outcome: Outcome, contest: Contest) -> Passed:
    best = contest.result.best_free
    if outcome.kind == FREE:
        if outcome.name == best:
            return True, "is the best free predictor"
        return False, f"{best} is the better free predictor"
    if best is None:
        return False, "no free predictor was replayed beside it"
    return _beats(outcome, contest, best)


def _above_floor(outcome: Outcome, contest: Contest) -> Passed:
    floor = contest.rules.floor_over_chance * 5 / contest.result.num_answers
    low = outcome.ci95["hit_at_5"][0]
    return low > floor, (
        f"Hit@5 {100 * outcome.figures['hit_at_5']:.2f} %, interval from {100 * low:.2f} %; "
        f"floor {100 * floor:.2f} % = {contest.rules.floor_over_chance:g} x chance"
    )


def _beats_baseline(outcome: Outcome, contest: Contest) -> Passed:
    if contest.baseline is None:
        return True, "there is no baseline yet"
    baseline = contest.result.outcome(contest.baseline)
    why = "it was not replayed" if baseline is None else baseline.why_unscored or baseline.leak
    if why is not None:
        new = _new_start(outcome, contest.result)
        return False, f"no comparison with the baseline {contest.baseline}: {why}; {new}"
    return _beats(outcome, contest, contest.baseline)


def _new_start(outcome: Outcome, result: ShadowResult) -> str:
    """Return the command that gives the alias to a predictor that can be compared with here."""
    best = None if result.best_free is None else result.outcome(result.best_free)
    start = outcome if best is None or best.version is None else best
    named = f"version={start.version or '<version>'}"
    return (
        f'to start anew with {start.name}: `mlflow run . -e promote -P {named} -P reason="a new '
        'start" --env-manager local`, then shadow-eval again'
    )


def _beats(outcome: Outcome, contest: Contest, reference: str) -> Passed:
    comparison: Comparison | None = contest.result.comparison(outcome.name, reference)
    if comparison is None:
        return False, f"was not compared with {reference}"
    difference, p_holm, alpha = comparison.hit_at_5, comparison.p_holm, contest.rules.alpha
    passed = difference.low > 0 and p_holm <= alpha
    detail = f"Hit@5 {points(difference)} points against {reference}, p = {p_holm:.4f} (Holm)"
    if difference.low <= 0 <= difference.high and comparison.detectable > 0:
        detail += f"; less than {100 * comparison.detectable:.1f} points is not detectable here"
    reachable = comparison.num_contenders * smallest_p(difference.num_documents)
    if reachable > alpha:
        detail += (
            f"; {difference.num_documents} documents cannot give the best of "
            f"{comparison.num_contenders} contenders less than p = {min(1, reachable):.4f} (Holm)"
        )
    return passed, detail


def _no_lane_falls(outcome: Outcome, contest: Contest) -> Passed:
    """Fail if a lane has its whole paired interval, upper end included, below the allowed fall.

    Its p-value must be at most alpha after Holm over the judged lanes: of many lanes one falls by
    chance.
    """
    incumbent, rules = contest.incumbent, contest.rules
    if incumbent is None or incumbent == outcome.name:
        return True, "nothing to compare with"
    comparison = contest.result.comparison(outcome.name, incumbent)
    if comparison is None:
        return False, f"was not compared with {incumbent}"
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
        return False, f"falls against {incumbent} in {falls}"
    return True, f"none of {len(judged)} judged lanes (of {len(comparison.lanes)}) falls"


def _fast_enough(outcome: Outcome, contest: Contest) -> Passed:
    p95, limit = outcome.latency_ms.get("p95", math.nan), contest.rules.latency_p95_ms
    measured = "one query, its whole context read again, model only"
    return p95 <= limit, f"P95 {p95:.1f} ms ({measured}), limit {limit:g} ms"


def _not_withdrawn(outcome: Outcome, contest: Contest) -> Passed:
    if outcome.name not in contest.withdrawn:
        return True, "no rollback took the alias from it"
    return False, (
        f"a rollback took the alias from version {outcome.version}; only the entry point "
        "promote gives it back"
    )


# If one of these fails, the figures behind it mean nothing.
VALIDITY: dict[str, Gate] = {
    "same bank": _same_bank,
    "finite": _finite,
    "no leak": _no_leak,
    "enough queries": _enough_queries,
}
# What a candidate must show.
MERIT: dict[str, Gate] = {
    "beats best free": _beats_best_free,
    "above floor": _above_floor,
    "beats baseline": _beats_baseline,
    "no lane falls": _no_lane_falls,
    "fast enough": _fast_enough,
    "not withdrawn": _not_withdrawn,
}
