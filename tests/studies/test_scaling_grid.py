"""Grids of real, tiny trainings: what is trained, what is kept, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lvm.studies import scaling_cells as cells
from lvm.studies.scaling_cells import Cell, CellResult, Trainer, ValQueries, divide_queries
from lvm.studies.scaling_fit import fit_grid
from lvm.studies.scaling_grid import Plan, break_even, check_data, grid_values, run_grid
from lvm.studies.scaling_verdict import NOT_OPTIMISED
from lvm.system.atomic import read_entry, write_entry
from lvm.system.settings import read_scaling_rules
from lvm.training.config import TrainConfig
from lvm.windows.export import plan_windows
from tests.studies.curves import exact_grid
from tests.synthetic import make_bank

CONFIG = TrainConfig(
    model="res_mlp", layers=2, dropout=0.0, batch_size=20, negatives=16, precision="fp32"
)
PLAN = Plan((0.25, 0.5, 1.0), (2, 4, 6), (0, 1), steps=6, lr=1e-3)
LENIENT = replace(read_scaling_rules(), min_steps=1, min_passes=0.0, step_gain=1.0, min_queries=10)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return make_bank(tmp_path_factory.mktemp("grid") / "bank", num_documents=40)


@pytest.fixture(scope="module")
def windows(bank):
    return plan_windows(bank, 20)


@pytest.fixture
def trainings(monkeypatch):
    """The cells that were really trained, one entry each."""
    seen = []

    def counted(self, cell, *others):
        seen.append(cell)
        return train(self, cell, *others)

    train = Trainer._train
    monkeypatch.setattr(Trainer, "_train", counted)
    return seen


def trainer(bank, windows, folder: Path, **changes) -> Trainer:
    queries = divide_queries(bank, windows, 0.25, changes.pop("max_queries", 100))
    return Trainer(bank, windows, queries, replace(CONFIG, **changes), folder)


@pytest.mark.slow
def test_a_second_run_trains_nothing_and_says_the_same(bank, windows, tmp_path, trainings):
    told = []
    first = run_grid(
        trainer(bank, windows, tmp_path), PLAN, LENIENT, lambda kind, r: told.append((kind, r))
    )
    assert len(trainings) == len(set(trainings)) == 18 + 3 + 1
    assert [kind for kind, _ in told].count("grid") == 18
    again = run_grid(trainer(bank, windows, tmp_path), PLAN, LENIENT)
    assert len(trainings) == 22
    assert all(result.was_kept for result in again.results)
    assert again.verdict == first.verdict and again.soft.data == first.soft.data
    run_grid(trainer(bank, windows, tmp_path), replace(PLAN, seeds=(0, 1, 2)), LENIENT)
    assert len(trainings) == 22 + 9 + 1, "a larger grid trains what is new"


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_killed_cell_goes_on_from_its_last_round(bank, windows, tmp_path):
    cell, folder = Cell(0.25, 4, 0, 40, 1e-3), tmp_path / "killed"
    undisturbed = trainer(bank, windows, tmp_path / "whole").result(cell)

    def die(_, record):
        if record["epoch"] == 2:
            raise Killed

    dying = trainer(bank, windows, folder)
    dying.on_round = die
    with pytest.raises(Killed):
        dying.result(cell)
    rounds = []
    going_on = trainer(bank, windows, folder)
    going_on.on_round = lambda _, record: rounds.append(record["epoch"])
    result = going_on.result(cell)
    assert rounds[0] == 3
    assert (result.rank_Q == undisturbed.rank_Q).all()
    assert not list(folder.glob("*-state.safetensors"))


@pytest.mark.parametrize(
    "change", [{"max_queries": 50}, {"negatives": 8}, {"model": "transformer"}]
)
def test_what_decides_a_cell_is_in_its_key(bank, windows, tmp_path, trainings, change):
    cell = replace(PLAN.largest(), width=8, steps=2)
    trainer(bank, windows, tmp_path).result(cell)
    trainer(bank, windows, tmp_path, **change).result(cell)
    assert len(trainings) == 2


def test_a_damaged_result_is_trained_anew(bank, windows, tmp_path, trainings):
    cell = replace(PLAN.largest(), steps=2)
    first = trainer(bank, windows, tmp_path).result(cell)
    (path,) = tmp_path.glob("*.safetensors")
    contents = bytearray(path.read_bytes())
    contents[-4] ^= 255
    path.write_bytes(contents)
    again = trainer(bank, windows, tmp_path).result(cell)
    assert len(trainings) == 2 and (again.rank_Q == first.rank_Q).all()
    path.write_bytes(b"cut short")
    trainer(bank, windows, tmp_path).result(cell)
    assert len(trainings) == 3


def test_a_result_of_another_key_is_not_read(bank, windows, tmp_path, trainings):
    """File names have the first digits of the key alone."""
    cell = replace(PLAN.largest(), steps=2)
    trainer(bank, windows, tmp_path).result(cell)
    (path,) = tmp_path.glob("*.safetensors")
    found = read_entry(path, json.loads(safe_open(path, "numpy").metadata()["meta"])["key"])
    write_entry(path, path.name.removesuffix(".safetensors").ljust(64, "0"), found)
    trainer(bank, windows, tmp_path).result(cell)
    assert len(trainings) == 2


@pytest.mark.slow
def test_a_training_that_is_not_optimised_stops_the_grid(bank, windows, tmp_path, trainings):
    found = run_grid(trainer(bank, windows, tmp_path), PLAN, read_scaling_rules())
    assert found.verdict.name == NOT_OPTIMISED and found.soft is None
    assert "max_steps" in found.verdict.sentence
    assert len(trainings) == 4


def test_rounds_are_as_long_for_small_parts(bank, windows, tmp_path):
    one = trainer(bank, windows, tmp_path)
    cells_ = [Cell(fraction, 4, 0, 32, 1e-3) for fraction in (0.125, 1.0)]
    small, whole = (one._steps_of(one._part(cell)[0]) for cell in cells_)
    assert abs(small - whole) <= max(2, whole // 3)


def test_queries_that_choose_and_queries_that_measure_share_no_document(bank, windows):
    questions = divide_queries(bank, windows, 0.25, None)
    chosen = set(bank.document_N[questions.choice.target_row_Q])
    assert not chosen & set(questions.document_Q)
    both = np.concatenate([questions.choice.target_row_Q, questions.measured.target_row_Q])
    assert set(both) == set(windows.queries["val"].target_row_Q)
    assert 0.15 < len(questions.choice) / len(both) < 0.4


def test_choice_and_measured_queries_have_their_limits(bank, windows, monkeypatch):
    monkeypatch.setattr(cells, "MAX_CHOICE_QUERIES", 7)
    questions = divide_queries(bank, windows, 0.25, 11)
    assert (len(questions.choice), len(questions.measured)) == (7, 11)


def test_grid_values_stand_in_the_order_of_the_plan():
    plan = Plan((0.25, 0.5, 1.0), (2, 4, 6), (0, 1), 10, 1e-3)
    results = [
        CellResult(
            plan.cell(f, w, s),
            np.full(5, 1 + w + s),
            100 * w,
            int(1000 * f),
            9,
            10,
            1,
            1,
            [],
            False,
        )
        for f in plan.fractions
        for w in plan.widths
        for s in plan.seeds
    ]
    grid = grid_values(plan, results[::-1], np.arange(5), soft=False)
    assert grid.data_F.tolist() == [250, 500, 1000]
    assert grid.parameters_W.tolist() == [200, 400, 600]
    assert grid.value_FWSQ[:, :, 0, 0].tolist() == [[1, 1, 0]] * 3  # ranks 3, 5, 7
    assert grid.value_FWSQ[:, :, 1, 0].tolist() == [[1, 0, 0]] * 3  # ranks 4, 6, 8


def test_break_even_counts_documents_to_add():
    fitted = fit_grid(exact_grid(lambda x, z: 0.3 - 0.05 * x**-0.5), resamples=50)
    even = break_even(fitted, 1000, 1000, LENIENT)
    gain = 0.01 / np.exp(-0.25)  # on the scale of -ln(1 - score), where the score is 1 - e^-0.25
    assert even.documents == pytest.approx(1000 * ((1 - gain / 0.05) ** -2 - 1), rel=0.05)
    assert even.low <= even.documents * 1.1 and even.high >= even.documents * 0.9
    half = break_even(fitted, 1000, 2000, LENIENT)
    assert half.documents == pytest.approx(max(0.0, even.documents - 1000))
    far = break_even(fitted, 1000, 1000, replace(LENIENT, break_even_gain=0.037))
    assert far.documents == np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": (0.5, 1.0, 1.5)}, "fractions: 1.5 is not above 0 and at most 1"),
        ({"fractions": (0.0, 0.5, 1.0)}, "fractions: 0 is not above 0"),
        ({"fractions": (1.0,)}, "fractions: 1 given; a curve needs at least 3"),
        ({"fractions": (1.0, 0.5, 0.25)}, "fractions: must be different numbers in ascending"),
        ({"widths": (2, 4, 7)}, "widths: 7 is not an even number"),
        ({"widths": (4, 4, 8)}, "widths: must be different"),
        ({"seeds": ()}, "seeds: need two or more"),
        ({"seeds": (0,)}, "seeds: need two or more"),
        ({"seeds": (0, 0)}, "seeds: need two or more different"),
    ],
)
def test_impossible_grids_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_banks_that_are_too_small_are_refused(bank, windows, tmp_path):
    rules = replace(LENIENT, min_documents=8)
    questions = divide_queries(bank, windows, 0.25, None)
    tiny = replace(PLAN, fractions=(0.005, 0.5, 1.0))
    with pytest.raises(
        ValueError, match="fractions: 0.005 of this bank is 2 documents; at least 8"
    ):
        check_data(bank, windows, questions, tiny, rules)
    close = replace(PLAN, fractions=(0.5, 0.5001, 1.0))
    with pytest.raises(ValueError, match="two of them choose the same documents"):
        check_data(bank, windows, questions, close, rules)
    with pytest.raises(ValueError, match="queries: .* val queries are left"):
        check_data(bank, windows, questions, PLAN, replace(rules, min_queries=100_000))
    of_one = questions.document_Q == questions.document_Q[0]
    short = ValQueries(
        questions.choice, questions.measured.take(np.flatnonzero(of_one)), np.full(of_one.sum(), 0)
    )
    with pytest.raises(ValueError, match="queries: .* are of 1 val documents; at least 8"):
        check_data(bank, windows, short, PLAN, rules)
    with pytest.raises(ValueError, match="split=random leaks"):
        check_data(bank, replace(windows, leaky=True), questions, PLAN, rules)
