"""Commands made from frozen dataclasses: an option a field, one line for a user's mistake."""

import contextlib
import dataclasses
import gc
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import click

from lvm.system import progress
from lvm.system.errors import explain_failure, one_line, printable
from lvm.tracking import runs
from lvm.tracking.store import STORE_ERRORS

Options = TypeVar("Options")
USER_ERRORS = (ValueError, OSError, *STORE_ERRORS)
EXIT_USER_ERROR = 2
BANK_HELP = "Bank folder or .npz file."
REPORT_HELP = "File to write the JSON report to."


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    unset: str = "auto",
) -> Any:
    """Return a dataclass field that becomes a click option.

    `unset` is the word that stands for None; `low` and `high` are inclusive bounds.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "unset": unset}
    return dataclasses.field(default=default, metadata=metadata)


class Finite(click.FloatRange):
    """A float that is neither NaN nor infinite."""

    name = "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Whole(click.IntRange):
    """A whole number."""

    name = "integer"


class Switch(click.types.BoolParamType):
    """True or false in a word; click takes an empty one for false."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | None:
        if isinstance(value, str) and not value.strip():
            self.fail(f"{value!r} is not a valid boolean; use true or false.", param, ctx)
        return super().convert(value, param, ctx)


class OrUnset(click.ParamType):
    """Another type, or the word that stands for None."""

    def __init__(self, inner: click.ParamType, word: str) -> None:
        self.inner, self.word = inner, word
        self.name = f"{inner.name}|{word}"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what the inner type is shown as, then the word as it is typed."""
        inner = self.inner.get_metavar(param, ctx)
        if inner is None:
            return f"{self.inner.name.upper()}|{self.word}"
        return f"{inner.removesuffix(']')}|{self.word}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or value == self.word:
            return None
        try:
            return self.inner.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor the word '{self.word}'.", param, ctx)


class RangedOption(click.Option):
    """An option whose help shows the range of a number beside the word for None, too."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        inner = self.type.inner if isinstance(self.type, OrUnset) else None
        if isinstance(inner, click.IntRange | click.FloatRange):
            shown = inner._describe_range()
            if shown:
                extra["range"] = shown
        return extra


def typed_text(field: dataclasses.Field[Any], value: Any) -> str:
    """Return a value of the field as a user would type it: `auto`, `none`, `true`, `1000`."""
    if value is None:
        return str(field.metadata["unset"])
    return str(value).lower() if isinstance(value, bool) else str(value)


def click_options(options_class: type[Any]) -> list[click.Parameter]:
    """Return one click option per field of the dataclass, of the field's type and default."""
    hints = typing.get_type_hints(options_class)
    return [
        RangedOption(
            [f"--{field.name.replace('_', '-')}", field.name],
            type=_click_type(hints[field.name], field),
            default=typed_text(field, field.default),
            show_default=True,
            help=field.metadata["help"],
        )
        for field in dataclasses.fields(options_class)
    ]


def _click_type(hint: Any, field: dataclasses.Field[Any]) -> click.ParamType:
    if isinstance(hint, types.UnionType):
        (inner,) = (part for part in typing.get_args(hint) if part is not type(None))
        return OrUnset(_click_type(inner, field), field.metadata["unset"])
    if field.metadata["choices"]:
        return click.Choice(field.metadata["choices"])
    low, high = field.metadata["low"], field.metadata["high"]
    scalars: dict[type, click.ParamType] = {
        int: Whole(low, high),
        float: Finite(low, high),
        bool: Switch(),
        str: click.STRING,
    }
    return scalars[hint]


@dataclass(frozen=True)
class EntryPoint(Generic[Options]):
    """A command: the dataclass of its options, the function that does its work in an MLflow run.

    Calling it parses `arguments` (sys.argv if None) and returns the exit code. A user's mistake
    prints one line on stderr, marks the run FAILED with that line and returns exit code 2.
    """

    name: str
    options_class: type[Options]
    body: Callable[[Options], None]

    def command(self) -> click.Command:
        """Return the click command."""
        return click.Command(
            self.name,
            params=click_options(self.options_class),
            callback=self._run,
            help=self.body.__doc__,
        )

    def __call__(self, arguments: list[str] | None = None) -> int:
        if not gc.isenabled():  # see start_command; the exit would collect the imports for 1.4 s
            gc.freeze()
            gc.enable()
        try:
            with contextlib.redirect_stdout(typing.cast(typing.TextIO, Printable(sys.stdout))):
                self.command().main(arguments, f"lvm {self.name}", standalone_mode=False)
        except click.ClickException as error:
            return _refuse(error.format_message())
        except USER_ERRORS as error:
            return _refuse(explain_failure(error))
        return 0

    def _run(self, **values: Any) -> None:
        options = self.options_class(**values)
        fields = dataclasses.fields(self.options_class)  # type: ignore[arg-type]
        typed = {f.name: typed_text(f, values[f.name]) for f in fields}
        with progress.watch(), runs.run(self.name, typed):
            self.body(options)
            runs.log_artifact(progress.report(), runs.SPENT)


class Printable:
    """A text stream that prints any text: what the terminal cannot show becomes an escape.

    So do control characters: names and texts from files must not steer the terminal.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; escape control characters except tab and newline."""
        shown = printable(text, kept="\n\t")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def check_report(path: str | None) -> None:
    """Raise ValueError, before any work, if no report can be written to `path`."""
    if path is None:
        return
    try:
        is_folder = Path(path).is_dir()
        folder = next(one for one in Path(path).absolute().parents if one.exists())
    except OSError as error:  # a name that is too long
        why = f"{error.strerror}; give another file"
        raise ValueError(f"report: {path} cannot be written: {why}") from error
    if is_folder:
        raise ValueError(f"report: {path} is a folder; give a file such as {path}/report.json")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"report: {path} cannot be written, for {folder} {why}; give another file")


def _refuse(reason: str) -> int:
    line = one_line(reason)
    runs.refuse_launched_run(line)
    print(f"error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR
