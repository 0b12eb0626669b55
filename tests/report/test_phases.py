"""The page of the phases: every number is that of the comparison."""

import dataclasses

import pytest

from lvm.bank.bank import Bank
from lvm.report.phases import (
    PhaseStory,
    merged_warnings,
    phase_figure,
    phases_markdown,
    phases_text,
)
from lvm.studies.phase_comparison import PhaseComparison, measure_phases, old_checks
from lvm.studies.phases import OLD_DECISION, old_difference, read_old_gates, read_phases
from tests.phase_cases import compared, per_query, replay, trained

PHASES = read_phases()
STORY = PhaseStory(
    phases=PHASES,
    old=old_difference(*(PHASES[name] for name in OLD_DECISION)),
    winner="long",
    reasons=["long becomes the baseline"],
    is_enabled=True,
)


@pytest.fixture(scope="module")
def found(tiny_bank: Bank) -> PhaseComparison:
    return compared(tiny_bank)


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_old_figures_stand_with_the_intervals_of_their_pools(found: PhaseComparison) -> None:
    text = phases_text(found, STORY)
    assert "62.07 [49.2, 73.4]" in text and "75.65 [67.1, 82.6]" in text
    assert "240 queries from 12 documents, ranked over 1,440 bank rows" in text


def test_phases_stand_with_examples_steps_and_version(found: PhaseComparison) -> None:
    table = phases_text(found, STORY).partition("One evaluation:")[2]
    first, twin = line_of(table, "1 "), line_of(table, "2B ")
    assert "25.0 [" in first and "4,000" in first and "30" in first and first.endswith("v1")
    assert "33.3 [" in twin and twin.endswith("same as 2")
    assert line_of(table, "4, by lane").endswith("v2")
    assert line_of(table, "ema ").endswith("free")
    assert line_of(table, "ridge, by lane").endswith("free")


def test_the_pools_and_what_they_do_to_one_model_are_told(found: PhaseComparison) -> None:
    text = phases_text(found, STORY)
    pools = found.rows[0].measured.pools
    few, many = (f"{100 * pools[pool]['hit_at_5']:.1f} %" for pool in (58, 1149))
    joined = " ".join(text.split())
    assert (
        f"The model of phase 1, unchanged, answers {many} among 1,149 candidates, {few} " in joined
    )
    assert "59.32 (of 1,149)" in text


def test_a_row_by_lane_in_front_has_no_part_in_the_pools(tiny_bank: Bank) -> None:
    """The first row that is not ordered anew has; with none, the page says why."""
    runs = [trained("4", "long"), trained("1", "short")]
    both, alone = (
        measure_phases(some, replay(), per_query(tiny_bank), tiny_bank) for some in (runs, runs[:1])
    )
    assert "The model of phase 1, unchanged" in phases_text(both, STORY)
    assert "phase 1 alone, unchanged, in each pool" in legend(both)
    joined = " ".join(phases_text(alone, STORY).split())
    assert "Every phase here is re-ranked by lane" in joined
    assert "smaller than the old pools" not in joined
    assert not any("unchanged" in name for name in legend(alone))


def legend(found: PhaseComparison) -> list[str]:
    (shown,) = phase_figure(found, PHASES).legends
    return [text.get_text() for text in shown.get_texts()]


def test_the_old_decision_is_tested(found: PhaseComparison) -> None:
    joined = " ".join(phases_text(found, STORY).split())
    for words in ("36 of 58", "87 of 115", "-13.6 points [-28.2, +0.7]", "p = 0.0762"):
        assert words in joined
    assert "The interval contains zero: it decided nothing. Finding a difference" in joined
    assert "in four of five cases takes about 179 queries a phase" in joined


def test_the_winner_is_named_with_its_phases(found: PhaseComparison) -> None:
    end = " ".join(phases_text(found, STORY).split()).partition("Best phase: 4")[2]
    assert end.startswith(", chosen among 3 on these queries: Hit@5 100.0 [")
    assert "+0.0 [+0.0, +0.0] points against ridge, the best free predictor" in end
    assert "both re-ranked by lane, p (Holm) 1.0000." in end
    assert end.endswith("Baseline: long (phase 2 = 2B = 4).")
    dry = dataclasses.replace(STORY, winner=None, is_enabled=False)
    assert "Baseline: none yet (no phase); a dry run: no alias was changed" in " ".join(
        phases_text(found, dry).split()
    )


def test_the_families_of_the_differences_are_named(found: PhaseComparison) -> None:
    text = phases_text(found, STORY)
    assert "in two families: 2 between phases, 3 against a free predictor" in text


def test_warnings_are_told_for_each_phase(found: PhaseComparison) -> None:
    assert "1, 2, 4: only 30 optimizer steps are planned" in phases_text(found, STORY)


def test_old_gates_are_shown_only_when_asked_for(found: PhaseComparison) -> None:
    assert "old criteria" not in phases_text(found, STORY)
    checks = old_checks(found, read_old_gates())
    page = phases_markdown(found, dataclasses.replace(STORY, checks=checks), "phases.png")
    assert "## The old gates" in page and "FAIL: Hit@5 +8.3, Hit@10 +0.0 points over 1" in page


def test_the_page_links_its_figure(found: PhaseComparison) -> None:
    page = phases_markdown(found, STORY, "phases.png")
    assert page.startswith("# Phases\n") and "![phases](phases.png)" in page
    assert page.endswith("* long becomes the baseline\n")


def test_the_figure_shows_old_and_new_points(found: PhaseComparison) -> None:
    above, below = phase_figure(found, PHASES).axes
    texts = [text.get_text() for text in above.texts]
    assert {"59 % of 1,149", "67 % of 230"} <= set(texts)
    assert {"25.0", "33.3", "100.0"} <= {text.get_text() for text in below.texts}
    assert [tick.get_text() for tick in below.get_xticklabels()] == [
        "1\nctx 100",
        "2\nctx 500",
        "4\nctx 2,000",
    ]


def test_a_kind_is_told_once_with_the_range_of_its_numbers() -> None:
    told = {
        "1": ["only 252 steps (28 an epoch), fewer than 300", "only 1,146 examples: 0.5 of 5,000"],
        "2": ["only 24 steps (3 an epoch), fewer than 300", "best at epoch 1"],
        "2B": ["only 115 steps (14 an epoch), fewer than 300", "only 572 examples: 0.25 of 5,000"],
    }
    assert merged_warnings(told) == [
        "1, 2, 2B: only 24 to 252 steps (3 to 28 an epoch), fewer than 300",
        "1, 2B: only 572 to 1,146 examples: 0.25 to 0.5 of 5,000",
        "2: best at epoch 1",
    ]
    assert merged_warnings({"1": [], "2": []}) == []


def test_a_phase_that_was_told_a_kind_twice_is_named_once() -> None:
    assert merged_warnings({"1": ["best at epoch 1", "best at epoch 1"]}) == ["1: best at epoch 1"]
