"""What a command prints: no text from a file steers the terminal."""

import io

from entrypoints._options import Printable


def test_controls_are_printed_as_escapes():
    stream = io.StringIO()
    print("a\tb\nc\x1b[2J\rd\u202e", "é", file=Printable(stream), flush=True)
    assert stream.getvalue() == "a\tb\nc\\x1b[2J\\rd\\u202e é\n"


def test_what_else_a_stream_has_is_that_of_the_stream():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    printable = Printable(stream)
    assert printable.encoding == "utf-8" and not printable.isatty()
    assert printable.write("abc") == 3
