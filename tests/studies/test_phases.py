"""The phase table: its values, everything that can be wrong in it."""

from pathlib import Path

import pytest

from lvm.studies.phases import (
    PHASES_FILE,
    Published,
    chosen_phases,
    read_old_gates,
    read_phases,
)
from lvm.training.config import TrainConfig, resolve

SEED = {  # ctx, batch, accumulation, alpha
    "1": (100, 32, 8, 0.05),
    "2": (500, 16, 16, 0.03),
    "2B": (500, 16, 16, 0.05),
    "3": (1000, 8, 32, 0.03),
    "3.5": (2000, 4, 64, 0.03),
    "4": (2000, 4, 64, 0.03),
}


def test_the_shipped_phases_are_the_old_ones() -> None:
    phases = read_phases()
    found = {name: (one.ctx, *vars(one.seed).values()) for name, one in phases.items()}
    assert found == SEED and list(found) == list(SEED)
    assert {one.seed.batch_size * one.seed.accumulation for one in phases.values()} == {256}
    assert (phases["3.5"].ctx, phases["3.5"].chunk) == (10 * 200, 200)
    assert [name for name, one in phases.items() if one.rerank == "lane"] == ["4"]
    assert {name: one.grown for name, one in phases.items() if one.grown} == {"4": "tmd_experts"}
    assert {name: one.after for name, one in phases.items() if one.after} == {"3": "2"}


def test_the_published_figures_are_those_of_the_lab_book() -> None:
    phases = read_phases()
    known = {name: one.published for name, one in phases.items() if one.published is not None}
    assert known["1"] == Published(0.4007, 0.5932, 0.6516, 1149, 11482, 17, 23, 943)
    assert known["2"] == Published(0.5, 0.6652, 0.7478, 230, 2295, 22, 28, 252)
    assert known["3"] == Published(0.6174, 0.7565, 0.8174, 115, 1146, 16, 23, 115)
    assert known["3.5"] == Published(0.4483, 0.6207, 0.7241, 58, 572, 1, 8, 24)
    assert known.keys() == {"1", "2", "3", "3.5"}


@pytest.mark.parametrize("name", ["2", "3", "3.5"])
def test_a_published_share_is_a_whole_number_of_its_pool(name: str) -> None:
    published = read_phases()[name].published
    assert published is not None
    for share in (published.hit_at_1, published.hit_at_5, published.hit_at_10):
        assert round(round(share * published.pool) / published.pool, 4) == share


def test_dense_takes_lengths_alone_seed_the_whole_row() -> None:
    phase = read_phases()["3.5"]
    model = {"model": "memory_gru", "hidden": 512, "layers": 4}
    assert phase.settings("dense") == {"ctx": 2000, "chunk": 200, **model}
    assert phase.settings("seed") == {
        **model,
        "ctx": 2000,
        "chunk": 200,
        "batch_size": 4,
        "accumulation": 64,
        "alpha": 0.03,
    }


@pytest.mark.parametrize("name", ["1", "2", "3", "3.5"])
def test_the_seed_recipe_alone_decides_as_the_table_does(name: str) -> None:
    phase = read_phases()[name]
    config = resolve(TrainConfig(recipe="seed"), phase.ctx)
    assert {key: getattr(config, key) for key in vars(phase.seed)} == vars(phase.seed)


def test_old_gates_are_read() -> None:
    assert read_old_gates().best_epoch_above == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    ctx: 100\n",
            "    ctx: hundred\n",
            "phases.1.ctx is 'hundred'; it must be a valid integer",
        ),
        (
            "    ctx: 100\n",
            "    ctx: 0\n",
            "phases.1.ctx is 0; it must be greater than or equal to 1",
        ),
        ("    ctx: 100\n", "    ctx: true\n", "phases.1.ctx is True; it must be a valid integer"),
        (
            "    ctx: 100\n",
            "    ctxt: 100\n",
            "phases.1 misses or does not know ctx, ctxt; its keys are",
        ),
        (
            "    ctx: 100\n",
            "    ctx: 100\n    lr: 1\n",
            "phases.1 misses or does not know lr; its keys are",
        ),
        (
            "accumulation: 8, alpha",
            "accumulation: 8.5, alpha",
            "phases.1.seed.accumulation is 8.5; it must be a valid integer",
        ),
        ("alpha: 0.05}", "alpha: .nan}", "phases.1.seed.alpha is nan; it must be a finite number"),
        (
            "alpha: 0.05}",
            "beta: 0.05}",
            "phases.1.seed misses or does not know alpha, beta; its keys are",
        ),
        (
            "hit_at_1: 0.4007",
            "hit_at_1: 40.07",
            "phases.1.published.hit_at_1 is 40.07; it must be less than or equal to 1",
        ),
        ("hit_at_1: 0.4007, ", "", "phases.1.published misses or does not know hit_at_1"),
        (
            "rerank: lane",
            "rerank: experts",
            "phases.4.rerank is 'experts'; it must be 'none' or 'lane'",
        ),
        ("grown: tmd_experts", "grown: lstm", "phases.4.grown is 'lstm'; it must be one of memory"),
        (
            'after: "2"',
            'after: "3.5"',
            "phases.3.after is '3.5'; it must be a phase above it: 1, 2",
        ),
        ("phases:\n", "phase:\n", "no section 'phases'"),
        ("    ctx: 100\n", "    ctx: !!python/name:os.system\n", "YAML file without tags"),
        ("    ctx: 100\n", "    ctx: [100\n", "not a readable YAML file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = PHASES_FILE.read_text()
    assert old in text
    path = tmp_path / "phases.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        read_phases(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_gates_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "phases.yaml"
    with pytest.raises(ValueError, match="not a readable YAML file"):
        read_phases(path)
    path.write_text(PHASES_FILE.read_text().replace("loss_rise: 0.02", "loss_rise: -1"))
    with pytest.raises(ValueError, match="old_gates.loss_rise is -1"):
        read_old_gates(path)


def test_phases_are_chosen_by_name_in_the_given_order() -> None:
    phases = read_phases()
    assert [one.name for one in chosen_phases("3.5, 1,3.5", phases)] == ["3.5", "1"]
    with pytest.raises(ValueError, match="phases: unknown '5'; the table has 1, 2, 2B, 3, 3.5, 4"):
        chosen_phases("1,5", phases)
    with pytest.raises(ValueError, match="phases: none was given"):
        chosen_phases(" , ", phases)
