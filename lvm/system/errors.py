"""Refusals in one line of printable characters, however long or strange what they quote."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

MOST = 600  # characters of a refusal
KEPT_AT_THE_END = 200  # what would be right stands there
CUT = " [...] "
# Controls, line separators, overrides of the reading direction, halves of surrogate pairs.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

P = ParamSpec("P")
T = TypeVar("T")


def printable(text: str, kept: str = "") -> str:
    """Write each control character but those in `kept` as its escape, such as \\x1b."""

    def escape(found: re.Match[str]) -> str:
        return found[0] if found[0] in kept else ascii(found[0])[1:-1]

    return CONTROL.sub(escape, text)


def one_line(text: str) -> str:
    """Return `text` as one line of at most MOST printable characters, cut in its middle."""
    line = printable(" ".join(text.split()))
    if len(line) <= MOST:
        return line
    head = MOST - KEPT_AT_THE_END - len(CUT)
    return line[:head] + CUT + line[-KEPT_AT_THE_END:]


def in_one_line(reader: Callable[P, T]) -> Callable[P, T]:
    """Let every ValueError of a reader be one line, see `one_line`."""

    @functools.wraps(reader)
    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return reader(*args, **kwargs)
        except ValueError as error:
            line = one_line(str(error))
            if type(error) is ValueError and line == str(error):
                raise
            raise ValueError(line) from error

    return told
