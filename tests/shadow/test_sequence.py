"""The sequence of tests: who is tested, who is only shown, and how often a wrong one wins."""

import dataclasses

import numpy as np
import pytest

from benchmarks.contests import (
    WORSE,
    draw_contests,
    passed_by_holm,
    passed_in_sequence,
)
from lvm.shadow.comparison import ShadowResult
from lvm.shadow.promotion_gates import Decision, Past, challengers, decide
from lvm.system.settings import read_gate_rules
from tests.shadow_cases import (
    CLEAR_FALL,
    CLEAR_GAIN,
    NO_GAIN,
    compared,
    difference,
    outcome,
    shadow_result,
    unscored,
)

RULES = read_gate_rules()
CONTESTS = 2000


def contest(changes: dict[str, object], **vals: float) -> ShadowResult:
    """Return a replay against the baseline `ema`, free, of challengers with these changes."""
    outcomes = [outcome("ema", "free", 0.16)]
    outcomes += [outcome(name, "trained", vals.get(name, 0.2)) for name in changes]
    pairs = [compared(name, "ema", change) for name, change in changes.items()]
    return shadow_result(outcomes, pairs, "ema")


def verdict(decision: Decision, name: str) -> str:
    return decision.verdicts[name]


def test_a_toy_version_beside_a_better_one_costs_it_nothing() -> None:
    """On a user's own text p was 0.032 alone, and by Holm 0.064 beside an earlier toy version."""
    better, toy = difference(0.012, 0.001, 0.023, p=0.032), difference(-0.05, -0.07, -0.03)
    alone = decide(contest({"model": better}), "ema", RULES)
    beside = decide(contest({"toy": toy, "model": better}, toy=0.09), "ema", RULES)
    assert alone.promote == beside.promote == ("model",)
    assert verdict(alone, "model") == verdict(beside, "model")
    assert "p = 0.0320" in verdict(beside, "model") and beside.failed == "toy"
    assert [check for check in beside.checks if check.candidate == "model"] == list(alone.checks)


def test_a_free_predictor_with_the_better_served_figure_keeps_the_alias() -> None:
    """On a user's own vectors: plain 27.3 against 27.2 %, as served 28.8 against 31.3 %."""
    model = outcome("model", "trained", 0.273, served={"hit_at_5": 0.288})
    ridge = outcome("ridge", "free", 0.272, served={"hit_at_5": 0.313})
    plain, served = difference(0.001, 0.0002, 0.002), difference(-0.025, -0.04, -0.01)
    pair = compared("model", "ridge", served, plain=plain)
    for baseline in ("ridge", None):
        result = shadow_result([ridge, model], [pair], baseline)
        decision = decide(result, baseline, RULES)
        assert decision.winner == "ridge" and "model" not in decision.promote
        assert "-2.5 [-4.0, -1.0] points against ridge" in verdict(decision, "model")
        assert "(plain +0.1 [+0.0, +0.2])" in verdict(decision, "model")


def test_challengers_are_tested_by_val_until_the_first_that_fails() -> None:
    found = contest(
        {"third": CLEAR_GAIN, "first": CLEAR_GAIN, "second": NO_GAIN}, first=0.3, second=0.25
    )
    assert [one.name for one in challengers(found)] == ["first", "second", "third"]
    decision = decide(found, "ema", RULES)
    assert decision.promote == ("first",) and decision.failed == "second"
    assert decision.tested == {"first", "second"}
    told = "not promoted: not tested: second, which comes before it by val, failed"
    assert verdict(decision, "third") == told
    assert verdict(decision, "second").startswith("not promoted: Hit@5 +1.0 [-1.0, +3.0] points")


def test_the_order_is_that_of_val_whatever_the_test_queries_say() -> None:
    found = contest({"a": CLEAR_GAIN, "b": CLEAR_GAIN, "c": NO_GAIN}, a=0.2, b=0.3, c=0.1)
    turned = [
        dataclasses.replace(one, served={"hit_at_5": 1 - one.served["hit_at_5"]})
        for one in reversed(found.outcomes)
    ]
    again = dataclasses.replace(found, outcomes=tuple(turned))
    assert [one.name for one in challengers(found)] == [one.name for one in challengers(again)]


def test_a_version_without_a_val_figure_comes_last() -> None:
    found = contest({"old": CLEAR_GAIN, "weak": CLEAR_GAIN}, weak=0.01)
    outcomes = [
        dataclasses.replace(one, val_hit_at_5=float("nan")) if one.name == "old" else one
        for one in found.outcomes
    ]
    found = dataclasses.replace(found, outcomes=tuple(outcomes))
    assert [one.name for one in challengers(found)] == ["weak", "old"]
    decision = decide(found, "ema", RULES)
    (turn,) = (one for one in decision.checks if (one.candidate, one.gate) == ("old", "in turn"))
    assert turn.passed and turn.detail == "has no val figure, so it comes last"


