"""Markdown, reStructuredText, HTML: no paragraph is lost, code and its like are left out."""

import pytest

from lvm.corpus.markup import read_sections

SENTENCE = "The last paragraph stays here."
# Constructs after which a reader by line patterns loses the rest of the page.
MARKDOWN = {
    "a span of three backticks": "```run me``` is what you type.",
    "a tilde fence around backticks": "~~~\n```\n~~~",
    "a longer fence around a shorter": "`````\n```\ncode\n`````",
    "backticks in an indented block": "Text before.\n\n    ```\n    code",
    "a fence in a list": "* item\n\n  ```\n  code\n  ```",
    "a fence in a quote": "> ```\n> code",
    "an unclosed emphasis": "**bold [link](",
    "raw HTML": "<div>\n\n*text*\n\n</div>",
    "a comment": "<!-- a\n\nb -->",
    "deep quotes": "> " * 60 + "deep",
    "dollars": "It costs $5, then $6 more.",
    "a table": "| a | b |\n|---|---|\n| c | d |",
}


@pytest.mark.parametrize("before", MARKDOWN.values(), ids=list(MARKDOWN))
def test_a_page_of_markdown_is_read_to_its_end(before: str) -> None:
    sections = read_sections(".md", f"# One\n\n{before}\n\n# Two\n\n{SENTENCE}\n")
    assert [one.title for one in sections] == ["One", "Two"]
    assert sections[1].paragraphs == [SENTENCE]


def test_inline_markup_leaves_its_text() -> None:
    text = (
        "A *b* `c` [d](e) ![f](g) ~~h~~ $i^2$ <b>j</b> k[^1] l\\* &amp; m<br>n  \no\n\n[^1]: Note."
    )
    assert read_sections(".md", text)[0].paragraphs == ["A b c d h i^2 j k l* & m n o", "Note."]


def test_every_footnote_is_read_where_it_stands() -> None:
    notes = "[^x]: First.\n\n    Second.\n\n[^y]: Unused."
    text = f"# a\nOne[^x] two^[An inline note.].\n\n{notes}\n\n# b\nc"
    found = read_sections(".md", text)
    assert found[0].paragraphs == ["One two.", "An inline note.", "First.", "Second.", "Unused."]
    assert found[1].paragraphs == ["c"]


@pytest.mark.parametrize("open_bracket", ["[", "[a", "![", "^[", "[^a"])
def test_very_many_open_brackets_stay_text(open_bracket: str) -> None:
    text = f"{open_bracket * 3000} \\[ [one](/two) three."
    found = read_sections(".md", f"{text}\n\n{SENTENCE}\n")
    assert found[0].paragraphs == [f"{open_bracket * 3000} [ one three.", SENTENCE]


def test_what_is_no_prose_is_left_out() -> None:
    text = (
        "---\ntitle: no\n---\n\n```python\nno\n```\n\n$$\nno\n$$\n\n    no\n\n"
        "<script>no</script>\n\n```{note}\nA note is text.\n```\n\n"
        ":::{tip}\nA tip is text.\n:::\n\n```{code-block}\nno\n```\n"
    )
    assert read_sections(".md", text)[0].paragraphs == ["A note is text.", "A tip is text."]


RST = """
Title
=====

A :func:`~pkg.mod.name`, :doc:`page <to/page>` and :unknown:`role` [1]_ of |this|::

    no code

.. toctree::
   :maxdepth: 1

   no/page

.. seealso:: Another page
   of the same text.

   - with a list

.. versionchanged:: 2.1
   The default is new.

.. py:method:: run(self)
   :noindex:

   Runs the whole thing.

   .. deprecated:: 1.0
      Use the other one.

   :param int size: The size of it.
   :type size: int

.. whatever-box:: Words of a box.

.. code-block:: python
   :linenos:

   no = code

.. math:: no

.. include:: /etc/passwd

.. raw:: html

   <b>no</b>

Broken *emphasis
----------------

| A verse
| on two lines.

term
   Its definition.

.. [1] The footnote.
"""


def test_a_page_of_sphinx_keeps_its_prose() -> None:
    sections = read_sections(".rst", RST)
    assert [one.title for one in sections] == ["Title", "Broken *emphasis"]
    assert sections[0].paragraphs == [
        "A name, page and role of |this|:",
        "Another page of the same text.",
        "with a list",
        "The default is new.",
        "run(self)",
        "Runs the whole thing.",
        "Use the other one.",
        "size: The size of it.",
        "Words of a box.",
    ]
    assert sections[1].paragraphs == [
        "A verse on two lines.",
        "term",
        "Its definition.",
        "The footnote.",
    ]


def test_a_long_line_of_rst_is_read() -> None:
    line = "word " * 5000
    assert read_sections(".rst", line)[0].paragraphs == [line.strip()]


@pytest.mark.parametrize("word", [":a" * 30_000, "`a " * 20_000, "*a " * 20_000])
def test_an_endless_paragraph_of_rst_is_read_as_text(word: str) -> None:
    found = read_sections(".rst", f"{word}\n\n{SENTENCE}\n")[0].paragraphs
    assert "".join(found).replace(" ", "") == f"{word}{SENTENCE}".replace(" ", "")


HTML = """<!DOCTYPE html><html><head><title>no</title><style>no {}</style></head><body>
<nav><p>no</p></nav><div role="navigation">no</div>
Loose text <b>bold</b><!-- no --> on.<p>A paragraph
of <a href="x">two</a> lines.<h1>One<a class="headerlink" href="#one">¶</a></h1>
<ul><li>item <em>a</em><ul><li>inner</li></ul>rest</li></ul><script>no()</script>
<p>verse<br>goes on<br><br>a new one</p><pre>no</pre><table><tr><td>c</td><td>d</td></tr></table>
<h2><code>two()</code></h2><div>text<p>para</p>tail</div><ruby>山<rt>やま</rt></ruby>&eacute;</body>"""


