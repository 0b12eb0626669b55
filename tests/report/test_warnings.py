"""Warnings of several trainings on one line a kind."""

from lvm.report.warnings import merged_warnings


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
