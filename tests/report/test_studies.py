"""What a grid of trainings, and a study of settings, are shown as."""

import json
from dataclasses import replace

import numpy as np
import pytest
from optuna.trial import create_trial

from lvm.evaluation.metrics import Difference
from lvm.report.studies import (
    documents_of,
    parameters_of,
    scaling_figure,
    scaling_page,
    scaling_report,
    scaling_text,
    tuning_parts,
)
from lvm.report.tables import TEXT
from lvm.studies.scaling_cells import CellResult
from lvm.studies.scaling_fit import fit_grid
from lvm.studies.scaling_grid import BreakEven, Plan, Scaling
from lvm.studies.scaling_verdict import Optimised, Verdict
from lvm.studies.tuning import VALUES, Gain, Tuned
from lvm.system.atomic import jsonable
from tests.studies.curves import CURVES, draw_grid

PLAN = Plan((0.125, 0.25, 0.5, 1.0), (64, 128, 256), (0, 1), 600, 1e-3)
FREE = {"ema": {"hit_at_5": 0.16, "soft": 0.15, "ci95": {"hit_at_5": [0.14, 0.18]}}}
EVEN = BreakEven(0.01, 120.0, 80.0, float("inf"))
LEAD = Difference(0.001, -0.002, 0.004, 0.5, 80)


@pytest.fixture(scope="module")
def scaling() -> Scaling:
    fitted = fit_grid(draw_grid(CURVES["data-limited"], 0, num_queries=800), resamples=100)
    steps = Difference(0.002, -0.001, 0.005, 0.2, 80)
    optimised = Optimised(600, 8.0, 5, 8, -0.01, steps, ((5e-4, steps),), (), "")
    results = tuple(
        CellResult(PLAN.cell(f, w, s), np.ones(3), 1000 * w, 10, int(800 * f), 600, 5, 8, [], False)
        for f in PLAN.fractions
        for w in PLAN.widths
        for s in PLAN.seeds
    )
    verdict = Verdict("data-limited", "Data-limited: more data pay more than a wider model.")
    return Scaling(verdict, optimised, results, 800, fitted, fitted, EVEN, ("ema", LEAD))


def test_the_verdict_comes_first_everywhere(scaling):
    text = scaling_text(scaling, PLAN, FREE, 800)
    assert text.startswith(scaling.verdict.sentence)
    page = scaling_page(scaling, PLAN, FREE, 800, "0123")
    assert page.startswith(f"**{scaling.verdict.sentence}**")
    for part in (text, page):
        assert "120 [80, none within reach]" in part
        assert "width 128 (0.13 M)" in part and "600 optimizer steps; 8.0 passes" in part
        assert "second half of the steps" in part
        assert "ema" in part and "not shown to be better" in part


def test_widths_too_close_to_tell_are_named(scaling):
    near = tuple(replace(result, parameters=1000) for result in scaling.results)
    text = scaling_text(replace(scaling, results=near), PLAN, FREE, 800)
    assert "warning: the largest model has only 1.0 x the parameters" in text
    assert "warning" not in scaling_text(scaling, PLAN, FREE, 800)


def test_a_grid_that_was_not_trained_is_not_shown(scaling):
    stopped = replace(scaling, soft=None, hit=None, break_even=None)
    text = scaling_text(stopped, PLAN, FREE, 800)
    assert "twice the data" not in text and "Is it optimised?" in text
    assert "gains" not in scaling_report(stopped, PLAN, FREE, 800)


def test_the_report_is_json_without_ranks(scaling):
    report = jsonable(scaling_report(scaling, PLAN, FREE, 800))
    json.dumps(report, allow_nan=False)
    assert report["verdict"] == "data-limited" and len(report["cells"]) == 24
    assert report["cells"][0]["rank_Q"] is None
    assert report["break_even"]["high"] is None
    assert report["gains"]["soft_hit_at_5"]["data"]["low"] > 0


def test_the_figure_has_a_curve_a_width_to_twice_the_data(scaling):
    documents, parameters = documents_of(scaling, PLAN), parameters_of(scaling, PLAN)
    assert documents == [100, 200, 400, 800] and parameters == [64_000, 128_000, 256_000]
    figure = scaling_figure(scaling, PLAN, FREE)
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert len(lines) == 3
        assert all(line.get_xdata()[-1] == pytest.approx(1600) for line in lines)
    assert "data-limited" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("on_test", "left"),
    [(0.005, "50 % of the gain is left."), (-0.002, "none of the gain is left.")],
)
def test_a_study_tells_what_is_left_of_its_gain(on_test, left):
    trial = create_trial(value=0.2, user_attrs={VALUES: {"lr": 1e-3}}, intermediate_values={1: 0.2})
    figures = {"queries": 90, "hit_at_5": 0.2, "ci95": {"hit_at_5": [0.1, 0.3]}}
    reports = {name: figures | {"corrected": figures} for name in ("default", "trial 0", "ema")}
    gains = tuple(
        Gain(split, "ema", reports, Difference(mean, -0.02, 0.02, 0.5, 9), LEAD)
        for split, mean in (("val", 0.01), ("test", on_test))
    )
    tuned = Tuned("s", [trial, trial], trial, {}, gains, "mlflow run .", "r", "1")
    assert left in tuning_parts(tuned, TEXT)[0]