@pytest.mark.parametrize(
    "hindrance",
    [{"leak": "it saw 17 answers"}, {"latency_ms": {"p95": 5000.0}}, {"withdrawn": True}],
)
def test_what_cannot_be_promoted_is_not_tested_and_stops_nobody(hindrance) -> None:
    found = contest({"broken": NO_GAIN, "model": CLEAR_GAIN}, broken=0.9)
    past = Past(withdrawn=frozenset({"broken"} if hindrance.pop("withdrawn", False) else ()))
    outcomes = [
        dataclasses.replace(one, **hindrance) if one.name == "broken" else one
        for one in found.outcomes
    ]
    lost = unscored("lost", failure="its process was killed by SIGKILL")
    decision = decide(dataclasses.replace(found, outcomes=(*outcomes, lost)), "ema", RULES, past)
    assert decision.promote == ("model",) and decision.tested == {"model"}
    assert decision.failed is None


def test_what_lost_to_this_baseline_before_stops_nobody() -> None:
    found = contest({"loser": NO_GAIN, "model": CLEAR_GAIN}, loser=0.9)
    assert decide(found, "ema", RULES).promote == ()
    decision = decide(found, "ema", RULES, Past(lost={"loser": "0123456789abcdef"}))
    assert decision.promote == ("model",) and decision.tested == {"model"}
    told = "not tested again: it lost to ema on these queries in run 01234567"
    assert verdict(decision, "loser") == f"not promoted: {told}"


def test_a_fallen_lane_keeps_the_alias_without_ending_the_tests() -> None:
    """The gain itself was shown, so that the next test is in its right."""
    found = contest({"fallen": CLEAR_GAIN, "model": CLEAR_GAIN}, fallen=0.9)
    pairs = [compared("fallen", "ema", CLEAR_GAIN, art=CLEAR_FALL), *found.comparisons[1:]]
    decision = decide(dataclasses.replace(found, comparisons=tuple(pairs)), "ema", RULES)
    assert decision.promote == ("model",) and decision.failed is None
    assert "falls against ema in art" in verdict(decision, "fallen")


def test_every_free_predictor_is_a_challenger_of_a_trained_baseline() -> None:
    """Only the best one by the test queries would be a choice among several that none pays for."""
    outcomes = [outcome("old", "trained", 0.1)]
    outcomes += [outcome("ridge", "free", 0.2, val_hit_at_5=0.1), outcome("ema", "free", 0.15)]
    pairs = [compared("ridge", "old", CLEAR_GAIN), compared("ema", "old", NO_GAIN)]
    decision = decide(shadow_result(outcomes, pairs, "old"), "old", RULES)
    assert decision.promote == () and decision.failed == "ema"
    assert verdict(decision, "ridge").startswith("not promoted: not tested: ema")


def test_a_dry_run_and_a_failed_move_are_told_in_the_verdicts() -> None:
    decision = decide(contest({"model": CLEAR_GAIN}), "ema", RULES)
    assert decision.verdicts_of(True, None) == decision.verdicts
    (told,) = decision.verdicts_of(False, None).values()
    assert told.startswith("dry run: promoted: Hit@5 +4.0 [+2.0, +6.0] points against ema")
    assert decision.verdicts_of(True, "NOT CARRIED OUT")["model"] == "NOT CARRIED OUT"


def test_a_wrong_challenger_wins_no_more_often_than_alpha() -> None:
    """Contests of 2 to 12 challengers, in a third of which nobody is better than the baseline."""
    random = np.random.default_rng(0)

    def gains(size: int) -> np.ndarray:
        return 3.0 * (random.random(size) < random.choice([0.0, 0.3, 0.7]))

    drawn = list(draw_contests(random, CONTESTS, gains))
    wrong = np.array([(passed_in_sequence(one) & (one.gain_C <= 0)).any() for one in drawn])
    nobody = np.array([not one.gain_C.any() for one in drawn])
    assert 0.005 < wrong.mean() <= RULES.alpha
    assert nobody.sum() > CONTESTS / 3 and 0.005 < wrong[nobody].mean() <= RULES.alpha


def test_weak_bystanders_change_no_verdict() -> None:
    """Nor a power, which Holm takes: the added ones rank below on val."""
    random, lost = np.random.default_rng(1), 0

    def with_bystanders(size: int) -> np.ndarray:
        return np.append(3.0 * (random.random(size) < 0.4), np.full(6, WORSE))

    for drawn in draw_contests(random, 300, with_bystanders):
        num = len(drawn.gain_C) - 6
        own = drawn.first(num)
        weak_C = np.minimum(drawn.val_C[num:], own.val_C.min() - 1e-6)
        beside = dataclasses.replace(drawn, val_C=np.append(own.val_C, weak_C))
        assert passed_in_sequence(beside)[:num].tolist() == passed_in_sequence(own).tolist()
        lost += passed_by_holm(beside)[:num].sum() < passed_by_holm(own).sum()
    assert lost > 10, "Holm's verdicts depend on bystanders in these very contests"
