"""Corpora that are mutated: rows of text in reading order, or a refusal in a line."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import strategies as st

from lvm.corpus.reading import read_corpus
from tests.faults.conftest import Tally
from tests.faults.fuzzing import (
    ODD_TEXTS,
    fuzz,
    in_time,
    is_name,
    mutated_bytes,
    mutated_lines,
    mutated_tree,
    read_or_refused,
)

pytestmark = pytest.mark.faults

PROSE = """# A title of the text #

The first sentence has seven plain words. The second one follows it at once here.

Second title
============

* An item of a list is a sentence, too.
* `code` and **bold** and [a link](http://x) stand in this sentence of prose.

.. note:: A directive holds one sentence of plain words.

Args:
    value (int): What is read by the function of this text.

```
not prose
```

> A quote is one more sentence of the text.
"""
LINES = [
    "#",
    "# #",
    "## \x1b[2J",
    "====",
    "~~~",
    "```",
    ".. code::",
    ":param x: y",
    "* ",
    "+---+",
    "> > a",
]
LINES += ["#" * 3000 + "x", "`" * 3000, "*a " * 900, "[" * 3000, "<a" * 900, ":a" * 900, "\\" * 900]
LINES += ["\u2028", "\x0c", "Returns:", "a : int", "(a) b", "é" * 70, "\t\tx", "\ue000 a b c d e."]
JSONL = [
    {"text": "The first row of the text.", "sequence": "a", "document": "x", "lane": "law"},
    {"text": "The second row of the text.", "sequence": "a", "document": "x", "lane": "law"},
    {"text": "The third row of the text.", "sequence": "b", "document": "y", "lane": ""},
]
ATTACKS = {
    "backticks": "`" * 100_000,
    "open brackets": "[" * 100_000,
    "nested brackets": "[" * 50_000 + "]" * 50_000,
    "open images": "![" * 50_000,
    "inline notes": "^[" * 50_000,
    "open tags": "<a" * 50_000,
    "roles": ":a" * 50_000,
    "stars": "*a " * 33_000,
    "hashes": "# " + "#" * 100_000 + "x",
    "spaces of a field": ":a" + " " * 100_000 + "b",
    "commas of names": "a, " * 33_000,
    "dots": "a." * 50_000,
    "assignments": "a" + ", a" * 33_000,
    "underlines": "=- " * 33_000,
    "citations": "[a" * 50_000,
    "backslashes": "\\ " * 50_000,
    "one word": "a" * 200_000,
}


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def assert_rows(rows: pd.DataFrame) -> None:
    """Assert that rows have texts with names that may be printed."""
    assert {"sequence", "document", "text"} <= set(rows.columns) and len(rows)
    for column in ("sequence", "document", "lane"):
        if column in rows:
            assert all(map(is_name, rows[column]))
    assert rows["sequence"].str.len().min() > 0


@pytest.mark.parametrize("suffix", [".md", ".rst", ".txt"])
def test_mutated_prose(suffix: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / f"text{suffix}"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        rows = read_or_refused(lambda: read_corpus(str(path)).rows, str(path))
        if rows is not None:
            assert_rows(rows)
            assert all(len(text.split()) <= 60 and text.strip() for text in rows["text"])
            if suffix == ".txt":  # no markup is taken away there
                source = raw.decode("utf-8-sig").replace("\ue000", ".")
                assert all(word in source for text in rows["text"] for word in text.split())

    texts = mutated_lines(PROSE, LINES).map(encoded)
    fuzz(tally, "prose", 400, st.one_of(texts, texts, mutated_bytes(PROSE.encode())), check)


def named(value: Any, missing: str) -> str:
    """Return a name as text: null is none, and 1.0 is "1"."""
    if value is None:
        return missing
    whole = int(value) if isinstance(value, float) and value % 1 == 0 else value
    return unicodedata.normalize("NFC", str(whole))


def lines_of(tree: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in tree)


def test_mutated_jsonl(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "text.jsonl"

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        rows = read_or_refused(lambda: read_corpus(str(path)).rows, str(path))
        if rows is not None:
            text = raw.decode("utf-8-sig").replace("\r", "\n")
            told = [json.loads(line) for line in text.split("\n") if line.strip()]
            assert rows["text"].tolist() == [named(line["text"], "") for line in told]
            sequences = [named(line.get("sequence"), path.name) for line in told]
            assert rows["sequence"].tolist() == sequences
            lanes = rows["lane"].tolist() if "lane" in rows else [""] * len(told)
            assert lanes == [named(line.get("lane"), "") for line in told]
            assert all(map(is_name, (*rows["sequence"], *rows["document"], *lanes)))

    odd = json.dumps({"text": "A row \u2028 with a separator."}, ensure_ascii=False).encode()
    fixed = st.sampled_from(
        [b"", b"\n", odd, b"[" * 99_999, b'{"text": "a", "text": "b"}', b"\xff"]
    )
    inputs = st.one_of(mutated_tree(JSONL).map(lines_of), mutated_bytes(lines_of(JSONL)), fixed)
    fuzz(tally, "texts in JSONL", 800, inputs, check)


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_takes_long(attack: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "text.md"
    path.write_text(f"{ATTACKS[attack]}\n\nThe last sentence has seven plain words.\n")
    with tally.injecting("texts against patterns"), in_time():
        read_or_refused(lambda: read_corpus(str(path)).rows, str(path))


def test_odd_names_of_files(tmp_path: Path, tally: Tally) -> None:
    names = [text for text in ODD_TEXTS if text.strip() and "/" not in text and "\x00" not in text]
    for name in names:
        with tally.injecting("names of files"):
            path = tmp_path / f"{name[:200]}.txt"
            path.write_text("The only sentence has seven plain words.")
            rows = read_or_refused(lambda: read_corpus(str(tmp_path)).rows, str(tmp_path))
            assert (rows is not None) == is_name(name)
            path.unlink()
