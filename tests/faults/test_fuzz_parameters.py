"""Parameters of every entry point with odd values: what was typed, or exit code 2 with a line."""

import contextlib
import dataclasses
import importlib
import io
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import strategies as st

from entrypoints.cli import EntryPoint
from tests.entrypoints.test_mlproject import ENTRIES
from tests.faults.conftest import Tally
from tests.faults.fuzzing import ODD_TEXTS, assert_good_line, fuzz

pytestmark = pytest.mark.faults

NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1e308",
    "1e309",
    "inf",
    "NaN",
    "-0",
    "+5",
    "1_000",
    " 7 ",
    "٣",
]
NUMBERS += ["9" * 30, "9" * 5000, "0x10", "1e3", "1.0", "1,2", "0.5,p40", "p40", "1,1,1", "0,1,2"]
WORDS = [
    "true",
    "FALSE",
    "yes",
    "off",
    "auto",
    "AUTO",
    "none",
    "--bank",
    "-P",
    "dense",
    "lane",
    "@",
]
WORDS += ["models:/lvm@baseline", "models:/", "runs:/x", "graph:", "ontology:x", "a=b", "\udc80"]
VALUES = [*(text for text in ODD_TEXTS if "\x00" not in text), *NUMBERS, *WORDS]
TRUE, FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")


class Parsed(EntryPoint[Any]):
    """An entry point that parses, checks its options, and stops there."""

    def _open(self, options: Any) -> None:
        self.body(options)


def entry(name: str) -> EntryPoint[Any]:
    found = importlib.import_module(f"entrypoints.{name.replace('-', '_')}").main
    assert isinstance(found, EntryPoint)
    return found


def assert_typed(field: dataclasses.Field[Any], hint: Any, text: str, value: Any) -> None:
    """Assert that an option holds what was typed."""
    if value is None:
        assert isinstance(hint, types.UnionType) and text == field.metadata["unset"]
        return
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    assert type(value) is kinds[0]
    if kinds[0] is bool:
        assert text.strip().lower() in (TRUE if value else FALSE)
    elif kinds[0] in (int, float):
        assert value == kinds[0](text) and math.isfinite(value)
        low, high = field.metadata["low"], field.metadata["high"]
        assert (low is None or value >= low) and (high is None or value <= high)
    else:
        assert value == text
        assert not field.metadata["choices"] or value in field.metadata["choices"]


@pytest.mark.parametrize("name", ENTRIES)
def test_odd_parameters(name: str, tally: Tally) -> None:
    real = entry(name)
    fields = {field.name: field for field in dataclasses.fields(real.options_class)}
    hints = typing.get_type_hints(real.options_class)
    if not fields:
        return
    parsed: list[Any] = []
    command = Parsed(real.name, real.options_class, parsed.append, real.check)
    given = st.dictionaries(
        st.sampled_from(sorted(fields)), st.sampled_from(VALUES), min_size=1, max_size=4
    )

    def check(typed: dict[str, str]) -> None:
        parsed.clear()
        arguments = [
            word for key, text in typed.items() for word in (f"--{key.replace('_', '-')}", text)
        ]
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            code = command(arguments)
        if code == 0:
            (options,) = parsed
            for key, text in typed.items():
                assert_typed(fields[key], hints[key], text, getattr(options, key))
            return
        assert code == 2 and not parsed
        line = told.getvalue().removesuffix("\n")
        assert line.startswith("error: ")
        names = {word for key in fields for word in (key, f"--{key.replace('_', '-')}")}
        assert_good_line(line, *names)

    fuzz(tally, "parameters", 60 * len(fields) if len(fields) > 3 else 60, given, check)
