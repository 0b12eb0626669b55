"""The description of a version, made of its tags alone."""

import pytest

from lvm.tracking.page import description, figure_tags

FACTS = {
    "model": "memory_gru",
    "kind": "trained",
    "ctx": "500",
    "recipe": "dense",
    "phase": "2B",
    "bank": "data/bank",
    "bank_sha256": "0c848776b00d1234",
    "split": "document",
    "leaky": "False",
}
HITS = dict.fromkeys(("hit_at_1", "hit_at_5", "hit_at_10", "mrr_at_10"), 0.25)
TAGS = figure_tags(HITS, dict.fromkeys(HITS, [0.2, 0.3]), {}, {})


def test_a_version_is_told_with_what_was_measured() -> None:
    told = {f"shadow_{key}": text for key, text in TAGS.items()}
    told |= {"shadow_run": "abcdef0123", "shadow_place": "2 of 7", "shadow_queries": "474"}
    text = description(FACTS | told)
    assert text.startswith("memory_gru (trained), ctx 500, recipe dense, phase 2B; bank data/bank")
    assert "25.0 [20.0, 30.0]" in text and "place 2 of 7 on 474 queries" in text
    assert "[run abcdef01](#/runs/abcdef0123)" in text
    assert "val queries" not in text and "LEAKY" not in text


def test_a_promotion_is_told_with_its_reason() -> None:
    by_hand = {"decision_run": "abcdef0123", "reason": "by hand: it is the only one"}
    text = description(FACTS | by_hand | {"leaky": "True"})
    assert "Took the alias by [run abcdef01](#/runs/abcdef0123): by hand" in text
    assert "LEAKY" in text


@pytest.mark.parametrize(("interval", "cell"), [([None, None], "0.2500 [unknown]")])
def test_an_interval_of_one_document_is_unknown(interval: list[None], cell: str) -> None:
    assert figure_tags(HITS, dict.fromkeys(HITS, interval), {}, {})["hit_at_5"] == cell
    assert TAGS["corrected_hit_at_5"] == "none"
