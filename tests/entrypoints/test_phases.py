"""The trainings of the phase table: what the table decides, what one is told by."""

from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from entrypoints.options import TrainOptions
from entrypoints.train import with_phase
from lvm.bank.bank import Bank
from lvm.evaluation.metrics import hit_at, smallest_detectable
from lvm.models.baselines import ContextMean, CopyLast, MovingAverage
from lvm.models.facts import facts_of
from lvm.models.predict import predict_queries
from lvm.studies.phases import Planner, is_by_lane, read_phases
from lvm.tracking import logged_models
from lvm.tracking import study_runs as phase_runs
from lvm.tracking.datasets import Inputs
from lvm.tracking.registry import Card, Registry
from lvm.tracking.study_runs import (
    Done,
    as_trained,
    check_scored,
    is_alias_unmoved,
    one_at_a_time,
    replay_seed,
)
from lvm.tracking.training_runs import Validation
from lvm.windows.export import ensure_windows, export_windows, plan_windows
from tests.reference import ranks
from tests.synthetic import make_bank

registry = Registry()


@pytest.mark.parametrize(
    ("promote", "holder", "stands"),
    [
        ("enabled", "2", True),
        ("enabled", "1", False),
        ("enabled", None, False),
        ("dry_run", "1", True),
        ("dry_run", "2", False),
    ],
)
def test_a_replay_stands_while_the_alias_is_where_it_left_it(monkeypatch, promote, holder, stands):
    monkeypatch.setattr(
        Registry, "aliases", lambda self: {} if holder is None else {"baseline": holder}
    )
    outcomes = [{"name": "old", "version": "1"}, {"name": "better", "version": "2"}]
    replay = {"decision": {"winner": "better", "baseline": "old"}, "outcomes": outcomes}
    assert is_alias_unmoved(registry, replay, promote) is stands


def test_a_replay_that_left_a_phase_unscored_is_of_no_use():
    outcomes = [{"version": "1", "figures": {"hit_at_5": 0.1}}, {"version": "2", "figures": {}}]
    outcomes.append({"version": None, "figures": {"hit_at_5": 0.1}})
    replay = {"outcomes": outcomes, "best_free": "ema"}
    check_scored(replay, {"1"})
    with pytest.raises(ValueError, match="^version 2, 10 was not scored in it$"):
        check_scored(replay, {"1", "10", "2"})
    with pytest.raises(ValueError, match="no free predictor was scored in it"):
        check_scored(replay | {"best_free": None}, {"1"})


