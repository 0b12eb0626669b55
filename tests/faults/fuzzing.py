"""Mutations of valid files, and the property that every reader of them keeps.

A reader returns what passes an independent check, or raises ValueError in one bounded line that
names the file or the parameter; it never hangs, never takes a gigabyte.
"""

import copy
import math
import resource
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.conftest import Tally

SECONDS = 5.0  # of one core for one input
MEMORY = 2**30
LONGEST = 1000
CONTROLS = ("Cc", "Cs", "Zl", "Zp")
TURNING = "LRE RLE PDF LRO RLO LRI RLI FSI PDI".split()  # the direction in which text is shown

ODD_NUMBERS = [True, False, -1, 0, 1, 2, 0.5, 1e308, -1e308, math.nan, math.inf, 2**63, -(2**63)]
ODD_NUMBERS += [2**31, 10**30, 10**400, 1e-320]
ODD_TEXTS = [
    "",
    " ",
    "0",
    "nan",
    "a\nb",
    "\x1b[2Jx",
    "\x00",
    "\u202eabc",
    "é" * 3,
    "../../x",
    "/etc/x",
]
ODD_TEXTS += ["x" * 50_000, "sequence-0", "true", "~", "none", "auto", "1e3", "$(touch x)", "<b>"]
ODD: list[Any] = [
    None,
    *ODD_NUMBERS,
    *ODD_TEXTS,
    "\ud800",
    [],
    {},
    [None],
    [1, [2]],
    {"a": {"b": 1}},
]


class Hang(BaseException):
    """An input took longer than SECONDS."""


def fuzz(
    tally: Tally,
    reader: str,
    examples: int,
    inputs: st.SearchStrategy,
    check: Callable[[Any], None],
) -> None:
    """Check `examples` inputs; the same ones every time, counted in the tally."""
    num_checked = 0

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def every(one: Any) -> None:
        nonlocal num_checked
        num_checked += 1
        with in_time():
            check(one)

    with tally.injecting(f"fuzzed {reader}", examples), in_memory():
        every()
        assert num_checked >= examples, f"only {num_checked} different inputs"


@contextmanager
def in_time() -> Iterator[None]:
    """Raise Hang after SECONDS of work."""

    def late(*_: object) -> None:
        raise Hang(f"an input took more than {SECONDS:g} s")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, late) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)  # of an input that waits; others may run
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def in_memory() -> Iterator[None]:
    """Assert that the block takes less than MEMORY; what would take far more fails at once."""
    with open("/proc/self/statm") as opened:
        mapped = int(opened.read().split()[0]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY


def read_or_refused(reader: Callable[[], Any], *names: str) -> Any:
    """Return what `reader` returns; None where it refuses in a good line with one of `names`."""
    try:
        return reader()
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        assert_good_line(str(error), *names)
        return None


def assert_good_line(line: str, *names: str) -> None:
    """Assert that a refusal is one printable line of bounded length that names what it is about."""
    assert 0 < len(line) <= LONGEST, line[:LONGEST]
    assert len(line.splitlines()) == 1, repr(line)
    assert not any(map(is_control, line)), repr(line)
    assert any(name in line for name in names), line


def is_name(text: Any) -> bool:
    """Tell whether `text` may be printed as a name."""
    return isinstance(text, str) and not any(map(is_control, text))


def is_control(character: str) -> bool:
    """Tell whether a character does something where it is shown."""
    is_turning = unicodedata.bidirectional(character) in TURNING
    return is_turning or unicodedata.category(character) in CONTROLS


@st.composite
def mutated_tree(draw: st.DrawFn, tree: Any, odd: list[Any] = ODD) -> Any:
    """Return a copy of nested dicts, lists in which one to three things are changed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(tree))
        if not spots:
            return tree
        holder, key = spots[draw(st.integers(0, len(spots) - 1))]
        change = draw(
            st.sampled_from(["odd", "odd", "odd", "drop", "wrap", "nudge", "swap", "add"])
        )
        value = holder[key]
        if change == "drop":
            del holder[key]
        elif change == "wrap":
            holder[key] = draw(st.sampled_from([[value], {"value": value}, str(value)]))
        elif change == "nudge" and isinstance(value, int | float):
            whole = value if abs(value) > 2**1000 else float(value)
            holder[key] = draw(st.sampled_from([value + 1, -value, value * 10, whole]))
        elif change == "swap":
            other, place = spots[draw(st.integers(0, len(spots) - 1))]
            holder[key], other[place] = copy.deepcopy(other[place]), value
        elif change == "add" and isinstance(holder, dict):
            name = draw(st.sampled_from([k for k in ODD_TEXTS if k]))
            holder[name] = copy.deepcopy(draw(st.sampled_from(odd)))
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(odd)))
    return tree


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if _is_list(tree) else ()
    for key in keys:
        yield tree, key
        yield from _spots(tree[key])


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list)


@st.composite
def mutated_bytes(draw: st.DrawFn, raw: bytes, header: int = 0) -> bytes:
    """Return bytes of which some are changed; half of the places lie in the first `header`."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        end = max(0, len(found) - 1)
        if header and draw(st.booleans()):
            end = min(end, header)
        at = draw(st.integers(0, end))
        size = draw(st.sampled_from([1, 1, 2, 4, 8, 64]))
        change = draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "double", "zero"]))
        part = bytes(found[at : at + size])
        if change == "flip" and part:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            found[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif change == "cut":
            del found[at:]
        elif change == "drop":
            del found[at : at + size]
        elif change == "insert":
            found[at:at] = draw(
                st.sampled_from([b"\xff\xfe", b"\x00", b"\n", b'"', b"9" * 30, b"\r"])
            )
        elif change == "double":
            found[at:at] = part * draw(st.sampled_from([1, 50]))
        else:
            found[at : at + size] = bytes(len(part))
    return bytes(found)


@st.composite
def mutated_lines(draw: st.DrawFn, text: str, odd: list[str]) -> str:
    """Return a text of which some lines are dropped, doubled, moved, cut or odd."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        change = draw(
            st.sampled_from(["drop", "double", "move", "cut", "odd", "odd", "join", "inner"])
        )
        line = lines.pop(at) if lines else ""
        if change == "double":
            lines[at:at] = [line, line]
        elif change == "move":
            lines.insert(draw(st.integers(0, len(lines))), line)
        elif change == "cut":
            lines.insert(at, line[: draw(st.integers(0, max(0, len(line) - 1)))])
        elif change == "odd":
            lines[at:at] = [line, draw(st.sampled_from(odd))]
        elif change == "join":
            lines.insert(at, line + (lines.pop(at) if at < len(lines) else ""))
        elif change == "inner":
            place = draw(st.integers(0, len(line)))
            lines.insert(at, line[:place] + draw(st.sampled_from(ODD_TEXTS)) + line[place:])
    return "\n".join(lines)
