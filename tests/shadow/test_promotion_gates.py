"""Every gate in a case in which it fires, alone, on a replay that would promote without it."""

import dataclasses

import pytest

from lvm.shadow.comparison import Comparison, Outcome, ShadowResult
from lvm.shadow.promotion_gates import MERIT, TURN, VALIDITY, Decision, Past, decide
from lvm.system.settings import read_gate_rules
from tests.shadow_cases import (
    CLEAR_FALL,
    CLEAR_GAIN,
    NO_GAIN,
    TIE,
    compared,
    difference,
    outcome,
    shadow_result,
    unscored,
    winning_case,
)

RULES = read_gate_rules()


def with_model(result: ShadowResult, model: Outcome) -> ShadowResult:
    return dataclasses.replace(result, outcomes=(model, *result.outcomes[1:]))


def with_comparison(result: ShadowResult, changed: Comparison) -> ShadowResult:
    same = (changed.candidate, changed.reference)
    kept = [one for one in result.comparisons if (one.candidate, one.reference) != same]
    return dataclasses.replace(result, comparisons=(changed, *kept))


def failed_gates(decision: Decision, name: str = "model") -> list[str]:
    return [check.gate for check in decision.checks if check.candidate == name and not check.passed]


def assert_only_fails(result: ShadowResult, gate: str) -> Decision:
    """The model of `winning_case` must fail this gate only, so that it keeps the baseline."""
    decision = decide(result, "old", RULES)
    assert decision.promote == () and decision.winner == "old"
    assert failed_gates(decision) == [gate]
    assert decision.reasons[0].startswith("old stays baseline")
    assert any(reason.startswith("model is not promoted") for reason in decision.reasons)
    return decision


def test_a_genuine_improvement_is_promoted() -> None:
    decision = decide(winning_case(), "old", RULES)
    assert decision.promote == ("model",) and decision.winner == "model"
    assert decision.baseline == "old"
    assert "model takes the alias from old: Hit@5 +4.0 [+2.0, +6.0] points" in decision.reasons[0]
    passed = [check.gate for check in decision.checks if check.candidate == "model"]
    assert passed == [*VALIDITY, *TURN, *MERIT]


def test_same_bank_gate_fires() -> None:
    model = unscored("model", refusal="made from another bank (aaaa, this one is bbbb)")
    decision = assert_only_fails(with_model(winning_case(), model), "same bank")
    assert "another bank" in decision.reasons[1]


def test_finite_gate_fires_where_the_measurement_broke_off() -> None:
    model = unscored("model", failure="its process was killed by SIGKILL")
    decision = assert_only_fails(with_model(winning_case(), model), "finite")
    assert "killed by SIGKILL" in decision.reasons[1]


def test_finite_gate_fires() -> None:
    model = unscored("model", num_non_finite=3)
    decision = assert_only_fails(with_model(winning_case(), model), "finite")
    assert "3 of 2,000 predictions are not finite" in decision.reasons[1]


def test_finite_gate_fires_on_a_figure_that_is_nan() -> None:
    model = outcome("model", "trained", float("nan"))
    assert_only_fails(with_model(winning_case(), model), "finite")


def test_leak_gate_fires_on_leaky_windows() -> None:
    assert_only_fails(winning_case(leaky=True), "no leak")


def test_leak_gate_fires_on_a_candidate_that_saw_the_answers() -> None:
    model = outcome("model", "trained", 0.2, leak="17 of 2,000 answers were among its train rows")
    assert_only_fails(with_model(winning_case(), model), "no leak")


@pytest.mark.parametrize("few", [{"num_queries": 199}, {"num_documents": 7}])
def test_query_gate_fires(few: dict[str, int]) -> None:
    decision = assert_only_fails(winning_case(**few), "enough queries")
    assert "at least 200 from 8 are needed" in " ".join(decision.reasons)


def test_floor_gate_fires() -> None:
    chance = 5 / 39_000
    ci95 = {"hit_at_5": [4.9 * chance, 0.1]}
    model = outcome("model", "trained", 0.05, served_ci95=ci95, val_hit_at_5=0.2)
    assert_only_fails(with_model(winning_case(), model), "above floor")
    ci95["hit_at_5"][0] = 5.1 * chance
    assert decide(with_model(winning_case(), model), "old", RULES).promote == ("model",)


def test_best_free_gate_fires() -> None:
    result = with_comparison(winning_case(), compared("model", "ema", NO_GAIN))
    decision = assert_only_fails(result, "beats best free")
    assert "less than 1.5 points is not detectable here" in decision.reasons[1]


