"""Refusals in one line."""

import pytest

from lvm.system.errors import MOST, TAIL_LENGTH, one_line, one_line_errors, printable


def test_controls_are_written_as_escapes() -> None:
    assert printable("a\x1b[2J\x00\x9b\u2028\u202e\ud800é\U0001f600\xa0") == (
        "a\\x1b[2J\\x00\\x9b\\u2028\\u202e\\ud800é\U0001f600\xa0"
    )
    assert printable("a\tb\n\r", kept="\n\t") == "a\tb\n\\r"


def test_a_line_has_one_line_of_bounded_length() -> None:
    assert one_line("a \n\n b\x07") == "a b\\x07"
    line = one_line("begin " + "x" * 10**6 + " " + "e" * (TAIL_LENGTH - 4) + " end")
    assert len(line) == MOST and line.startswith("begin xx") and line.endswith("ee end")
    assert one_line("x" * MOST) == "x" * MOST


def test_a_reader_tells_its_errors_in_one_line() -> None:
    good = ValueError("a good line")

    @one_line_errors
    def read(error: BaseException | None) -> int:
        """Read."""
        if error is not None:
            raise error
        return 7

    assert read(None) == 7 and read.__doc__ == "Read."
    with pytest.raises(ValueError) as caught:
        read(good)
    assert caught.value is good
    for wrong in (ValueError("two\nlines"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x\ny")):
        with pytest.raises(ValueError) as caught:
            read(wrong)
        assert type(caught.value) is ValueError and caught.value.__cause__ is wrong
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyError):
        read(KeyError("no ValueError"))
