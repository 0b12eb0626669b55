"""Descriptions of runs: short, with the figures that their reports have."""

import dataclasses

import pytest

from lvm.report.data import counts_note, last_screen, pipeline_note
from lvm.report.evaluation import evaluation_note, training_note
from lvm.report.shadow import shadow_note
from lvm.report.tables import NOTE_LINES
from lvm.shadow.promotion_gates import decide
from lvm.system.settings import read_gate_rules
from tests.shadow_cases import winning_case

HITS = {"hit_at_1": 0.1, "hit_at_5": 0.3, "hit_at_10": 0.4}
INTERVALS = {name: [value - 0.05, value + 0.05] for name, value in HITS.items()}
FIGURES = HITS | {"ci95": INTERVALS}
REPORT = FIGURES | {
    "model": "memory_gru",
    "split": "val",
    "ctx": 500,
    "queries": 1200,
    "documents": 30,
    "bank_rows": 40_000,
    "leaky": False,
    "corrected": FIGURES | {"hit_at_5": 0.35},
    "baselines": {"ema": FIGURES | {"hit_at_5": 0.2}, "copy-last": FIGURES | {"hit_at_5": 0.15}},
    "best_baseline": None,
    "best_epoch": 4,
    "history": [{}] * 6,
    "warnings": ["too few steps"],
}


@pytest.mark.parametrize("leaky", [False, True])
def test_a_training_leads_with_its_score_beside_the_best_free_one(leaky: bool) -> None:
    note = training_note(REPORT | {"leaky": leaky}, "version 7 of lvm")
    headline, epochs, *_ = note.split("\n\n")
    assert headline == (
        "**Hit@5 35.0 [25.0, 35.0] %** as served on val; ema, the best free predictor: 20.0 %."
    )
    assert epochs == "Best epoch 4 of 6; version 7 of lvm."
    assert "1,200 queries" in note and "35.0 [25.0, 35.0]" in note and "too few steps" in note
    assert ("LEAKY" in note) == leaky
    assert "copy-last" not in note


def test_an_evaluation_tells_its_difference() -> None:
    difference = {"mean": 0.1, "low": 0.05, "high": 0.15, "p_value": 0.01, "num_documents": 30}
    best = {"name": "ema", "hit_at_5_difference": difference}
    best |= {"corrected_hit_at_5_difference": difference | {"mean": 0.12}}
    note = evaluation_note(REPORT | {"best_baseline": best})
    assert "Against ema: Hit@5 +12.0 [+5.0, +15.0] points as served, plain +10.0 [" in note
    assert "best free" not in evaluation_note(REPORT | {"baselines": {}})


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_replay_tells_its_baseline_first(is_enabled: bool) -> None:
    result = winning_case()
    decision = decide(result, result.baseline_name, read_gate_rules())
    note = shadow_note(result, decision, is_enabled)
    first = "" if is_enabled else "Dry run: no alias is changed; promote=enabled changes it. "
    assert note.startswith(f"{first}**Baseline: {decision.winner}**")
    assert ("Dry run" in note) == (not is_enabled)
    assert decision.reasons[0] in note
    many = dataclasses.replace(result, outcomes=result.outcomes * 30)
    assert len(shadow_note(many, decision, is_enabled)) < 8000, "MLflow takes no longer tag"
    assert shadow_note(many, decision, is_enabled).count("\n| ") <= NOTE_LINES + 1


def test_counts_have_separated_thousands() -> None:
    note = counts_note({"rows": 40_000, "bank": "data/bank"}, ["no leak"])
    assert "40,000" in note and "data/bank" in note and note.endswith("* no leak")


def test_a_pipeline_tells_how_it_ended() -> None:
    result = winning_case()
    decision = decide(result, result.baseline_name, read_gate_rules()).report()
    note = pipeline_note("data/mine", 1000, result.report() | {"decision": decision})
    assert note.startswith("**Baseline: model**\n\ndata/mine, ctx 1,000: 2,000 queries from 60")
    assert note.endswith(f"* {decision['reasons'][-1]}")


def test_a_pipelines_last_screen_tells_question_winner_example_and_next_commands() -> None:
    result = winning_case()
    decision = decide(result, result.baseline_name, read_gate_rules()).report()
    told = "The first. / The second. / The third."
    example = {"outcome": "hit", "rank": 2.0, "context": told, "truth": "T " * 80, "found_1": "F."}
    shadow = result.report() | {"decision": decision}
    commands = {"predict": "lvm predict --text mine.txt", "look": "mlflow ui"}
    screen = last_screen(1000, shadow, example, "skip", commands)
    asked, won, rest = screen.index("ASKED"), screen.index("WON"), screen.index("EXAMPLE")
    assert asked < won < rest
    assert "after up to 1,000 others? 2,000 test" in screen and "model: " in screen[won:rest]
    assert "of skip, hit at rank 2" in screen and "The second. / The third." in screen
    assert "The first." not in screen and "F." in screen
    assert screen.endswith("  predict  lvm predict --text mine.txt\n  look     mlflow ui")
    assert max(map(len, screen.splitlines())) <= 100 and len(screen.splitlines()) < 24
