"""Tables whose every number is checked against the result that they show."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank
from lvm.evaluation.lane_diagnosis import diagnose, lane_figures
from lvm.report.evaluation import evaluation_table
from lvm.report.lanes import hits_table, lanes_note, lanes_table
from lvm.report.shadow import (
    comparison_table,
    decision_text,
    gates_table,
    history_table,
    measurement_table,
    origin_note,
    shadow_lanes_table,
    shadow_markdown,
    shadow_table,
)
from lvm.report.tables import (
    MARKDOWN,
    PredictorRow,
    difference_cell,
    hit_metrics,
    interval_cell,
    p_cell,
)
from lvm.report.tables import predictors_table as predictors
from lvm.shadow.promotion_gates import decide
from lvm.system.settings import read_gate_rules, read_lane_rules
from lvm.windows.export import plan_windows
from tests.shadow_cases import CLEAR_GAIN, difference, outcome, unscored, winning_case

RULES = read_gate_rules()


def body(text: str) -> list[str]:
    """Return the lines below the rule of a table, up to a blank line."""
    lines = text.splitlines()
    first = next(place for place, line in enumerate(lines) if set(line) <= set("- ") and line)
    rows = lines[first + 1 :]
    return rows[: rows.index("")] if "" in rows else rows


def columns(text: str) -> list[tuple[int, int]]:
    """Return where the columns of a table begin and end, from its rule."""
    rule = next(line for line in text.splitlines() if set(line) <= set("- ") and line)
    return [match.span() for match in re.finditer("-+", rule)]


def test_metrics_have_the_bounds_that_are_known() -> None:
    ci95 = {"hit_at_1": [0.1, 0.2], "hit_at_5": [None, None], "hit_at_10": [np.nan, np.nan]}
    found = hit_metrics("test/", {"hit_at_1": 0.15, "hit_at_5": 0.2, "hit_at_10": 0.3}, ci95)
    assert found == {
        "test/hit_at_1": 0.15,
        "test/hit_at_1_low": 0.1,
        "test/hit_at_1_high": 0.2,
        "test/hit_at_5": 0.2,
        "test/hit_at_10": 0.3,
    }


def test_cells() -> None:
    assert interval_cell(0.1724, [0.0951, 0.19]) == "17.2 [ 9.5, 19.0]"
    assert interval_cell(1.0, [1.0, 1.0]) == "100.0 [100.0, 100.0]"
    assert difference_cell(difference(-0.012, -0.02, 0.004)) == "-1.2 [ -2.0,  +0.4]"
    assert interval_cell(0.2, [float("nan"), float("nan")]) == "20.0 [unknown]"
    assert difference_cell(difference(0.02, float("nan"), float("nan"))) == "+2.0 [unknown]"
    assert (p_cell(0.00009), p_cell(0.0321)) == ("<0.0001", "0.0321")


def test_predictors_are_aligned_and_complete() -> None:
    result = winning_case()
    text = shadow_table(result, decide(result, "old", RULES))
    rows = body(text)
    assert len(rows) == 8
    for row in rows:
        for start, _ in columns(text)[1:]:
            assert row[start - 2 : start].strip() == ""
    plain = rows[0]
    assert plain.startswith("model ") and "plain" in plain
    assert "10.0 [ 8.0, 12.0]" in plain and "20.0 [18.0, 22.0]" in plain
    assert "30.0 [28.0, 32.0]" in plain and plain.endswith("120")
    assert rows[1].startswith("  NEW BASELINE, trained") and "corrected" in rows[1]
    assert rows[3].startswith("  was baseline, trained")
    assert rows[5].startswith("  free")
    assert max(map(len, text.splitlines())) <= 110


def test_the_caption_tells_queries_documents_and_bank_rows() -> None:
    text = shadow_table(winning_case())
    assert "2,000 queries from 60 documents, ranked over 40,000 bank rows" in text
    assert "39,000 distinct" in text and "bbbbbbbbbbbb" in text and "95 % interval" in text
    assert "  baseline, trained" in text and "NEW BASELINE" not in text


def test_lanes_of_a_replay_show_the_first_the_baseline_and_the_best_free(tiny_bank: Bank) -> None:
    target_row_Q = plan_windows(tiny_bank, 10).queries["test"].target_row_Q
    table = pd.DataFrame({"target_row": target_row_Q, "rank": 1.0 + target_row_Q % 9})
    lanes = tuple(lane_figures(table, {}, tiny_bank))
    result = winning_case()
    outcomes = tuple(dataclasses.replace(one, lanes=lanes) for one in result.outcomes)
    text = shadow_lanes_table(dataclasses.replace(result, outcomes=outcomes))
    head = next(line for line in text.splitlines() if line.startswith("lane "))
    assert head.split() == ["lane", "queries", "documents", "model", "%", "old", "%", "ema", "%"]
    for row, lane in zip(body(text), lanes, strict=True):
        assert row.startswith(lane.lane)
        assert row.count(f"{100 * lane.figures['hit_at_5']:.1f} [") == 3
    assert shadow_lanes_table(result) == "The bank has no lanes."


def test_leaky_results_are_marked_everywhere() -> None:
    result = winning_case(leaky=True)
    assert shadow_table(result).count("LEAKY") == 1 + len(result.outcomes)
    assert "LEAKY" in comparison_table(result)
    assert "LEAKY" not in shadow_table(winning_case())
    seen = outcome("model", "trained", 0.2, leak="trained on leaky windows")
    honest = dataclasses.replace(result, leaky=False, outcomes=(seen, *result.outcomes[1:]))
    assert shadow_table(honest).count("LEAKY") == 1


def test_unscored_candidates_are_listed_with_their_reason() -> None:
    refused = unscored("away", refusal="made from another bank (aaaa, this one is bbbb)")
    result = winning_case()
    result = dataclasses.replace(
        result, outcomes=(*result.outcomes, refused, unscored("nan", num_non_finite=7))
    )
    text = shadow_table(result)
    assert "  away: refused, made from another bank (aaaa, this one is bbbb)" in text
    assert "  nan: 7 predictions are not finite" in text
    only = dataclasses.replace(result, outcomes=(refused,))
    assert "No candidate could be scored." in shadow_table(only)


def test_a_predictor_without_correction_has_its_marks_below() -> None:
    one = outcome("ema", "free", 0.2)
    row = PredictorRow("ema", ("free",), one.figures, one.ci95, {}, {})
    assert body(predictors([row]))[1].strip() == "free"


def test_a_page_shows_the_marks_beside_the_name_with_mrr() -> None:
    one = outcome("ema", "free", 0.2)
    text = predictors(
        [PredictorRow("ema", ("free", "LEAKY"), one.figures, one.ci95, one.corrected, one.ci95)],
        MARKDOWN,
    )
    _, _, plain, corrected = text.splitlines()
    assert "MRR@10 %" in text and plain.startswith("| ema, free, LEAKY | plain ")
    assert "13.3 [11.3, 15.3]" in plain and corrected.count("|") == plain.count("|") == 8


def test_comparisons_show_points_and_p_of_who_was_tested() -> None:
    rows = body(comparison_table(winning_case()))
    assert rows[0].split()[:2] == ["model", "old"]
    assert rows[0].count("+4.0 [ +2.0,  +6.0]") == 2, "as served and plain"
    assert "0.0010" in rows[0] and rows[0].endswith(" 1.5")
    decided = body(comparison_table(winning_case(), decide(winning_case(), "old", RULES)))
    assert "0.0010" in decided[0] and "0.3000" in decided[1]
    assert " - " in decided[2], "copy-last comes after a failure"
    text = comparison_table(winning_case())
    assert "true differences of Hit@5 below 1.5 points are missed by these 2,000 queries" in text
    empty = dataclasses.replace(winning_case(), comparisons=())
    assert "No two candidates" in comparison_table(empty)


def test_the_decision_shows_every_gate_and_the_outcome_first() -> None:
    result = winning_case()
    broken = unscored("nan", num_non_finite=7)
    result = dataclasses.replace(result, outcomes=(*result.outcomes, broken))
    decision = decide(result, "old", dataclasses.replace(RULES, alpha=0.0005))
    rows = {row.split()[0]: row.split()[1:] for row in body(gates_table(decision))}
    assert rows["model"] == ["pass", "pass", "FAIL", "FAIL"]
    assert rows["nan"] == ["FAIL", "-", "-", "-"]
    assert rows["ema"] == rows["copy-last"] == ["pass", "FAIL", "-", "-"]
    caption = gates_table(decision).split("\n\n")[0]
    assert "nobody failed: same bank, no leak, enough queries, fast enough, not with" in caption
    assert "finite" not in caption
    text = decision_text(decision)
    head, reason = text[text.index("Decision:") :].splitlines()[:2]
    assert head == "Decision: baseline is old"
    assert reason == "  old stays baseline: no candidate passed every gate"
    promoted = decision_text(decide(winning_case(), "old", RULES))
    assert "Decision: baseline is model (promoted: model; before: old)" in promoted
    assert max(map(len, promoted.splitlines())) <= 110


def test_pairs_that_answer_alike_have_nothing_to_detect() -> None:
    result = winning_case()
    alike = tuple(dataclasses.replace(x, detectable=float("nan")) for x in result.comparisons)
    text = comparison_table(dataclasses.replace(result, comparisons=alike))
    assert text.count("none differ") == len(alike) and "Detectable: unknown" in text


def test_measurements_tell_what_was_read_from_the_store() -> None:
    result = winning_case()
    read = dataclasses.replace(result.outcomes[0], origin="read from the store")
    lost = unscored("lost", failure="its process was killed by SIGKILL", origin="")
    text = measurement_table(
        dataclasses.replace(result, outcomes=(read, *result.outcomes[1:], lost))
    )
    rows = body(text)
    assert rows[0].split()[0] == "model" and rows[0].endswith("read from the store")
    assert len(rows) == 4 and all(row.endswith("measured now") for row in rows[1:])
    mixed = dataclasses.replace(result, outcomes=(read, *result.outcomes[1:], lost))
    assert origin_note(mixed).splitlines() == [
        "Answers read from the store: model.",
        "Answers measured now: old, ema, copy-last.",
    ]
    assert "4.0" in rows[0] and "8.0" in rows[0] and "2026-01-02 03:04:05" in rows[0]
    assert "No candidate was measured" in measurement_table(
        dataclasses.replace(result, outcomes=(lost,))
    )


def test_the_history_of_the_alias_has_the_latest_move_first() -> None:
    move = {"at": "2026-01-02T03:04:05+00:00", "version": "1", "replaced": "none"}
    moves = [
        move | {"run": "a" * 32, "reason": "first"},
        move | {"version": "2", "replaced": "1", "run": "b" * 32, "reason": "better"},
    ]
    rows = body(history_table(moves))
    assert [row.split()[2:4] for row in rows] == [["2", "1"], ["1", "none"]]
    assert "better" in rows[0] and "bbbbbbbb" in rows[0]
    assert history_table([]) == "The alias was never set."


def test_markdown_has_all_parts_with_figures() -> None:
    result = winning_case(source="the log asked.jsonl")
    text = shadow_markdown(result, decide(result, "old", RULES), True, ["forest.png"])
    dry = shadow_markdown(result, decide(result, "old", RULES), False)
    assert dry.startswith("**Dry run: no alias is changed")
    assert text.startswith("# Shadow evaluation\n") and "![forest](forest.png)" in text
    for part in (
        "## Ranking",
        "## Paired differences",
        "## Lanes",
        "## Every gate",
        "## How it was measured",
        "## The alias before this decision",
        "queries: the log asked.jsonl",
        "Decision: baseline is",
    ):
        assert part in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 20
    for before, line in zip(tables, tables[1:], strict=False):
        if set(line) <= set("|:-"):
            assert before.count("|") == line.count("|")


def eval_report(**changes: object) -> dict[str, object]:
    model, ema = outcome("lvm", "trained", 0.1), outcome("ema", "free", 0.2)
    entries = [
        dict(one.figures) | {"ci95": one.ci95, "corrected": one.corrected | {"ci95": one.ci95}}
        for one in (model, ema)
    ]
    facts = {"model": "memory_gru", "split": "test", "queries": 1234, "documents": 99, "ctx": 500}
    facts |= {"bank_rows": 40_000, "candidates": 39_000, "bank_sha256": "c" * 64, "leaky": False}
    lost = {"mean": -0.1, "low": None, "high": None, "p_value": 1.0, "num_documents": 1}
    served = lost | {"mean": -0.12}
    best = {"name": "ema", "hit_at_5_difference": lost, "corrected_hit_at_5_difference": served}
    facts |= {"oracle": {"hit_at_5": 0.987}, "best_baseline": best}
    return entries[0] | facts | {"baselines": {"ema": entries[1]}} | changes


def test_an_evaluation_ranks_the_model_among_the_free_predictors() -> None:
    text = evaluation_table(eval_report())
    rows = body(text)
    assert [row.split()[0] for row in rows[::2]] == ["ema", "memory_gru"]
    assert rows[1].startswith("  free") and rows[3].startswith("  model")
    assert "1,234 queries from 99 documents, ranked over 40,000 bank rows" in text
    assert "Hit@5 98.7 %" in text and "Against ema" in text and "plain -10.0 [unknown]" in text
    assert "Hit@5 as served (corrected) -12.0 [unknown] points" in text
    assert evaluation_table(eval_report(leaky=True)).count("LEAKY") == 3
    alone = evaluation_table(eval_report(baselines={}, best_baseline=None))
    assert "Against" not in alone and len(body(alone)) == 2


@pytest.mark.parametrize("style", ["simple", MARKDOWN])
def test_lanes_show_figures_supply_and_verdict(tiny_bank: Bank, style: str) -> None:
    windows = plan_windows(tiny_bank, 10)
    target_row_Q = windows.queries["test"].target_row_Q
    assert tiny_bank.lane_N is not None
    lane_Q = tiny_bank.lane_N[target_row_Q]
    rank_Q = np.array([1.0, 2.0, 90.0])[lane_Q]
    top_row_Q = np.where(lane_Q == 2, np.flatnonzero(tiny_bank.lane_N == 0)[0], target_row_Q)
    weak = pd.DataFrame({"target_row": target_row_Q, "rank": rank_Q, "top_row": top_row_Q})
    rules = dataclasses.replace(read_lane_rules(), min_queries=5, min_documents=2)
    diagnosis = diagnose("model", {"model": weak, "ema": weak}, tiny_bank, windows, rules, False)
    text = lanes_table(diagnosis, style)
    lines = [line for line in text.splitlines() if "lane-2" in line]
    assert "WEAK, weak by the old rule" in lines[0] and "0.0 [ 0.0,  0.0]" in lines[0]
    assert "+0.0" in lines[0] and "ema" in lines[0]
    assert text.endswith(diagnosis.sentence) and diagnosis.sentence.startswith("Ingest")
    assert "lane-0" in text.split("Confusions")[1]
    assert "LEAKY" not in text + lanes_note(diagnosis) + hits_table(diagnosis, style)
    seen = dataclasses.replace(diagnosis, leaky=True)
    assert lanes_table(seen, style).count("LEAKY") == 2
    assert "LEAKY" in lanes_note(seen) and "LEAKY" in hits_table(seen, style)
    assert diagnosis.report()["leaky"] is False and seen.report()["leaky"] is True


def test_a_gain_reads_the_same_in_reason_and_table() -> None:
    reason = decide(winning_case(), "old", RULES).reasons[0]
    assert "+4.0 [+2.0, +6.0] points" in reason
    assert difference_cell(CLEAR_GAIN) == "+4.0 [ +2.0,  +6.0]"
