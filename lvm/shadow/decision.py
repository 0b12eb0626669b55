"""Promotion: which candidate of a shadow replay becomes the baseline, gate by gate."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lvm.evaluation.intervals import points
from lvm.models.facts import FREE, TRAINED
from lvm.shadow.comparison import Outcome, ShadowResult
from lvm.shadow.gates import Case, Check, run_gates
from lvm.system.thresholds import GateRules


@dataclass(frozen=True)
class Decision:
    """What a replay leads to.

    Attributes:
        promote: names that take the alias, in this order; empty when nothing changes.
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
        """Return the decision as JSON-able values."""
        return asdict(self)


def decide(
    result: ShadowResult,
    baseline_name: str | None,
    rules: GateRules,
    withdrawn: frozenset[str] = frozenset(),
) -> Decision:
    """Decide by the gates; pure, so that equal input gives an equal decision.

    `withdrawn` names the candidates that a rollback took the alias from.

    With a baseline, the best candidate that passes every gate takes the alias. Without one the best
    free predictor takes it first; a trained model may take it from there.
    """
    if baseline_name != result.baseline_name:
        return _moved(result, baseline_name)
    incumbent = baseline_name or result.best_free
    checks: list[Check] = []
    passing: list[Outcome] = []
    for outcome in result.outcomes:
        if outcome.name == baseline_name:
            continue
        is_withdrawn = outcome.name in withdrawn
        verdicts = run_gates(Case(outcome, result, baseline_name, incumbent, rules, is_withdrawn))
        checks += verdicts
        if all(check.passed for check in verdicts):
            passing.append(outcome)
    promote = _promotions(result, baseline_name, passing)
    winner = promote[-1] if promote else baseline_name
    reasons = _reasons(result, promote, checks)
    return Decision(tuple(promote), winner, baseline_name, tuple(reasons), tuple(checks))


def _moved(result: ShadowResult, baseline_name: str | None) -> Decision:
    """The alias moved while the replay ran: its comparisons are with the wrong predictor."""
    reason = (
        f"{_or_none(baseline_name)} stays baseline: the replay compared with "
        f"{_or_none(result.baseline_name)}, which is no longer the baseline; run shadow-eval again"
    )
    return Decision((), baseline_name, baseline_name, (reason,), ())


def _promotions(
    result: ShadowResult, baseline_name: str | None, passing: Sequence[Outcome]
) -> list[str]:
    """`passing` is in ranking order. Without a baseline, only the best free one opens the line."""
    if baseline_name is not None:
        return [passing[0].name] if passing else []
    first = [one.name for one in passing if one.name == result.best_free]
    trained = [one.name for one in passing if one.kind == TRAINED]
    return first + trained[:1]


def _reasons(result: ShadowResult, promote: Sequence[str], checks: Sequence[Check]) -> list[str]:
    """The outcome first, then every candidate that was left behind."""
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
