"""Moves of the alias on a real sqlite store: whole or undone, each in the history."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lvm.system.processes import Stopped, stoppable
from lvm.tracking.registry import BY_HAND, Registry
from tests.tracking.test_versions import facts, registered_store, three_versions

registry = Registry()

pytestmark = pytest.mark.slow

__all__ = ["facts", "registered_store", "three_versions"]  # fixtures
ROOT = Path(__file__).parents[2]


@pytest.fixture
def old_baseline(three_versions):
    registry.promote("1", None, {"reason": "first"})


def test_promotion_moves_both_aliases_and_keeps_the_evidence(three_versions):
    registry.promote("1", None, {"reason": "first"})
    assert registry.aliases() == {"baseline": "1"}
    registry.promote("3", "1", {"reason": "better", "decision_run": "abc"})
    assert registry.aliases() == {"baseline": "3", "previous": "1"}
    tags = MlflowClient().get_model_version("lvm", "3").tags
    assert (tags["reason"], tags["decision_run"]) == ("better", "abc")


def test_promotion_stops_where_the_alias_moved_since_the_decision(three_versions):
    registry.promote("1", None, {})
    registry.promote("2", "1", {})
    with pytest.raises(ValueError, match="baseline moved from 1 to 2"):
        registry.promote("3", "1", {"reason": "late"})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    assert "reason" not in MlflowClient().get_model_version("lvm", "3").tags


@pytest.mark.parametrize(
    ("version", "reason"), [("9", "no version '9'"), ("1", "1 is the baseline already")]
)
def test_promotion_of_a_wrong_version_changes_nothing(three_versions, version, reason):
    registry.promote("1", None, {})
    with pytest.raises(ValueError, match=reason):
        registry.promote(version, "1", {})
    assert registry.aliases() == {"baseline": "1"}


def test_a_version_is_the_one_that_mlflow_reads(old_baseline):
    registry.promote("02", "1", {"reason": "better"})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    assert [move["version"] for move in registry.history()] == ["1", "2"]
    with pytest.raises(ValueError, match="2 is the baseline already"):
        registry.promote("02", "2", {})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}


def test_rollback_restores_the_previous_baseline(three_versions):
    registry.promote("1", None, {})
    with pytest.raises(ValueError, match="no previous baseline"):
        registry.rollback()
    registry.promote("2", "1", {})
    assert registry.rollback() == ("1", "2")
    assert registry.aliases() == {"baseline": "1", "previous": "2"}
    assert registry.rollback() == ("2", "1")


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
    assert "reason" not in MlflowClient().get_model_version("lvm", "3").tags


def test_a_move_whose_answer_is_lost_has_taken_place(old_baseline, monkeypatch):
    set_alias = MlflowClient.set_registered_model_alias
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lost_at("baseline", set_alias))
    registry.promote("2", "1", {"reason": "better"})
    assert registry.aliases() == {"baseline": "2", "previous": "1"}
    assert registry.history()[-1]["reason"] == "better"
    assert MlflowClient().get_model_version("lvm", "2").tags["reason"] == "better"


def test_a_move_whose_answer_and_record_are_lost_stands(old_baseline, monkeypatch):
    set_alias = MlflowClient.set_registered_model_alias

    def locked(*words):
        raise OSError("database is locked")

    with monkeypatch.context() as patch:
        lost = lost_at("baseline", set_alias)
        patch.setattr(MlflowClient, "set_registered_model_alias", lost)
        patch.setattr(MlflowClient, "set_model_version_tag", locked)
        registry.promote("2", "1", {})
    assert registry.aliases()["baseline"] == "2" and len(registry.history()) == 1
    registry.repair()
    assert len(registry.history()) == 2


def lost_at(which, set_alias):
    """Return a client's method that sets every alias, and answers for all but one."""

    def lost(self, name, alias, version):
        set_alias(self, name, alias, version)
        if alias == which:
            raise OSError("Max retries exceeded")

    return lost


def test_a_move_whose_record_fails_stands_and_is_recorded_by_the_next(
    old_baseline, monkeypatch, capsys
):
    def locked(*words):
        raise OSError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", locked)
        registry.promote("2", "1", {"reason": "better"})
    assert "version 2 is the baseline; its history follows" in capsys.readouterr().out
    assert registry.aliases()["baseline"] == "2" and len(registry.history()) == 1
    registry.promote("3", "2", {})
    assert [move["version"] for move in registry.history()] == ["1", "2", "3"]
    assert MlflowClient().get_model_version("lvm", "2").tags["reason"] == "better"


def cut_off(after: str, version: str, expected: str) -> None:
    words = ["tests.tracking.broken_move", after, version, expected]
    assert subprocess.run([sys.executable, "-m", *words], cwd=ROOT).returncode == 9


def test_a_move_that_is_killed_between_its_steps_is_undone_or_finished(old_baseline):
    registry.promote("2", "1", {"reason": "second"})
    cut_off("previous", "3", "2")
    assert registry.aliases() == {"baseline": "2", "previous": "2"}
    assert registry.rollback() == ("1", "2")
    assert [move["version"] for move in registry.history()] == ["1", "2", "1"]
    cut_off("baseline", "3", "1")
    assert registry.aliases() == {"baseline": "3", "previous": "1"}
    assert registry.rollback() == ("1", "3")
    moves = registry.history()
    assert [move["version"] for move in moves] == ["1", "2", "1", "3", "1"]
    assert moves[3]["reason"] == "cut off"


def test_a_cut_off_move_whose_previous_was_deleted_hinders_no_later_one(old_baseline):
    registry.promote("2", "1", {})
    cut_off("previous", "3", "2")
    MlflowClient().delete_model_version("lvm", "1")
    registry.repair()
    assert registry.aliases() == {"baseline": "2"}
    registry.promote("3", "2", {})
    assert registry.aliases() == {"baseline": "3", "previous": "2"}


def test_rollback_refuses_where_previous_is_the_baseline_itself(old_baseline):
    registry.promote("2", "1", {})
    MlflowClient().set_registered_model_alias("lvm", "previous", "2")
    with pytest.raises(ValueError, match="both version 2; the history says it replaced version 1"):
        registry.rollback()
    assert len(registry.history()) == 2


def test_a_move_that_another_overtakes_is_told(old_baseline, monkeypatch):
    set_alias = MlflowClient.set_registered_model_alias

    def overtaken(self, name, alias, version):
        set_alias(self, name, alias, version)
        if alias == "baseline":
            set_alias(self, name, alias, "3")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overtaken)
    with pytest.raises(ValueError, match="another user set baseline to version 3"):
        registry.promote("2", "1", {})
    assert registry.aliases()["baseline"] == "3" and len(registry.history()) == 1


def test_a_hand_lifts_what_a_rollback_withdrew(old_baseline):
    registry.promote("2", "1", {})
    assert registry.withdrawn() == set()
    registry.rollback()
    assert registry.withdrawn() == {"2"}
    registry.promote("3", "1", {})
    assert registry.withdrawn() == {"2"}
    registry.promote("2", "3", {}, BY_HAND)
    assert registry.withdrawn() == set()
