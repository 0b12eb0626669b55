"""Text that is meant to harm: names, links, patterns."""

import json
import time
from pathlib import Path

import pytest

from lvm.corpus.markup import read_sections
from lvm.corpus.python_docs import paragraphs
from lvm.corpus.reading import read_corpus

SENTENCE = "This is a sentence of seven words."


@pytest.mark.parametrize("text", [":a" * 20_000, ":a" + " " * 40_000 + "b", "<a" * 20_000])
def test_markup_is_read_in_a_moment(text: str) -> None:
    begin = time.process_time()
    paragraphs(text)
    assert time.process_time() - begin < 2


def test_a_field_without_a_name_is_text() -> None:
    assert paragraphs(":param  : The value.") == [":param : The value."]
    assert paragraphs(":param  x: The value.") == ["x: The value."]


def test_a_heading_ends_before_its_hashes() -> None:
    text = "# A #\nx\n## B # C ##  \ny\n# ##\nz"
    assert [title for title, _ in read_sections(".md", text)] == ["A", "B # C", ""]


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path: Path) -> None:
    text = "One \u2028 two \x85 three."
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert read_corpus(str(tmp_path)).rows["text"].tolist() == [text]


def test_odd_names_are_refused_or_escaped(tmp_path: Path) -> None:
    (tmp_path / "a\nb.txt").write_text(SENTENCE)
    with pytest.raises(ValueError, match="holds control characters; rename it") as caught:
        read_corpus(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "a\nb.txt").rename(tmp_path / "a.md")
    (tmp_path / "a.md").write_text(f"# A \x1b[2J\n{SENTENCE}\n# B\n{SENTENCE}\n")
    assert read_corpus(str(tmp_path)).rows["document"].tolist() == ["A \\x1b[2J", "B"]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "document": "a\\u001b"}\n')
    with pytest.raises(ValueError, match="without control characters"):
        read_corpus(str(tmp_path))


def test_a_link_out_of_a_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SENTENCE)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        read_corpus(str(tmp_path / "corpus"))
