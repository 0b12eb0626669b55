"""The report of an evaluation holds what its parts say."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import Evaluation, evaluate
from lvm.evaluation.free_predictors import FREE
from lvm.evaluation.metrics import FIGURES
from lvm.models.baselines import CopyLast, MovingAverage
from lvm.windows.export import plan_windows
from lvm.windows.planning import Windows
from tests import reference

pytestmark = pytest.mark.slow

KEYS = {
    "queries",
    "bank_rows",
    "bank_sha256",
    "ctx",
    *FIGURES,
    "ci95",
    "raw",
    "corrected",
    "pools",
    "oracle",
    "lanes",
    "latency_ms",
    "baselines",
    "leaky",
    "windows_sha256",
    "hubness_beta",
    "model",
    "split",
    "seed",
}
COLUMNS = ["query", "target_row", "sequence", "document", "lane", "rank", "rank_raw"]


@pytest.fixture(scope="module")
def windows(tiny_bank: Bank) -> Windows:
    return plan_windows(tiny_bank, 30)


@pytest.fixture(scope="module")
def evaluated(tiny_bank: Bank, windows: Windows) -> tuple[dict, list[Evaluation]]:
    return evaluate("mine", MovingAverage(tiny_bank.dim, 0.35), tiny_bank, windows)


def test_report_has_every_key_in_plain_json(evaluated, tiny_bank, windows):
    report, _ = evaluated
    assert KEYS <= set(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["model"] == "mine"
    assert report["split"] == "test"
    assert report["queries"] == len(windows.queries["test"])
    assert report["bank_rows"] == tiny_bank.num_rows
    assert report["bank_sha256"] == tiny_bank.sha256
    assert report["windows_sha256"] == windows.sha256
    assert report["ctx"] == 30
    assert not report["leaky"]
    latency = report["latency_ms"]
    assert 0 < latency["p50"] <= latency["p95"]
    assert 0 < latency["exact_search_p50"] <= latency["exact_search_p95"]


def test_figures_are_those_of_the_slow_reference(evaluated, tiny_bank, windows):
    report, evaluations = evaluated
    own, queries = evaluations[0], windows.queries["test"]
    for pair_N2, figures in ((None, report), (own.row_correction, report["corrected"])):
        filtered, raw = reference.ranks(
            own.predictions, queries, tiny_bank, windows.representative_N, pair_N2
        )
        expected = reference.figures(filtered.tolist())
        assert {name: figures[name] for name in FIGURES} == pytest.approx(expected)
        assert figures["raw"] == pytest.approx(reference.figures(raw.tolist()))
    for figures in (report, report["corrected"]):
        for name in FIGURES:
            low, high = figures["ci95"][name]
            assert low <= figures[name] <= high


def test_per_query_lines_stand_in_the_order_of_predictions(evaluated, tiny_bank, windows):
    own, queries = evaluated[1][0], windows.queries["test"]
    table = own.per_query
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    assert {"rank_corrected", "rank_corrected_raw", "top_row"} <= set(table.columns)
    assert own.predictions.shape == (len(queries), tiny_bank.dim)
    assert own.predictions.dtype == np.float32
    assert np.allclose(np.linalg.norm(own.predictions, axis=1), 1, atol=1e-5)
    assert (table["target_row"] == queries.target_row_Q).all()
    assert (table["query"] == queries.query_Q).all()
    row = int(table["target_row"][3])
    assert table["sequence"][3] == tiny_bank.sequences[tiny_bank.sequence_N[row]]
    assert table["document"][3] == tiny_bank.documents[tiny_bank.document_N[row]]
    assert table["lane"][3] == tiny_bank.lanes[tiny_bank.lane_N[row]]
    assert own.row_correction.shape == (tiny_bank.num_rows, 2)


def test_free_predictors_stand_beside_the_model(evaluated):
    report, evaluations = evaluated
    assert set(report["baselines"]) == set(FREE)
    assert [e.name for e in evaluations] == ["mine", *FREE]
    for name, entry in report["baselines"].items():
        assert {*FIGURES, "ci95", "raw", "corrected"} <= set(entry)
        evaluation = next(e for e in evaluations if e.name == name)
        assert entry["hit_at_5"] == (evaluation.per_query["rank"] <= 5).mean()
    found = report["best_baseline"]
    best = report["baselines"][found["name"]]
    served = [entry["corrected"]["hit_at_5"] for entry in report["baselines"].values()]
    assert best["corrected"]["hit_at_5"] == max(served), "the best one as served"
    for own, rival, change in (
        (report, best, found["hit_at_5_difference"]),
        (report["corrected"], best["corrected"], found["corrected_hit_at_5_difference"]),
    ):
        assert change["mean"] == pytest.approx(own["hit_at_5"] - rival["hit_at_5"])
        assert 0 <= change["p_value"] <= 1


def test_a_free_predictor_is_not_evaluated_beside_itself(tiny_bank, windows):
    model = CopyLast(tiny_bank.dim)
    report, evaluations = evaluate("copy-last", model, tiny_bank, windows, max_queries=20)
    assert report["queries"] == 20
    assert [e.name for e in evaluations] == list(FREE)
    assert set(report["baselines"]) == set(FREE) - {"copy-last"}


def test_lanes_pools_oracle_add_up(evaluated, windows):
    report, evaluations = evaluated
    lanes = report["lanes"]
    assert set(lanes) == {"lane-0", "lane-1", "lane-2"}
    assert sum(lane["queries"] for lane in lanes.values()) == report["queries"]
    hits = sum(lane["queries"] * lane["hit_at_5"] for lane in lanes.values())
    assert hits / report["queries"] == pytest.approx(report["hit_at_5"])
    pools = report["pools"]
    num_candidates = len(np.unique(windows.representative_N))
    assert list(pools) == ["58", "115", "230", "1149", str(num_candidates)]
    assert pools[str(num_candidates)]["hit_at_5"] == pytest.approx(report["raw"]["hit_at_5"])
    sizes = [pool["hit_at_5"] for pool in pools.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert report["oracle"]["hit_at_1"] == 1
    assert 0.5 < report["contrastive_accuracy"] <= 1
    assert report["copy_ratio"] > 1
    assert len(evaluations[0].per_query) == report["queries"]


def test_val_figures_equal_the_reference(tiny_bank, windows):
    model = MovingAverage(tiny_bank.dim, 0.6)
    report, _ = evaluate("ema-0.6", model, tiny_bank, windows, split="val", baselines=False)
    expected = reference.validation_figures(model, tiny_bank, windows)
    assert {name: report[name] for name in FIGURES} == pytest.approx(expected)
    assert report["baselines"] == {}
    assert report["best_baseline"] is None


def test_two_evaluations_agree_to_the_bit(tiny_bank, windows):
    model = MovingAverage(tiny_bank.dim, 0.6)
    first, second = (
        evaluate("ema", model, tiny_bank, windows, "test", 40, baselines=False)[1][0]
        for _ in range(2)
    )
    assert first.predictions.tobytes() == second.predictions.tobytes()
    assert first.row_correction.tobytes() == second.row_correction.tobytes()
    assert first.per_query.equals(second.per_query)
    first.report.pop("latency_ms"), second.report.pop("latency_ms")
    assert first.report == second.report


def test_a_bank_without_lanes_is_evaluated_too(tiny_bank, windows):
    bank = dataclasses.replace(tiny_bank, lane_N=None, lanes=())
    model = CopyLast(bank.dim)
    (found,) = evaluate("copy-last", model, bank, windows, "test", 10, baselines=False)[1]
    assert (found.per_query["lane"] == "unassigned").all()
    assert found.report["lanes"] == {}


def test_leaky_windows_mark_the_report(tiny_bank):
    windows = plan_windows(tiny_bank, 30, split="random")
    model = CopyLast(tiny_bank.dim)
    assert evaluate("copy-last", model, tiny_bank, windows, baselines=False)[0]["leaky"]


def test_bad_input_is_refused(tiny_bank, windows):
    model = CopyLast(tiny_bank.dim)
    with pytest.raises(ValueError, match="split: 'train' has no queries"):
        evaluate("copy-last", model, tiny_bank, windows, split="train")
    with pytest.raises(ValueError, match="max_queries: 0"):
        evaluate("copy-last", model, tiny_bank, windows, max_queries=0)

    class Broken(torch.nn.Module):
        def forward(self, context_BTD):
            return context_BTD * float("nan")

    with pytest.raises(ValueError, match="are not finite"):
        evaluate("broken", Broken(), tiny_bank, windows, baselines=False)
