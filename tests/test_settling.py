"""Settlements on a real sqlite store: the alias as it is now decides, also between processes."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
from mlflow.tracking import MlflowClient

from lvm import registry
from lvm.rules import read_gate_rules
from lvm.settling import settle, tag_measured
from lvm.stopping import Stopped, stoppable
from tests.promotion_processes import settle_at_once
from tests.shadow_cases import (
    CLEAR_GAIN,
    NO_GAIN,
    compared,
    outcome,
    shadow_result,
    unscored,
    winning_case,
)
from tests.test_registry import facts, registered_store, three_versions

__all__ = ["facts", "registered_store", "three_versions"]  # fixtures
RULES = read_gate_rules()
VERSIONS = {"old": "1", "model": "2", "ema": "3", "copy-last": None}


def tags(version: str) -> dict[str, str]:
    return MlflowClient().get_model_version("lvm", version).tags


def settled(result, versions=VERSIONS, is_enabled=True, published=None):
    note = (published if published is not None else []).append
    return settle(result, versions, RULES, "run", note, is_enabled)


@pytest.fixture
def old_baseline(three_versions):
    registry.promote("1", None, {"reason": "first"})


def test_a_genuine_improvement_takes_the_alias_with_its_evidence(old_baseline):
    published = []
    decision = settled(winning_case(), published=published)
    assert published == [decision] and decision.promote == ("model",)
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    found = tags("2")
    assert found["shadow_hit_at_5"] == "0.2000 [0.1800, 0.2200]"
    assert found["decision_run"] == "run" and found["replaced_version"] == "1"
    moves = registry.history()
    assert [(move["version"], move["replaced"]) for move in moves] == [("1", "none"), ("2", "1")]
    assert moves[1]["run"] == "run" and "model takes the alias from old" in moves[1]["reason"]
    assert found["move/000002"] and "move/000001" not in found


def test_a_tie_keeps_the_alias(old_baseline):
    pairs = (compared("model", "old", NO_GAIN), *winning_case().comparisons[1:])
    decision = settled(winning_case(comparisons=pairs))
    assert decision.promote == () and registry.aliases() == {"baseline": "1"}


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
        settle(winning_case(), VERSIONS, RULES, "run", fail, True)
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
    tag_measured(result, VERSIONS, "run 9")
    assert {tags(version)["decision_run"] for version in "123"} == {"run 9"}
    assert tags("1")["shadow_hit_at_5"] == "none" and "SIGKILL" in tags("1")["shadow_note"]
    assert tags("2")["shadow_place"] == "1 of 3" and tags("2")["shadow_note"] == "none"
    assert tags("3")["shadow_corrected_hit_at_5"].startswith("0.1920")
    assert "among its train rows" in tags("3")["shadow_note"]


def test_a_stop_signal_waits_for_the_end_of_a_move(old_baseline, monkeypatch):
    client = MlflowClient
    set_alias = client.set_registered_model_alias

    def stopped_between(self, name, alias, version):
        set_alias(self, name, alias, version)
        if alias == "previous":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(client, "set_registered_model_alias", stopped_between)
    with pytest.raises(Stopped), stoppable():
        registry.promote("2", "1", {})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    assert len(registry.history()) == 2


def test_a_move_that_fails_puts_the_first_alias_back(old_baseline, monkeypatch):
    set_alias = MlflowClient.set_registered_model_alias

    def fails_at_the_second(self, name, alias, version):
        if alias == "baseline":
            raise OSError("database is locked")
        set_alias(self, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fails_at_the_second)
        with pytest.raises(OSError, match="locked"):
            registry.promote("2", "1", {})
    assert registry.aliases() == {"baseline": "1"} and len(registry.history()) == 1
    registry.promote("2", "1", {})
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", fails_at_the_second)
        with pytest.raises(OSError, match="locked"):
            registry.promote("3", "2", {})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}


def test_two_settlements_at_once_end_in_one_state_with_nothing_lost(old_baseline):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    uri = os.environ["MLFLOW_TRACKING_URI"]
    rivals = (("first", "2"), ("second", "3"))
    workers = [
        context.Process(target=settle_at_once, args=(*rival, uri, barrier, results))
        for rival in rivals
    ]
    for worker in workers:
        worker.start()
    found = sorted((results.get(timeout=120) for _ in workers), key=lambda one: len(one[1]))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    (lost, kept, still, reason), (won, promoted, _, _) = found
    assert len(promoted) == 1 and kept == () and still == f"version {won}"
    assert "run shadow-eval again" in reason
    assert registry.aliases() == {"baseline": won, "previous": "1"}
    assert [move["version"] for move in registry.history()] == ["1", won]
    assert "reason" in tags(won) and "reason" not in tags(lost)
