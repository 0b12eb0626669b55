"""Decide who takes the alias after a replay, gate by gate; equal input gives an equal decision.

Challengers are tested one after the other, in the order of their val figures, each at the whole
alpha, until the first that fails: the fixed-sequence procedure (docs/method/promotion.md). So the
family-wise error stays below alpha, and what ranks lower on val costs nobody anything.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
        checks: every gate of every candidate, in the order in which they were tested.
        verdicts: by candidate: promoted or not, and why.
        failed: the challenger whose failure ended the tests; None if all passed.
    """

    promote: tuple[str, ...]
    winner: str | None
    baseline: str | None
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    verdicts: dict[str, str] = field(default_factory=dict)
    failed: str | None = None

    @property
    def tested(self) -> frozenset[str]:
        """Return the names of those that were compared at alpha; others are only shown."""
        return frozenset(c.candidate for c in self.checks if c.gate == IN_TURN and c.passed)

    def report(self) -> dict[str, Any]:
        """Return the decision as JSON values."""
        return asdict(self)

    def verdicts_of(self, is_enabled: bool, failure: str | None) -> dict[str, str]:
        """Return the verdicts as they came about: in a dry run, or where a promotion failed."""
        failed = {} if failure is None else dict.fromkeys(self.promote, failure)
        found = self.verdicts | failed
        return {
            name: verdict if is_enabled else f"dry run: {verdict}"
            for name, verdict in found.items()
        }

    def not_carried_out(self, moved: Sequence[str], reason: str) -> str:
        """Return the line for a promotion that failed after the names `moved` took the alias."""
        holder = moved[-1] if moved else self.baseline or "none"
        missed = ", then ".join(self.promote[len(moved) :])
        return f"NOT CARRIED OUT: {missed} did not take the alias ({reason}); baseline is {holder}"