def test_best_free_gate_fires_without_a_free_predictor() -> None:
    full = winning_case()
    outcomes = tuple(one for one in full.outcomes if one.kind == "trained")
    result = dataclasses.replace(full, outcomes=outcomes, best_free=None)
    decision = assert_only_fails(result, "beats best free")
    assert "no free predictor was replayed" in decision.reasons[1]


def test_baseline_gate_fires() -> None:
    result = with_comparison(winning_case(), compared("model", "old", NO_GAIN))
    assert_only_fails(result, "beats baseline")


def test_a_tie_keeps_the_baseline() -> None:
    result = with_comparison(winning_case(), compared("model", "old", TIE))
    assert_only_fails(result, "beats baseline")


def test_an_interval_that_ends_at_zero_keeps_the_baseline() -> None:
    touching = difference(0.02, 0.0, 0.04)
    result = with_comparison(winning_case(), compared("model", "old", touching))
    assert_only_fails(result, "beats baseline")


def test_a_p_value_above_alpha_keeps_the_baseline() -> None:
    """Whatever the interval says: the two need not agree."""
    gain = dataclasses.replace(CLEAR_GAIN, p_value=0.051)
    result = with_comparison(winning_case(), compared("model", "old", gain))
    assert_only_fails(result, "beats baseline")


def test_a_comparison_that_is_not_a_number_keeps_the_baseline() -> None:
    nan = float("nan")
    broken = compared("model", "old", difference(nan, nan, nan, p=nan), law=CLEAR_GAIN)
    assert_only_fails(with_comparison(winning_case(), broken), "beats baseline")


def test_lane_gate_fires() -> None:
    fallen = compared("model", "old", CLEAR_GAIN, law=CLEAR_GAIN, art=CLEAR_FALL)
    decision = assert_only_fails(with_comparison(winning_case(), fallen), "no lane falls")
    assert "falls against old in art -4.0 [-6.0, -2.0] points" in decision.reasons[1]


def test_lane_gate_ignores_lanes_too_small_to_judge() -> None:
    few_documents = dataclasses.replace(CLEAR_FALL, num_documents=RULES.lane_min_documents - 1)
    small = compared("model", "old", CLEAR_GAIN, art=few_documents)
    assert decide(with_comparison(winning_case(), small), "old", RULES).promote == ("model",)


def test_lane_gate_ignores_a_fall_that_chance_explains_among_many_lanes() -> None:
    """Of ten judged lanes with p = 0.02 at the least, one falls by chance: Holm gives 0.2."""
    by_chance = dataclasses.replace(CLEAR_FALL, p_value=0.02)
    lanes = {f"lane{number}": NO_GAIN for number in range(9)}
    one = compared("model", "old", CLEAR_GAIN, art=by_chance, **lanes)
    assert decide(with_comparison(winning_case(), one), "old", RULES).promote == ("model",)
    alone = compared("model", "old", CLEAR_GAIN, art=by_chance)
    assert_only_fails(with_comparison(winning_case(), alone), "no lane falls")


def test_withdrawn_gate_fires() -> None:
    decision = decide(winning_case(), "old", RULES, Past(withdrawn=frozenset({"model"})))
    assert decision.promote == () and failed_gates(decision) == ["not withdrawn"]
    assert "only the entry point promote gives it back" in " ".join(decision.reasons)


def test_too_few_documents_for_the_level_are_told() -> None:
    few = dataclasses.replace(CLEAR_GAIN, num_documents=8, p_value=2 / 2**8)
    result = with_comparison(winning_case(), compared("model", "old", few))
    strict = dataclasses.replace(RULES, alpha=0.005)
    told = "8 documents cannot give less than p = 0.0078"
    decision = decide(result, "old", strict)
    assert decision.promote == () and failed_gates(decision) == ["beats baseline"]
    assert told in " ".join(decision.reasons)
    found = decide(result, "old", RULES)
    assert found.promote == ("model",) and "cannot give" not in str(found.checks)


def test_a_leaky_baseline_is_never_replaced() -> None:
    full = winning_case()
    seen = dataclasses.replace(full.outcomes[1], leak="trained on leaky windows (split=random)")
    outcomes = (full.outcomes[0], seen, *full.outcomes[2:])
    decision = decide(dataclasses.replace(full, outcomes=outcomes), "old", RULES)
    assert decision.promote == () and "beats baseline" in failed_gates(decision)
    assert "no comparison with the baseline old: trained on leaky windows" in str(decision.reasons)


def test_latency_gate_fires() -> None:
    slow = {"p50": 1.0, "p95": RULES.latency_p95_ms + 0.1}
    model = outcome("model", "trained", 0.2, latency_ms=slow)
    decision = assert_only_fails(with_model(winning_case(), model), "fast enough")
    assert "1000.1 ms (one query, its whole context read again" in decision.reasons[1]


