"""The space of a study: what a file may say, what becomes of it on a bank, what a trial draws."""

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lvm.studies.tuning import Choices, Range, distributions_of, open_study, read_space
from lvm.training.config import TrainConfig, as_dict, resolve

CONFIG = TrainConfig()
DEFAULTS = as_dict(resolve(CONFIG, 500)) | {"ctx": 500}


def space_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "space.yaml").write_text(text)
    return tmp_path / "space.yaml"


def test_the_shipped_space_holds_the_defaults():
    found = distributions_of(read_space(), CONFIG, DEFAULTS, longest=600)
    assert list(found) == ["lr", "dropout", "focus", "temperature", "hidden", "layers", "ctx"]
    assert found["lr"] == FloatDistribution(0.0005, 0.008, log=True)
    assert found["hidden"] == CategoricalDistribution((64, 128, 256))
    assert found["ctx"] == CategoricalDistribution((250, 500)), "no context of 1000 is there"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no option"),
        ("[1]", "holds no option"),
        ("learning_rate: {low: 1, high: 2}", "unknown 'learning_rate'; known: ctx, lr"),
        ("lr: 0.1", "lr is 0.1; give low and high, or choices"),
        ("lr: {low: 0.1}", "lr misses or does not know high"),
        ("lr: {low: 0.1, high: 0.2, step: 1}", "lr misses or does not know step"),
        ("lr: {low: a, high: 0.2}", "lr.low is 'a'"),
        ("lr: {low: 0.2, high: 0.1}", "has low 0.2 and high 0.1; give low below high"),
        ("lr: {low: 0, high: 0.1, log: true}", "and above 0 for log"),
        ("lr: {low: .nan, high: 0.1}", "lr.low is nan"),
        ("hidden: {choices: []}", "hidden.choices is []"),
        ("hidden: {choices: [wide]}", "'wide'"),
        ("lr: {low: 1, high: 2}\nlr: {low: 1, high: 2}", "'lr' appears twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text, reason, tmp_path):
    with pytest.raises(ValueError, match="space") as refused:
        read_space(space_file(tmp_path, text))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("space", "model", "reason"),
    [
        ({"lr": Range(0.01, 0.1)}, "delta_memory", "lr: 0.01 to 0.1 must include its default"),
        ({"hidden": Range(64.5, 256)}, "delta_memory", "must be whole numbers"),
        ({"hidden": Choices([100])}, "delta_memory", "hidden: 100 is not a multiple of 32"),
        ({"dropout": Range(0.0, 1.0)}, "delta_memory", "dropout: 1.0 is not a share"),
        ({"temperature": Range(0.001, 0.1)}, "delta_memory", "temperature: 0.001 is outside"),
        ({"hidden": Choices([64])}, "skip", "hidden: the model skip has none"),
    ],
)
def test_what_no_training_can_have_is_refused(space, model, reason):
    config = replace(CONFIG, model=model)
    defaults = as_dict(resolve(config, 500)) | {"ctx": 500}
    with pytest.raises(ValueError, match=reason):
        distributions_of(space, config, defaults, longest=600)


def test_trials_draw_the_same_values_however_often_the_study_is_opened(tmp_path):
    space = {"lr": Range(1e-4, 1e-2, log=True), "layers": Range(1, 4), "hidden": Choices([64])}
    distributions = distributions_of(space, CONFIG, DEFAULTS, longest=600)
    assert distributions["layers"] == IntDistribution(1, 4)

    def opened(name: str):
        return open_study(f"sqlite:///{tmp_path}/o.db", name, {}, distributions, DEFAULTS, seed=3)

    def draw(tuning) -> dict[str, float]:
        trial = tuning.next_trial()
        values = tuning.values(trial)
        tuning.study.tell(trial, values["lr"])
        return values

    once = opened("once")
    whole = [draw(once) for _ in range(8)]
    assert whole[0] == {"lr": 2e-3, "layers": 2, "hidden": 128}, "the default is first"
    assert len({values["lr"] for values in whole}) == 8
    assert all(float(f"{values['lr']:.3g}") == values["lr"] for values in whole)
    assert [draw(opened("again")) for _ in range(8)] == whole
    left = opened("left")
    drawn = [left.values(left.next_trial())]
    drawn.append(opened("left").values(opened("left").next_trial()))
    assert drawn[0] == drawn[1], "a trial that was left running is taken up"
