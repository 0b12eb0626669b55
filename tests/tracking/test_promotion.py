"""Promotions on a real sqlite store: the current alias decides, also between processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lvm.system.processes import Stopped, stoppable
from lvm.system.settings import read_gate_rules
from lvm.tracking.candidates import Field, promote_winner, replayed_name, tag_measured
from lvm.tracking.registry import BY_HAND, Registry
from tests.shadow_cases import (
    CLEAR_GAIN,
    NO_GAIN,
    compared,
    outcome,
    shadow_result,
    unscored,
    winning_case,
)
from tests.tracking.test_versions import facts, registered_store, three_versions

registry = Registry()

pytestmark = pytest.mark.slow

__all__ = ["facts", "registered_store", "three_versions"]  # fixtures
ROOT = Path(__file__).parents[2]
RULES = read_gate_rules()
VERSIONS = {"old": "1", "model": "2", "ema": "3", "copy-last": None}


def test_a_version_is_named_as_it_was_replayed():
    """A replay and its settlement name the baseline by one rule: else nothing is ever promoted."""
    assert replayed_name("2", VERSIONS) == "model" and replayed_name(None, VERSIONS) is None
    assert replayed_name("9", VERSIONS) == "version 9"
    found = Field(None, None, None, (), "9")
    assert found.baseline_name == replayed_name("9", found.versions) == "version 9"


def tags(version: str) -> dict[str, str]:
    return MlflowClient().get_model_version("lvm", version).tags


def settled(result, versions=VERSIONS, is_enabled=True, published=None, failures=None):
    note = (published if published is not None else []).append

    def tell_failure(*told):
        if failures is not None:
            failures.append(told)

    return promote_winner(
        registry, result, versions, RULES, "run", note, tell_failure if is_enabled else None
    )


@pytest.fixture
def old_baseline(three_versions):
    registry.promote("1", None, {"reason": "first"})


def test_a_genuine_improvement_takes_the_alias_with_its_evidence(old_baseline):
    published = []
    decision = settled(winning_case(), published=published)
    assert published == [decision] and decision.promote == ("model",)
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    found = tags("2")
    assert found["decision_hit_at_5"] == "0.2 [0.18, 0.22]"
    assert found["decision_run"] == "run" and found["replaced_version"] == "1"
    assert found["decision_source"] == "the frozen test split"
    moves = registry.history()
    assert [(move["version"], move["replaced"]) for move in moves] == [("1", "none"), ("2", "1")]
    assert moves[1]["run"] == "run" and "model takes the alias from old" in moves[1]["reason"]
    assert sum(key.startswith("move/") for key in found) == 1


def test_a_tie_keeps_the_alias(old_baseline):
    pairs = (compared("model", "old", NO_GAIN), *winning_case().comparisons[1:])
    decision = settled(winning_case(comparisons=pairs))
    assert decision.promote == () and registry.aliases() == {"baseline": "1"}


def test_a_loss_is_recorded_so_that_it_stops_no_later_challenger(old_baseline):
    """Against this baseline on these queries; a dry run records nothing."""
    pairs = (compared("model", "old", NO_GAIN), *winning_case().comparisons[1:])
    lost = winning_case(comparisons=pairs)
    assert settled(lost, is_enabled=False).failed == "model"
    assert settled(lost).failed == "model" and "lost/1/aaaaaaaaaaaaaaaa" in tags("2")
    again = settled(lost)
    assert "it lost to old on these queries in run" in again.verdicts["model"]
    assert again.failed == "ema", "whose turn it is now"
    others = settled(winning_case(comparisons=pairs, queries_sha256="b" * 64))
    assert others.failed == "model"


def test_a_dry_run_publishes_and_changes_nothing(old_baseline):
    published = []
    decision = settled(winning_case(), is_enabled=False, published=published)
    assert decision.promote == ("model",) and published == [decision]
    assert registry.aliases() == {"baseline": "1"} and len(registry.history()) == 1


def test_a_moved_alias_is_kept_with_the_reason(old_baseline):
    registry.promote("3", "1", {})
    decision = settled(winning_case())
    assert decision.promote == () and decision.winner == "ema"
    assert "which is no longer the baseline; run shadow-eval again" in decision.reasons[0]
    assert registry.aliases() == {"baseline": "3", "previous": "1"}
    unknown = settled(winning_case(), {**VERSIONS, "ema": None})
    assert unknown.winner == "version 3"


def test_a_report_that_fails_leaves_the_alias(old_baseline):
    def fail(decision):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        promote_winner(registry, winning_case(), VERSIONS, RULES, "run", fail, lambda *told: None)
    assert registry.aliases() == {"baseline": "1"} and len(registry.history()) == 1


def test_two_steps_of_one_settlement_leave_the_right_previous(three_versions):
    outcomes = [outcome("model", "trained", 0.2), outcome("ema", "free", 0.16)]
    result = shadow_result(outcomes, [compared("model", "ema", CLEAR_GAIN)], None)
    decision = settled(result)
    assert decision.promote == ("ema", "model")
    assert registry.aliases() == {"baseline": "2", "previous": "3"}
    assert [move["replaced"] for move in registry.history()] == ["none", "3"]
    assert registry.rollback() == ("3", "2")
    assert registry.history()[-1]["reason"] == "rolled back"


def test_every_measured_version_is_tagged(three_versions):
    broken = unscored("old", version="1", failure="its process was killed by SIGKILL")
    full = winning_case()
    seen = dataclasses.replace(full.outcomes[2], leak="3 answers were among its train rows")
    result = dataclasses.replace(full, outcomes=(full.outcomes[0], seen, broken))
    tag_measured(
        registry, result, VERSIONS, "run 9", {"model": "promoted: by far", "ema": "not promoted"}
    )
    assert {tags(version)["shadow_run"] for version in "23"} == {"run 9"}
    assert "SIGKILL" in tags("1")["shadow_unscored"] and "shadow_hit_at_5" not in tags("1")
    assert tags("2")["shadow_place"] == "1 of 3" and tags("2")["shadow_note"] == "none"
    assert tags("2")["shadow_verdict"] == "promoted: by far"
    page = MlflowClient().get_model_version("lvm", "3").description
    assert "place 2 of 3 on 2000 queries" in page and page.endswith("; not promoted")
    assert tags("3")["shadow_corrected_hit_at_5"].startswith("0.192 [")
    assert "among its train rows" in tags("3")["shadow_note"]


def test_later_measurements_leave_the_evidence_of_a_promotion(old_baseline):
    settled(winning_case())
    before = {key: text for key, text in tags("2").items() if key.startswith("decision_")}
    tag_measured(registry, winning_case(), VERSIONS, "frozen", {})
    weaker = dataclasses.replace(winning_case().outcomes[0], figures=dict(HALF), ci95=HALF_CI95)
    logged = winning_case(outcomes=(weaker,), is_log=True, source="the log asked.jsonl")
    tag_measured(registry, logged, VERSIONS, "log run", {})
    lost = winning_case(outcomes=(unscored("model", version="2", failure="killed"),))
    tag_measured(registry, lost, VERSIONS, "later", {})
    found = tags("2")
    assert {key: text for key, text in found.items() if key.startswith("decision_")} == before
    assert before["decision_run"] == "run"
    assert (found["shadow_run"], found["log_run"]) == ("frozen", "log run")
    assert found["shadow_hit_at_5"].startswith("0.2 [") and "killed" in found["shadow_unscored"]
    assert found["log_hit_at_5"].startswith("0.1 [") and "asked.jsonl" in found["log_source"]


def test_a_move_by_hand_takes_the_figures_of_an_earlier_decision_away(old_baseline):
    settled(winning_case())
    registry.promote("1", "2", {"reason": "by hand: a test"}, BY_HAND)
    assert tags("2")["decision_hit_at_5"], "what it once took the alias by"
    evidence = {"decision_run": "hand", "replaced_version": "1", "reason": "by hand: it is better"}
    registry.promote("2", "1", evidence, BY_HAND)
    assert {key for key in tags("2") if key.startswith("decision_")} == {"decision_run"}
    page = MlflowClient().get_model_version("lvm", "2").description
    assert "Took the alias by [run hand](#/runs/hand): by hand: it is better" in page
    assert "the decision that gave it the alias" not in page
    registry.promote("3", "2", {"reason": "by hand: another test"}, BY_HAND)
    registry.rollback({"decision_run": "back"})
    assert tags("2")["decision_run"] == "hand"


HALF = winning_case().outcomes[0].figures | {"hit_at_5": 0.1}
HALF_CI95 = {key: [0.05, 0.15] for key in HALF}


def test_a_version_that_cannot_be_read_is_not_promoted_nor_reported(old_baseline):
    weights = files_of("2") / "artifacts" / "model.safetensors"
    whole, published = weights.read_bytes(), []
    weights.write_bytes(b"damaged")
    try:
        with pytest.raises(ValueError, match="models:/lvm/2 cannot be read"):
            settled(winning_case(), published=published)
    finally:  # the tests of this file share it
        weights.write_bytes(whole)
    assert published == [] and registry.aliases() == {"baseline": "1"}


def files_of(version: str) -> Path:
    found = MlflowClient().get_model_version("lvm", version)
    model_id = found.source.removeprefix("models:/")
    return Path(MlflowClient().get_logged_model(model_id).artifact_location)


def test_a_promotion_that_breaks_off_is_told_as_far_as_it_came(three_versions, monkeypatch):
    set_alias = MlflowClient.set_registered_model_alias

    def fails_at_the_model(self, name, alias, version):
        if (alias, version) == ("baseline", "2"):
            raise OSError("database is locked")
        set_alias(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", fails_at_the_model)
    outcomes = [outcome("model", "trained", 0.2), outcome("ema", "free", 0.16)]
    result = shadow_result(outcomes, [compared("model", "ema", CLEAR_GAIN)], None)
    published, failures = [], []
    with pytest.raises(OSError, match="locked"):
        settled(result, published=published, failures=failures)
    assert failures == [(published[0], ("ema",), "database is locked")]
    assert registry.aliases() == {"baseline": "3"} and len(registry.history()) == 1


def test_a_stop_signal_after_the_report_waits_for_the_move(old_baseline):
    def stop(decision):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), stoppable():
        promote_winner(registry, winning_case(), VERSIONS, RULES, "run", stop, lambda *told: None)
    assert registry.aliases() == {"baseline": "2", "previous": "1"}


def test_what_was_rolled_back_is_promoted_by_hand_only(old_baseline):
    assert settled(winning_case()).promote == ("model",)
    registry.rollback()
    again = settled(winning_case())
    assert again.promote == () and registry.aliases()["baseline"] == "1"
    assert "a rollback took the alias from version" in " ".join(again.reasons)
    registry.promote("2", "1", {"reason": "by hand"}, BY_HAND)
    registry.promote("1", "2", {"reason": "by hand"}, BY_HAND)
    assert settled(winning_case()).promote == ("model",)


def test_two_settlements_at_once_end_in_one_state_with_nothing_lost(old_baseline):
    rivals = ["tests.tracking.rival_settlements", "first", "2", "second", "3"]
    settled = subprocess.run([sys.executable, "-m", *rivals], cwd=ROOT, capture_output=True)
    assert settled.returncode == 0, settled.stderr
    found = sorted(json.loads(settled.stdout), key=lambda one: len(one[1]))
    (lost, kept, still, reason), (won, promoted, _, _) = found
    assert len(promoted) == 1 and kept == [] and still == f"version {won}"
    assert "run shadow-eval again" in reason
    assert registry.aliases() == {"baseline": won, "previous": "1"}
    assert [move["version"] for move in registry.history()] == ["1", won]
    assert "reason" in tags(won) and "reason" not in tags(lost)