def test_latency_gate_fires_where_nothing_was_measured() -> None:
    model = outcome("model", "trained", 0.2, latency_ms={})
    assert_only_fails(with_model(winning_case(), model), "fast enough")


def test_a_baseline_that_cannot_be_replayed_is_never_replaced() -> None:
    full = winning_case()
    lost = unscored("old", refusal="made from another bank (aaaa, this one is bbbb)")
    named = [dataclasses.replace(one, version=str(7 + n)) for n, one in enumerate(full.outcomes)]
    outcomes = (named[0], *named[2:], lost)
    kept = tuple(pair for pair in full.comparisons if "old" not in (pair.candidate, pair.reference))
    result = dataclasses.replace(full, outcomes=outcomes, comparisons=kept)
    decision = decide(result, "old", RULES)
    assert decision.promote == () and decision.winner == "old"
    reasons = " ".join(decision.reasons)
    assert "no comparison with the baseline old" in reasons
    best = result.outcome(str(result.best_free))
    assert best is not None and best.version is not None
    assert f"anew with {best.name}: `mlflow run . -e promote -P version={best.version}" in reasons


def test_a_baseline_missing_from_the_replay_is_never_replaced() -> None:
    full = winning_case()
    kept = tuple(pair for pair in full.comparisons if "old" not in (pair.candidate, pair.reference))
    outcomes = tuple(one for one in full.outcomes if one.name != "old")
    decision = decide(dataclasses.replace(full, outcomes=outcomes, comparisons=kept), "old", RULES)
    assert decision.promote == () and "it was not replayed" in " ".join(decision.reasons)


def test_an_alias_that_moved_during_the_replay_stops_everything() -> None:
    decision = decide(winning_case(), "newer", RULES)
    assert decision.promote == () and decision.winner == "newer"
    assert "run shadow-eval again" in decision.reasons[0]


def empty_registry(gain: Comparison) -> ShadowResult:
    outcomes = [
        outcome("model", "trained", 0.2),
        outcome("ema", "free", 0.16),
        outcome("copy-last", "free", 0.12),
    ]
    return shadow_result(outcomes, [gain], baseline_name=None)


def test_empty_registry_best_free_opens_the_line_and_a_model_takes_over() -> None:
    decision = decide(empty_registry(compared("model", "ema", CLEAR_GAIN)), None, RULES)
    assert decision.promote == ("ema", "model") and decision.winner == "model"
    assert "ema becomes the first baseline, the best free predictor" in decision.reasons[0]
    assert "model takes the alias from ema" in decision.reasons[1]
    assert failed_gates(decision, "copy-last")[0] == "beats best free"


def test_empty_registry_a_model_without_a_gain_leaves_the_best_free() -> None:
    decision = decide(empty_registry(compared("model", "ema", NO_GAIN)), None, RULES)
    assert decision.promote == ("ema",) and decision.winner == "ema"


def test_empty_registry_a_model_whose_lane_falls_leaves_the_best_free() -> None:
    fallen = compared("model", "ema", CLEAR_GAIN, art=CLEAR_FALL)
    decision = decide(empty_registry(fallen), None, RULES)
    assert decision.promote == ("ema",) and failed_gates(decision) == ["no lane falls"]


def test_empty_registry_stays_empty_on_noise() -> None:
    chance = 5 / 39_000
    noise = outcome("ema", "free", chance, ci95={"hit_at_5": [0.0, 3 * chance]})
    decision = decide(shadow_result([noise], [], None), None, RULES)
    assert decision.promote == () and decision.winner is None
    assert decision.reasons[0].startswith("there is no baseline")


def test_the_best_of_several_passing_candidates_wins() -> None:
    full = winning_case()
    second = outcome("second", "trained", 0.19)
    result = dataclasses.replace(
        full,
        outcomes=(full.outcomes[0], second, *full.outcomes[1:]),
        comparisons=(
            *full.comparisons,
            compared("second", "old", CLEAR_GAIN),
            compared("second", "ema", CLEAR_GAIN),
        ),
    )
    decision = decide(result, "old", RULES)
    assert decision.promote == ("model",)
    assert "passed every gate, but model ranks higher" in " ".join(decision.reasons)


def test_a_better_free_predictor_can_take_the_alias_back() -> None:
    outcomes = [outcome("ema", "free", 0.2), outcome("old", "trained", 0.15)]
    pairs = [compared("ema", "old", CLEAR_GAIN), compared("old", "ema", CLEAR_FALL)]
    assert decide(shadow_result(outcomes, pairs, "old"), "old", RULES).promote == ("ema",)


def test_deciding_is_pure() -> None:
    result = winning_case()
    before = repr(result)
    assert decide(result, "old", RULES) == decide(result, "old", RULES)
    assert repr(result) == before
