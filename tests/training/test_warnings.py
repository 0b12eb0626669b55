"""Warnings of a training: each of them fires, none without a reason."""

import math
import re

import pytest

from lvm.bank.bank import Bank
from lvm.training.config import TrainConfig
from lvm.training.guard import (
    epoch_warnings,
    planned_warnings,
    training_warnings,
    validation_warnings,
)
from lvm.training.loop import train
from lvm.training.optimizer import TrainingPlan
from lvm.windows.export import plan_windows
from tests.synthetic import noise_bank

SOUND = {"epochs": 10, "steps_per_epoch": 100, "steps": 1000, "warmup": 50}
PLAN = TrainingPlan(**SOUND, examples_per_epoch=200_000, own_negatives=None)
THE_OLD_ONE = TrainingPlan(8, 3, 24, 3, 514, 3)


def record(epoch: int, hit: float, cosine: float) -> dict[str, float]:
    return {"epoch": epoch, "val/hit_at_5": hit, "val/cosine": cosine}


def test_a_sound_plan_is_not_warned_of() -> None:
    assert planned_warnings(PLAN) == []


def test_the_old_phase_is_doubted_in_three_ways_before_it_begins() -> None:
    steps, examples, negatives = planned_warnings(THE_OLD_ONE)
    assert steps.startswith("only 24 optimizer steps are planned (3 per epoch, epochs: 8)")
    assert examples.startswith("only 514 training examples per epoch")
    assert negatives.startswith("only 3 negatives per example")
    assert "give epochs=100 and omit max_steps" in steps
    assert "recipe=dense" in examples and "recipe=dense" in negatives


def test_a_small_validation_names_the_queries_that_would_do() -> None:
    (sentence,) = validation_warnings(58, 0.18)
    assert "58 queries detect differences of Hit@5 of 18.0 points or more" in sentence
    assert f"about {math.ceil(58 * 81):,} queries, from proportionally more documents" in sentence
    assert validation_warnings(5000, 0.02) == []
    assert validation_warnings(5000, 0.0) == []


def test_a_validation_of_one_document_judges_nothing() -> None:
    (sentence,) = validation_warnings(5000, math.nan)
    assert "come from one document" in sentence


def test_best_at_epoch_1_is_told_at_the_end_alone_with_a_smaller_lr() -> None:
    history = [record(1, 0.3, 0.2) | {"train/lr": 3e-3}, record(2, 0.2, 0.1)]
    assert epoch_warnings(history, 1) == [], "the epochs to come may be better"
    (sentence,) = epoch_warnings(history, 1, has_ended=True)
    assert sentence.startswith("best at epoch 1 of 2") and "lr=0.001," in sentence
    assert epoch_warnings(history[:1], 1, has_ended=True) == [], "there was no other"


def test_cosine_that_rises_while_hits_fall_is_told_at_the_end() -> None:
    history = [record(1, 0.1, 0.1), record(2, 0.3, 0.1), record(3, 0.2, 0.2)]
    assert epoch_warnings(history, 2) == []
    (sentence,) = epoch_warnings(history, 2, has_ended=True)
    assert sentence.startswith("val cosine rose while Hit@5 fell after epoch 2")
    risen = [record(1, 0.1, 0.1), record(2, 0.2, 0.2)]
    assert epoch_warnings(risen, 2, has_ended=True) == []


def test_a_fall_within_the_noise_of_epochs_is_not_told() -> None:
    history = [record(1, 0.2, 0.1), record(2, 0.21, 0.1), record(3, 0.208, 0.2)]
    assert epoch_warnings(history, 2, has_ended=True) == []


def test_a_fall_between_two_epochs_is_told_at_the_end() -> None:
    hits, cosines = (0.2, 0.21, 0.18, 0.209), (0.1, 0.1, 0.2, 0.1)
    history = [record(n, *one) for n, one in enumerate(zip(hits, cosines, strict=True), start=1)]
    assert len(epoch_warnings(history, 2, has_ended=True)) == 1


@pytest.mark.parametrize("name", ["train/skipped_steps", "train/rollbacks"])
def test_an_unstable_training_is_told_at_once_with_a_smaller_lr(name: str) -> None:
    history = [record(1, 0.1, 0.1) | {name: 2, "train/lr": 0.03}]
    (sentence,) = epoch_warnings(history, 1)
    assert re.search(r"lr=0\.01\b", sentence)


def test_few_steps_taken_are_told_where_more_were_planned() -> None:
    (sentence,) = training_warnings(PLAN, [record(1, 0.2, 0.1)], 1, 24)
    assert sentence.startswith("only 24 of 1000 optimizer steps were taken")
    assert sentence.endswith("patience=10 takes them all")
    assert len(training_warnings(THE_OLD_ONE, [], 0, 24)) == 3, "it is not told twice"


def test_an_encoder_that_adds_nothing_is_told_at_the_end_with_a_remedy() -> None:
    idle = record(1, 0.2, 0.1) | {"train/share_encoder": 0.0004}
    (sentence,) = training_warnings(PLAN, [idle], 1, 1000)
    assert sentence.startswith(
        "the encoder adds nothing: 1 - cosine of predictions with and without it is 0.0004"
    )
    assert sentence.endswith("model=skip predicts the same in less time")
    assert epoch_warnings([idle], 1) == []
    assert training_warnings(PLAN, [idle | {"train/share_encoder": 0.0011}], 1, 1000) == []
    assert training_warnings(PLAN, [record(1, 0.2, 0.1)], 1, 1000) == [], "a model without one"


def trained_warnings(bank: Bank, ctx: int, **settings: object) -> list[list[str]]:
    """Train; return the warnings told before each epoch, an empty list standing for its end."""
    told: list[list[str]] = []
    hits = iter((0.3, 0.2, 0.1))
    cosines = iter((0.1, 0.2, 0.3))

    def validate(model: object) -> dict[str, float]:
        told.append([])
        return {"hit_at_5": next(hits), "cosine": next(cosines)}

    config = TrainConfig(
        **{"hidden": 8, "layers": 2, "averaging": "none"} | settings  # type: ignore
    )
    windows = plan_windows(bank, ctx)
    result = train(bank, windows, config, validate=validate, on_warnings=told.append)
    assert result.warnings
    return told


@pytest.fixture(scope="module")
def long_bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two sequences long enough for a context of 2,000."""
    path = tmp_path_factory.mktemp("long") / "bank"
    return noise_bank(path, num_sequences=2, num_documents=40, document_rows=70, dim=8)


def test_the_old_recipe_at_2000_is_flagged_before_its_first_epoch_ends(long_bank: Bank) -> None:
    before, end = trained_warnings(long_bank, 2000, recipe="seed", epochs=1)
    assert end == [], "nothing else was told before the validation of epoch 1"
    steps, examples, negatives = before
    assert "optimizer steps are planned (1 per epoch, epochs: 1)" in steps
    assert "training examples per epoch" in examples
    assert "negatives per example" in negatives


def test_what_the_epochs_show_is_told_at_the_end(tiny_bank: Bank) -> None:
    settings = {"epochs": 3, "batch_size": 64, "negatives": 16, "chunk": 10}
    first, _, second, _, third, _ = trained_warnings(tiny_bank, 20, **settings)
    assert [one.split(" ")[0] for one in first] == ["only", "only"], "steps, examples"
    assert first[1].endswith("times the rows"), "it is dense already"
    assert first == second == third