@dataclass(frozen=True)
class Past:
    """What earlier decisions leave for this one.

    Attributes:
        withdrawn: names of those that a rollback took the alias from.
        lost: by name, the run in which it lost to this baseline on these queries.
    """

    withdrawn: frozenset[str] = frozenset()
    lost: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What the gates read beside the candidate; `failed` is the challenger that ended the tests."""

    result: ShadowResult
    baseline: str | None
    rules: GateRules
    past: Past
    failed: str | None = None

    @property
    def incumbent(self) -> str | None:
        """Return what a candidate has to take the alias from."""
        return self.baseline or self.result.best_free

    def is_test(self, check: Check) -> bool:
        """Tell whether a check compared at alpha; a missing comparison is no test."""
        references = {TESTS[0]: self.result.best_free, TESTS[1]: self.baseline}
        reference = references.get(check.gate)
        return reference is not None and bool(self.result.comparison(check.candidate, reference))


Passed = tuple[bool, str]
Gate = Callable[[Outcome, Contest], Passed]


def decide(
    result: ShadowResult,
    baseline_name: str | None,
    rules: GateRules,
    past: Past | None = None,
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
    contest = Contest(result, baseline_name, rules, past or Past())
    checks: list[Check] = []
    for outcome in challengers(result):
        own = run_gates(outcome, contest)
        checks += own
        if any(contest.is_test(check) and not check.passed for check in own):
            contest = replace(contest, failed=outcome.name)
    failed = {check.candidate for check in checks if not check.passed}
    passing = [one for one in challengers(result) if one.name not in failed]
    promote = _promotions(contest, passing)
    verdicts = _verdicts(result, promote, checks)
    return Decision(
        promote=tuple(promote),
        winner=promote[-1] if promote else baseline_name,
        baseline=baseline_name,
        reasons=tuple(_reasons(baseline_name, promote, verdicts)),
        checks=tuple(checks),
        verdicts=verdicts,
        failed=contest.failed,
    )


def challengers(result: ShadowResult) -> list[Outcome]:
    """Return all but the baseline, from the best val figure down; those without one last.

    Nothing that the test queries say changes this order: equal val figures are ordered by name.
    """
    others = [one for one in result.outcomes if one.name != result.baseline_name]
    return sorted(others, key=lambda one: (*_descending(one.val_hit_at_5), one.name))


def _descending(value: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(value) else (False, -value)


def run_gates(outcome: Outcome, contest: Contest) -> list[Check]:
    """Run the gates in order, up to the first failure that makes the others meaningless."""
    decisive = {*VALIDITY, *TURN}
    if outcome.kind == FREE and contest.baseline is None:
        decisive.add("beats best free")
    checks = []
    for name, gate in (VALIDITY | TURN | MERIT).items():
        passed, detail = gate(outcome, contest)
        checks.append(Check(outcome.name, name, passed, detail))
        if name in decisive and not passed:
            break
    return checks


def _promotions(contest: Contest, passing: Sequence[Outcome]) -> list[str]:
    """Choose the one with the best served figure among those that pass."""
    places = [one.name for one in contest.result.outcomes]
    ranked = sorted(passing, key=lambda one: places.index(one.name))
    if contest.baseline is not None:
        return [one.name for one in ranked[:1]]
    first = [one.name for one in ranked if one.name == contest.result.best_free]
    trained = [one.name for one in ranked if one.kind == TRAINED]
    return first + trained[:1]


def _verdicts(
    result: ShadowResult, promote: Sequence[str], checks: Sequence[Check]
) -> dict[str, str]:
    """Return what became of each candidate, the promoted ones first."""
    verdicts = {}
    for incumbent, name in zip([result.baseline_name, *promote], promote, strict=False):
        verdicts[name] = f"promoted: {_promotion_reason(result, incumbent, name)}"
    for name in dict.fromkeys(check.candidate for check in checks):
        if name in promote:
            continue
        failed = [check for check in checks if check.candidate == name and not check.passed]
        why = failed[0].detail if failed else f"passed every gate, but {promote[-1]} ranks higher"
        also = ", ".join(check.gate for check in failed[1:])
        verdicts[name] = f"not promoted: {why}" + (f" (nor: {also})" if also else "")
    return verdicts


def _reasons(
    baseline: str | None, promote: Sequence[str], verdicts: Mapping[str, str]
) -> Iterator[str]:
    """Yield what became of the alias, then of each candidate."""
    if not promote:
        stays = "there is no baseline" if baseline is None else f"{baseline} stays baseline"
        yield f"{stays}: no candidate passed every gate"
    incumbent = baseline
    for name, verdict in verdicts.items():
        why = verdict.partition(": ")[2]
        if name not in promote:
            yield f"{name} is not promoted: {why}"
        elif incumbent is None:
            yield f"{name} becomes the first baseline, {why}"
        else:
            yield f"{name} takes the alias from {incumbent}: {why}"
        incumbent = name if name in promote else incumbent


def _promotion_reason(result: ShadowResult, incumbent: str | None, name: str) -> str:
    outcome = result.outcome(name)
    assert outcome is not None
    if incumbent is None:
        low, high = (100 * value for value in outcome.served_ci95["hit_at_5"])
        hit = 100 * outcome.served["hit_at_5"]
        what = "the best free predictor" if outcome.kind == FREE else "better than the free ones"
        return f"{what}: Hit@5 {hit:.1f} % [{low:.1f}, {high:.1f}]"
    comparison = result.comparison(name, incumbent)
    assert comparison is not None
    return _difference(comparison)


def _difference(comparison: Comparison) -> str:
    """Return the served difference with its p-value, then the plain one."""
    served, plain = comparison.hit_at_5, comparison.plain_hit_at_5
    return (
        f"Hit@5 {points(served)} points against {comparison.reference}, p = "
        f"{served.p_value:.4f} (plain {points(plain)})"
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
    found = [*outcome.figures.values(), *outcome.served.values()]
    if not outcome.is_scored or not all(map(math.isfinite, found)):
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
        if contest.baseline is not None:
            return True, "is a free predictor"
        if outcome.name == best:
            return True, "is the best free predictor"
        return False, f"{best} is the better free predictor"
    if best is None:
        return False, "no free predictor was replayed beside it"
    return _beats(outcome, contest, best)


def _above_floor(outcome: Outcome, contest: Contest) -> Passed:
    floor = contest.rules.floor_over_chance * 5 / contest.result.num_answers
    low = outcome.served_ci95["hit_at_5"][0]
    return low > floor, (
        f"Hit@5 {100 * outcome.served['hit_at_5']:.2f} %, interval from {100 * low:.2f} %; "
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
    difference, alpha = comparison.hit_at_5, contest.rules.alpha
    passed = difference.low > 0 and difference.p_value <= alpha
    detail = _difference(comparison)
    if difference.low <= 0 <= difference.high and comparison.detectable > 0:
        detail += f"; less than {100 * comparison.detectable:.1f} points is not detectable here"
    least = smallest_p(difference.num_documents)
    if least > alpha:
        detail += f"; {difference.num_documents} documents cannot give less than p = {least:.4f}"
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
    if outcome.name not in contest.past.withdrawn:
        return True, "no rollback took the alias from it"
    return False, (
        f"a rollback took the alias from version {outcome.version}; only the entry point "
        "promote gives it back"
    )


def _in_turn(outcome: Outcome, contest: Contest) -> Passed:
    name, past = outcome.name, contest.past
    if contest.baseline is None and outcome.kind == FREE:
        return True, "the best free predictor is the first baseline without a test"
    if name in past.lost:
        run = f"run {past.lost[name][:8]}"
        return False, f"not tested again: it lost to {contest.baseline} on these queries in {run}"
    if contest.failed is not None:
        return False, f"not tested: {contest.failed}, which comes before it by val, failed"
    if math.isnan(outcome.val_hit_at_5):
        return True, "has no val figure, so it comes last"
    return True, f"its turn by val Hit@5, {100 * outcome.val_hit_at_5:.1f} %"


IN_TURN = "in turn"
# If one of these fails, the figures behind it mean nothing.
VALIDITY: dict[str, Gate] = {
    "same bank": _same_bank,
    "finite": _finite,
    "no leak": _no_leak,
    "enough queries": _enough_queries,
}
# If one of these fails, the candidate is not tested, whatever its figures.
TURN: dict[str, Gate] = {
    "fast enough": _fast_enough,
    "not withdrawn": _not_withdrawn,
    IN_TURN: _in_turn,
}
# What a candidate must show.
MERIT: dict[str, Gate] = {
    "beats best free": _beats_best_free,
    "above floor": _above_floor,
    "beats baseline": _beats_baseline,
    "no lane falls": _no_lane_falls,
}
TESTS = ("beats best free", "beats baseline")  # at alpha: the first failure ends the sequence
