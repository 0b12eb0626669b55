"""Lanes foretold from contexts, the shortlists that they order anew."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation.evaluate import evaluate_reranking, evaluate_together
from lvm.models.baselines import MovingAverage
from lvm.report.evaluation import reranking_table
from lvm.retrieval import lanes as foretold
from lvm.retrieval.lanes import (
    calibration,
    context_features,
    fit_lane_classifier,
    lane_codes,
    means_of,
)
from lvm.retrieval.rerank import (
    GRIDS,
    LANE,
    Shortlist,
    fit_reranker,
    likely_temperature,
    old_rule_scores,
    true_lane_ranks,
)
from lvm.windows.export import plan_windows, write_windows
from lvm.windows.planning import Windows, context_queries
from tests.synthetic import make_bank

pytestmark = pytest.mark.slow

CTX, DIM, NUM_SEQUENCES, NUM_DOCUMENTS, DOCUMENT_ROWS = 40, 16, 8, 20, 20


def lane_bank(path: Path, informative: bool) -> Bank:
    """Write a bank of wandering rows, two lanes; a lane adds a direction of its own to every row.

    That direction tells a context's lane from many rows, hardly from one; without it lanes mean
    nothing.
    """
    random = np.random.default_rng(0)
    sequence_rows = NUM_DOCUMENTS * DOCUMENT_ROWS
    row = np.arange(NUM_SEQUENCES * sequence_rows)
    sequence = row // sequence_rows
    lane = sequence % 2
    vectors = random.standard_normal((len(row), DIM))
    for place in range(1, len(row)):
        vectors[place] = 0.8 * vectors[place - 1] + 0.6 * vectors[place]
    vectors[:, 0] += informative * 1.2 * (2 * lane - 1)
    rows = pd.DataFrame(
        {
            "sequence": [f"s{code}" for code in sequence],
            "document": [f"d{number // DOCUMENT_ROWS}" for number in row % sequence_rows],
            "lane": [("even", "odd")[code] for code in lane],
        }
    )
    return write_bank(path, vectors, rows, "synthetic", "test", "float32")


@pytest.fixture(scope="module")
def telling(tmp_path_factory) -> tuple[Bank, Windows]:
    bank = lane_bank(tmp_path_factory.mktemp("telling") / "bank", informative=True)
    return bank, plan_windows(bank, CTX)


def test_features_are_the_means_of_each_context(telling):
    bank, windows = telling
    queries = windows.queries["test"].head(60)
    feature_QF = context_features(queries, bank)
    bounds = list(zip(queries.first_row_Q, queries.target_row_Q, strict=True))
    contexts = [np.arange(first, end) for first, end in bounds]
    expected = [means_of(bank.unit(rows)[None])[0] for rows in contexts]
    np.testing.assert_allclose(feature_QF, expected, atol=1e-6)
    recorded = context_queries(queries.target_row_Q, queries.sequence_start_Q, contexts)
    np.testing.assert_allclose(context_features(recorded, bank), expected, atol=1e-6)
    assert context_features(queries.take(slice(0, 0)), bank).shape == (0, 2 * DIM)


def test_the_classifier_foretells_lanes_that_can_be_told(telling, tmp_path: Path):
    bank, windows = telling
    queries = windows.queries["test"]
    found = fit_lane_classifier(bank, windows)
    log_p_QL = found.log_probability(context_features(queries, bank))
    assert log_p_QL.shape == (len(queries), 3) and np.isfinite(log_p_QL).all()
    np.testing.assert_allclose(np.exp(log_p_QL).sum(axis=1), 1, atol=1e-5)
    known = calibration(log_p_QL, foretold.target_codes(queries, bank))
    assert known["accuracy"] > 0.95 and known["calibration_error"] < 0.05
    blind = lane_bank(tmp_path / "bank", informative=False)
    blind_windows = plan_windows(blind, CTX)
    asked = blind_windows.queries["test"]
    log_p_QL = fit_lane_classifier(blind, blind_windows).log_probability(
        context_features(asked, blind)
    )
    unsure = calibration(log_p_QL, foretold.target_codes(asked, blind))
    assert unsure["accuracy"] < 0.7 and unsure["loss"] < np.log(2) + 0.1, "no false confidence"


def test_temperature_is_the_one_that_made_the_labels():
    random = np.random.default_rng(1)
    logit_QC = random.normal(0, 4, (4000, 3))
    gumbel_QC = random.gumbel(size=logit_QC.shape)
    place_Q = (logit_QC / 2.5 + gumbel_QC).argmax(axis=1)
    assert foretold._temperature(logit_QC, place_Q) == pytest.approx(2.5, rel=0.1)


def test_calibration_error_is_the_gap_of_confidence_to_accuracy():
    log_p_QL = np.log(np.array([[0.9, 0.1]] * 10))
    right_half = np.array([0] * 5 + [1] * 5)
    assert calibration(log_p_QL, right_half)["calibration_error"] == pytest.approx(0.4)
    sure = np.array([0] * 9 + [1])
    assert calibration(log_p_QL, sure)["calibration_error"] == pytest.approx(0.0, abs=1e-9)


def test_rows_without_a_lane_are_never_the_first_lane(telling, tmp_path: Path):
    bank, _ = telling
    lane_N = np.where(np.arange(bank.num_rows) % 3 == 0, -1, bank.lane_N).astype(np.int16)
    partly = dataclasses.replace(bank, lane_N=lane_N)
    assert (lane_codes(partly)[::3] == len(bank.lanes)).all()
    windows = plan_windows(partly, CTX)
    found = fit_lane_classifier(partly, windows)
    assert found.code_C.tolist() == [0, 1, 2]
    queries = windows.queries["test"]
    log_p_QL = found.log_probability(context_features(queries, partly))
    assert np.exp(log_p_QL[:, 2]).mean() == pytest.approx(1 / 3, abs=0.05)
    known = calibration(log_p_QL, foretold.target_codes(queries, partly))
    assert known["calibration_error"] < 0.1


def test_a_lane_that_no_position_shows_leaves_a_model_without_an_order_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    bank = make_bank(tmp_path / "bank", num_lanes=1)
    lane_N = np.zeros(bank.num_rows, np.int16)
    lane_N[bank.sequence_start_N()] = 1  # first rows are no targets
    two = dataclasses.replace(bank, lane_N=lane_N, lanes=("a", "b"))
    windows, correction = plan_windows(two, 30), np.tile(np.float32([1, 0]), (two.num_rows, 1))
    assert (two.lane_N[windows.train_rows()] == 1).any()
    found = fit_reranker(MovingAverage(16), two, windows, correction)
    assert found is not None and LANE not in found.weights and found.classifier is None


def test_a_kept_reranker_is_that_of_its_correction(telling, tmp_path: Path):
    bank, windows = telling
    written = write_windows(windows, tmp_path / "windows")
    flat = np.tile(np.float32([1, 0]), (bank.num_rows, 1))
    steep = np.tile(np.float32([30, 0]), (bank.num_rows, 1))
    model = MovingAverage(bank.dim, 0.1)
    found = [fit_reranker(model, bank, written, pair_N2).weights for pair_N2 in (flat, steep)]
    low, high = (one[LANE]["corrected"].tau for one in found)
    assert low < 0.2 < high


def test_a_telling_lane_lifts_and_its_ceiling_lies_above(telling):
    bank, windows = telling
    queries = windows.queries["test"]
    model = MovingAverage(bank.dim, 0.1)
    (own,) = evaluate_together({"ema": model}, bank, windows, queries)
    report, ranks = evaluate_reranking(model, bank, windows, queries, own)
    plain = report["plain"]
    assert plain["beta"] in GRIDS["beta"] and plain["beta"] > 0
    assert plain["hit_at_5_difference"]["mean"] > 0 < report["corrected"]["on_list"]
    assert plain["true_lane"]["hit_at_5"] >= plain["hit_at_5"] > own.report["hit_at_5"]
    again = (ranks["rank_reranked"].to_numpy() <= 5).mean()
    assert again == pytest.approx(plain["hit_at_5"])
    assert "ceiling" in reranking_table(report, own.report, leaky=False)


def test_lanes_that_mean_nothing_get_no_weight(tmp_path: Path):
    bank = lane_bank(tmp_path / "bank", informative=False)
    windows = plan_windows(bank, CTX)
    correction = np.tile(np.float32([1, 0]), (bank.num_rows, 1))
    found = fit_reranker(MovingAverage(bank.dim, 0.5), bank, windows, correction)
    log_p_QL = found.classifier.log_probability(np.eye(2 * DIM, dtype=np.float32))
    weights = found.weights[LANE]["plain"]
    moved = weights.tau * weights.beta * np.ptp(log_p_QL[:, :2], axis=1)
    assert moved.max() < 0.05, "a few hundredths of a cosine at most"


def test_old_rule_filters_by_the_likeliest_lane():
    listed = Shortlist(
        row_QC=np.array([[0, 1, 2]]),
        score_QC=np.array([[0.8, 0.7, 0.6]], np.float32),
        is_truth_QC=np.array([[False, False, True]]),
    )
    log_p_QL = log_softmax(np.array([[0.0, 1.0]]), axis=1)
    score_QC = old_rule_scores(listed, log_p_QL, np.array([0, 0, 1]))
    np.testing.assert_allclose(score_QC, [[0.56, 0.49, 0.72]], rtol=1e-6)


def test_likely_temperature_makes_the_truths_likeliest():
    random = np.random.default_rng(2)
    score_QC = random.normal(0, 0.2, (3000, 10)).astype(np.float32)
    place_Q = (score_QC / 0.08 + random.gumbel(size=score_QC.shape)).argmax(axis=1)
    is_truth_QC = np.arange(10) == place_Q[:, None]
    listed = Shortlist(np.tile(np.arange(10), (3000, 1)), score_QC, is_truth_QC)
    assert likely_temperature(listed) == pytest.approx(0.08, rel=0.1)


def test_a_truth_whose_twin_stands_in_another_lane_is_of_its_own():
    """Row 0 stands for the target, which is of lane 1; so are rows 1, 2."""
    listed = Shortlist(
        np.arange(4)[None], np.array([[0.9, 0.8, 0.7, 0.6]], np.float32), np.eye(4, dtype=bool)[:1]
    )
    ranks = true_lane_ranks(listed, np.ones(1), np.array([1]), np.array([0, 1, 1, 0]))
    assert ranks.tolist() == [1.0]


def test_one_lane_cannot_rank(tmp_path: Path):
    bank = make_bank(tmp_path / "bank", num_lanes=1)
    with pytest.raises(ValueError, match="rerank: .* one lane or none"):
        fit_lane_classifier(bank, plan_windows(bank, 30))


def test_a_bank_without_lanes_is_refused(tmp_path: Path, tiny_bank: Bank):
    bare = dataclasses.replace(tiny_bank, lane_N=None, lanes=())
    with pytest.raises(ValueError, match="has no lanes"):
        fit_lane_classifier(bare, plan_windows(bare, 30))