def test_a_page_of_html_has_its_paragraphs_under_its_headings() -> None:
    sections = read_sections(".html", HTML)
    assert [(one.title, one.paragraphs) for one in sections] == [
        ("", ["Loose text bold on.", "A paragraph of two lines."]),
        ("One", ["item a", "inner", "rest", "verse goes on", "a new one", "c", "d"]),
        ("two()", ["text", "para", "tail", "山é"]),
    ]


def test_html_that_is_nested_without_end_is_read_or_refused() -> None:
    def nested(depth: int) -> str:
        return "<div>" * depth + "in the middle" + "</div>" * depth

    assert read_sections(".html", nested(1500))[0].paragraphs == ["in the middle"]
    with pytest.raises(ValueError, match="nested too deeply"):
        read_sections(".html", nested(5000))


# An example of each construct of CommonMark, with the paragraphs that it holds.
COMMONMARK = {
    "tabs": ("-\tone\n\n\ttwo\n", ["one", "two"]),
    "backslash escapes": ("\\*not emphasised\\* \\# \\[x\\]", ["*not emphasised* # [x]"]),
    "entities": ("&copy; &#35; &amp;lt; &nosuch;", ["© # &lt; &nosuch;"]),
    "blocks before spans": ("- `one\n- two`", ["`one", "two`"]),
    "thematic breaks": ("one\n\n***\n\ntwo\n\n_ _ _\n\nthree", ["one", "two", "three"]),
    "no thematic break": ("_____a\n\n--a--", ["_____a", "--a--"]),
    "no ATX heading": ("#hashtag\n\n####### seven", ["#hashtag", "####### seven"]),
    "a break under a quote": ("> one\n\n---\n\ntwo", ["one", "two"]),
    "indented code": ("one\n\n    code\n\n      more\n\ntwo", ["one", "two"]),
    "a paragraph goes on": ("one\n    two\n         three", ["one two three"]),
    "fenced code": ("one\n```` x\n```\n````\ntwo\n~~~\n```\n~~~\nthree", ["one", "two", "three"]),
    "a fence with backticks behind": ("``` a`b\n\ntwo", ["``` a`b", "two"]),
    "an unclosed fence in a quote": ("> ```\n> code\n\ntwo", ["two"]),
    "HTML blocks": ("<table><tr><td>one\n</td></tr></table>\n\ntwo", ["one", "two"]),
    "HTML around Markdown": ("<details>\n\n*one*\n\n</details>", ["one"]),
    "comments and instructions": ("<!-- a\n\nb -->\n\none\n\n<?php\n\n?>\ntwo", ["one", "two"]),
    "reference definitions": ("[a]:\n  /url\n  'title'\n\n[a] and [b]", ["a and [b]"]),
    "a definition in a paragraph": ("one\n[a]: /url", ["one [a]: /url"]),
    "blank lines": ("one\n  \n\t\n\n\ntwo  ", ["one", "two"]),
    "quotes": ("> one\ntwo\n>\n> three\n> > four", ["one two", "three", "four"]),
    "list items": ("1. one\n\n   two\n\n10) three\n- four", ["one", "two", "three", "four"]),
    "an empty item": ("-\n\n  one\n- two\n-\n- three", ["one", "two", "three"]),
    "nested lists": ("* a\n  * b\n    1. c\n\n       > d\n\n* e", list("abcde")),
    "a number goes on": (
        "The year is\n1986. It was long ago.",
        ["The year is 1986. It was long ago."],
    ),
    "code spans": ("`` a`b `` and `c\nd` and ```e", ["a`b and c d and ```e"]),
    "emphasis": ("*a **b** c* _d_ e_f_g **h", ["a b c d e_f_g **h"]),
    "links": ("[a *b*](</c d> 'e') [f][g] [h]\n\n[g]: /i\n[h]: /j", ["a b f h"]),
    "images": ("one ![two](three.png) four", ["one four"]),
    "autolinks": ("<http://a.b> and <me@c.d>", ["http://a.b and me@c.d"]),
    "raw HTML": ("a <b class='x'>b</b> <br/>c < d", ["a b c < d"]),
    "hard breaks": ("one  \ntwo\\\nthree", ["one two three"]),
    "textual content": ("Hello $.;'there, χρῆν  x", ["Hello $.;'there, χρῆν x"]),
}


@pytest.mark.parametrize("construct", COMMONMARK)
def test_no_paragraph_of_markdown_is_lost(construct: str) -> None:
    text, paragraphs = COMMONMARK[construct]
    found = read_sections(".md", f"# One\n\n{text}\n\n# Two\n\n{SENTENCE}\n")
    assert [one.title for one in found] == ["One", "Two"]
    assert found[0].paragraphs == paragraphs and found[1].paragraphs == [SENTENCE]


def test_headings_of_every_form_end_a_section() -> None:
    text = "# a *b* #\none\n\nc\nd\n===\ntwo\n\n   ### `e`\n\nf\n---\n- three\n  # g\n  four"
    found = read_sections(".md", text)
    assert [(one.title, one.paragraphs) for one in found] == [
        ("a b", ["one"]),
        ("c d", ["two"]),
        ("e", []),
        ("f", ["three"]),
        ("g", ["four"]),
    ]


def test_a_reference_to_another_page_of_rst_is_its_title() -> None:
    text = "See `The Title`_, `a page <other.html>`__, `x <gone_>`_, there_ and |this|."
    assert read_sections(".rst", text)[0].paragraphs == [
        "See The Title, a page, x, there and |this|."
    ]
