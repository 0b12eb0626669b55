"""What a command prints: no text from a file steers the terminal; notices are no output."""

import io

import pytest

from lvm.system.errors import Printable
from lvm.tracking import datasets
from lvm.tracking.datasets import DEFAULT_BANK, read_bank
from tests.synthetic import make_bank


def test_controls_are_printed_as_escapes():
    stream = io.StringIO()
    print("a\tb\nc\x1b[2J\rd\u202e", "é", file=Printable(stream), flush=True)
    assert stream.getvalue() == "a\tb\nc\\x1b[2J\\rd\\u202e é\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_the_terminal_cannot_encode_is_printed_as_an_escape(encoding):
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding)
    print("10 % … 数 é 🙂", file=Printable(terminal), flush=True)
    expected = "10 % … 数 é 🙂\n".encode(encoding, "backslashreplace")
    assert raw.getvalue() == expected


def test_what_else_a_stream_has_is_that_of_the_stream():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    printable = Printable(stream)
    assert printable.encoding == "utf-8" and not printable.isatty()
    assert printable.write("abc") == 3


def test_a_default_bank_that_is_made_first_is_told_beside_the_output(tmp_path, monkeypatch, capsys):
    """`predict format=json` prints JSON alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "ingest", lambda source, encoder, path, options: make_bank(tmp_path / path)
    )
    assert read_bank(DEFAULT_BANK).num_rows == 1440
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "data/bank is not there yet: ingesting python-docs\n"