@pytest.fixture(scope="module")
def planned_bank(tmp_path_factory):
    """A bank in a working folder of its own, for plans alone."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield make_bank(folder / "bank", num_sequences=4, document_rows=75)


def sha(bank: Bank, name: str, recipe: str = "dense", **given: Any) -> str:
    parameters = {"bank": "bank"} | given
    return Planner(bank).job(name, read_phases()[name], recipe, parameters).sha256


def test_phases_are_planned_on_the_split_that_the_replay_takes(planned_bank):
    """Other windows that lie where training reads are passed over, leaky ones above all."""
    first = sha(planned_bank, "1")
    for other in ({"split": "random"}, {"seed": 3}):
        there = export_windows(planned_bank, 100, **other)
        assert there.leaky == ("split" in other)
        job = Planner(planned_bank).job("1", read_phases()["1"], "dense", {"bank": "bank"})
        assert job.sha256 == first and not job.windows.leaky
        beside = f"ctx100-document-seed0-{planned_bank.sha256[:8]}"
        assert job.parameters["windows"] == f"data/windows/{beside}"
        assert ensure_windows(planned_bank, 100).sha256 == there.sha256


def test_the_seed_is_that_of_an_honest_baseline_of_the_bank(planned_bank, tiny_bank, monkeypatch):
    made = {
        "1": (planned_bank, plan_windows(planned_bank, 20, seed=5)),
        "2": (planned_bank, plan_windows(planned_bank, 20, split="random", seed=6)),
        "3": (tiny_bank, plan_windows(tiny_bank, 20, seed=7)),
    }
    cards = [
        Card(f"models:/lvm/{version}", facts_of("ema", "none", *one), version=version)
        for version, one in made.items()
    ]
    monkeypatch.setattr(Registry, "cards", lambda self: cards)
    for holder, seed in (("1", 5), ("2", 0), ("3", 0), (None, 0)):
        held = {} if holder is None else {"baseline": holder}
        monkeypatch.setattr(Registry, "aliases", lambda self, held=held: held)
        assert replay_seed(registry, planned_bank) == seed, holder


def test_a_phase_that_may_have_seen_the_answers_is_not_compared(planned_bank):
    job = Planner(planned_bank).job("1", read_phases()["1"], "dense", {"bank": "bank"})
    outcome = {"name": "memory_gru", "version": "4", "leak": None}
    done = Done("run", "m-1", "4", {})
    assert as_trained(job, done, {"outcomes": [outcome]}).candidate == "memory_gru"
    leaky = outcome | {"leak": "trained on leaky windows (split=random)"}
    with pytest.raises(ValueError, match="phase 1 cannot be compared: trained on leaky windows"):
        as_trained(job, done, {"outcomes": [leaky]})
    with pytest.raises(ValueError, match="version 4 of phase 1 took no part"):
        as_trained(job, done, {"outcomes": []})


def test_the_same_work_waits_for_who_is_at_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = []

    def second() -> None:
        with one_at_a_time("0" * 64, "phase 1"):
            order.append("second")

    with one_at_a_time("0" * 64, "phase 1"):
        other = Thread(target=second)
        other.start()
        with one_at_a_time("1" * 64, "phase 2"):
            order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_training_is_told_by_its_inputs(planned_bank):
    first = sha(planned_bank, "1")
    assert first == sha(planned_bank, "1")
    others = [
        sha(planned_bank, "2"),
        sha(planned_bank, "1", "seed"),
        sha(planned_bank, "1", seed=1),
        sha(planned_bank, "1", hidden=16),
        sha(planned_bank, "1", max_steps=7),
    ]
    assert len({first, *others}) == 6
    assert sha(planned_bank, "2") == sha(planned_bank, "2B"), "dense has no use for alpha"
    assert sha(planned_bank, "2", "seed") != sha(planned_bank, "2B", "seed")
    other = make_bank(Path("other"), num_sequences=4, document_rows=75, seed=1)
    assert sha(other, "1") != first


def test_a_grown_model_starts_from_what_its_phase_trained(planned_bank, monkeypatch):
    short = replace(read_phases()["4"], ctx=100)
    own, grown = Planner(planned_bank).jobs(short, "dense", {"bank": "bank"}, " dense")
    assert (own.name, grown.name, grown.label) == (
        "4 dense",
        "4 tmd_experts dense",
        "4 tmd_experts",
    )
    weights = {
        "runs:/first/model": torch.nn.Linear(2, 2),
        "runs:/other/model": torch.nn.Linear(2, 2),
    }
    monkeypatch.setattr(logged_models, "load", lambda uri: SimpleNamespace(model=weights[uri]))
    begun = []

    def train_or_find(registry, job):
        begun.append(job)
        return Done("first", "m-1", "1", {})

    monkeypatch.setattr(phase_runs, "train_or_find", train_or_find)
    assert len(phase_runs.train_all(registry, [own, grown])) == 2
    first, second = begun
    assert first == own and "init" not in first.parameters
    assert second.parameters["init"] == "runs:/first/model"
    assert second.parameters["model"] == "tmd_experts"
    other = phase_runs.grow(grown, Done("other", "m-2", "2", {}))
    assert len({grown.sha256, second.sha256, other.sha256}) == 3, "other weights, other training"
    weights["runs:/other/model"] = weights["runs:/first/model"]
    again = phase_runs.grow(grown, Done("other", "m-2", "2", {}))
    assert again.sha256 == second.sha256, "weights count, not their name"


def test_a_bank_of_one_lane_is_shown_as_ranked(planned_bank, tmp_path, capsys):
    short = replace(read_phases()["4"], ctx=100, grown=None)
    jobs = Planner(planned_bank).jobs(short, "dense", {"bank": "bank"})
    assert is_by_lane(jobs, planned_bank)
    assert not is_by_lane([replace(jobs[0], phase=read_phases()["1"])], planned_bank)
    assert capsys.readouterr().out == ""
    single = make_bank(tmp_path / "single", num_lanes=1)
    assert not is_by_lane(Planner(single).jobs(short, "dense", {"bank": "bank"}), single)
    assert "phases are shown as ranked: rerank: bank" in capsys.readouterr().out


def test_a_validation_tells_what_it_cannot_see(tiny_bank, tmp_path):
    windows = plan_windows(tiny_bank, 20)
    validation = Validation(Inputs(tiny_bank, windows, None))
    models = {
        "copy-last": CopyLast(tiny_bank.dim),
        "context-mean": ContextMean(tiny_bank.dim),
        "ema": MovingAverage(tiny_bank.dim, 0.5),
    }
    measured = validation.measure(models)
    assert all(one["corrected"]["ci95"]["hit_at_5"] for one in measured.values())
    best = sorted(one["hit_at_5"] for one in measured.values())[-2:]
    (sentence,) = validation.warnings()
    assert sentence.startswith("validation is too small") and best[0] > 0
    asked = [
        predict_queries(models[name], tiny_bank, validation.queries)
        for name in ("copy-last", "ema")
    ]
    hit_Q, other_Q = (
        hit_at(ranks(found_QD, validation.queries, tiny_bank, windows.representative_N)[0], 5)
        for found_QD in asked
    )
    document_Q = tiny_bank.document_N[validation.queries.target_row_Q]
    seen = 100 * smallest_detectable(hit_Q - other_Q, document_Q)
    assert (
        f"{len(validation.queries):,} queries detect differences of Hit@5 of {seen:.1f}" in sentence
    )


def test_epochs_are_measured_on_the_first_val_queries(tiny_bank, tmp_path, monkeypatch):
    monkeypatch.setattr("lvm.tracking.training_runs.CHOICE_QUERIES", 40)
    windows = plan_windows(tiny_bank, 20)
    validation = Validation(Inputs(tiny_bank, windows, None))
    model = MovingAverage(tiny_bank.dim, 0.5)
    val = windows.queries["val"]
    rank_Q, _ = ranks(
        predict_queries(model, tiny_bank, val), val, tiny_bank, windows.representative_N
    )
    assert validation.figures(model)["hit_at_5"] == pytest.approx((rank_Q[:40] <= 5).mean())
    measured = validation.measure({"ema": model})["ema"]
    assert measured["hit_at_5"] == pytest.approx((rank_Q <= 5).mean())
    assert measured["sample"]["hit_at_5"] == pytest.approx((rank_Q[:40] <= 5).mean())
    told = validation.summary({"ema": measured})
    assert told.startswith(f"Hit@5 of free predictors on 40 of {len(val):,} val queries")


def test_torch_and_the_way_of_training_belong_to_it(planned_bank, monkeypatch):
    first = sha(planned_bank, "1")
    for name in (
        "torch.__version__",
        "lvm.training.checkpoint.TRAINING_VERSION",
        "lvm.training.checkpoint.FIT_VERSION",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(name, "another")
            assert sha(planned_bank, "1") != first, name


@pytest.mark.parametrize(
    ("given", "decided"),
    [
        ({"phase": "3.5"}, {"ctx": 2000, "chunk": 200, "batch_size": None, "alpha": None}),
        ({"phase": "3.5", "ctx": 600}, {"ctx": 600}),
        ({"phase": "3.5", "ctx": 1000}, {"ctx": 1000, "model": "memory_gru", "hidden": 512}),
        ({"phase": "3", "hidden": 64, "chunk": 200}, {"hidden": 64, "layers": 4, "chunk": 200}),
        ({"phase": "4", "model": "tmd_experts"}, {"hidden": 512, "layers": 4}),
        ({"phase": "3", "model": "skip"}, {"ctx": 1000, "hidden": None, "layers": None}),
        ({"phase": "3.5", "chunk": 50}, {"ctx": 2000, "chunk": 50}),
        (
            {"phase": "3.5", "recipe": "seed"},
            {"ctx": 2000, "batch_size": 4, "accumulation": 64, "alpha": 0.03},
        ),
        (
            {"phase": "2B", "recipe": "seed", "alpha": 0.2, "batch_size": 2},
            {"ctx": 500, "batch_size": 2, "accumulation": 16, "alpha": 0.2},
        ),
        ({"phase": None}, {"ctx": 1000, "phase": None, "model": None, "hidden": None}),
    ],
)
def test_what_is_given_wins_over_the_table(given, decided):
    options, _ = with_phase(TrainOptions(**given))
    assert {name: getattr(options, name) for name in decided} == decided
