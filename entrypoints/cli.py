"""The command `lvm` and its entry points: options, a run around the work, errors in one line.

The help loads click alone: an entry point, and what it needs of lvm, is imported when it runs.
"""

import contextlib
import dataclasses
import gc
import importlib
import inspect
import math
import os
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from entrypoints import start_command
from entrypoints.options import OPTIONS

Options = TypeVar("Options")

EXIT_USER_ERROR = 2
# Options that lead a run's name: the run list cuts long names.
COMPARED = ("hidden", "lr", "seed")


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
    """True or false as a word; click reads an empty word as false, this refuses it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, str) and not value.strip():
            self.fail(f"{value!r} is not a valid boolean; use true or false.", param, ctx)
        return bool(super().convert(value, param, ctx))


class OrUnset(click.ParamType):
    """A type extended by a word that stands for None."""

    def __init__(self, inner: click.ParamType, word: str) -> None:
        self.inner, self.word = inner, word
        self.name = f"{inner.name}|{word}"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return the metavar of the inner type, then the word."""
        inner = self.inner.get_metavar(param, ctx)
        if inner is None:
            return f"{self.inner.name.upper()}|{self.word}"
        return f"{inner.removesuffix(']')}|{self.word}]"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = self.inner.shell_complete(ctx, param, incomplete)
        return found + [CompletionItem(self.word)] * self.word.startswith(incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or value == self.word:
            return None
        try:
            return self.inner.convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(f"{error.message.rstrip('.')}, nor the word '{self.word}'.", param, ctx)


class RangedOption(click.Option):
    """An option that shows the range of its numbers also if its type is OrUnset."""

    def get_help_extra(self, ctx: click.Context) -> Any:
        extra = super().get_help_extra(ctx)
        inner = self.type.inner if isinstance(self.type, OrUnset) else None
        if isinstance(inner, click.IntRange | click.FloatRange):
            shown = inner._describe_range()
            if shown:
                extra["range"] = shown
        return extra


def typed_text(field: dataclasses.Field[Any], value: Any) -> str:
    """Return a value as a user would type it: `auto`, `none`, `true`, `1000`."""
    if value is None:
        return str(field.metadata["unset"])
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(options: Any, omitted: Collection[str]) -> str:
    """Return the options that differ from their defaults, for the name of a run: `lr 0.001`.

    Those of COMPARED come first.
    """
    typed = {
        field.name: f"{field.name} {typed_text(field, value)}"
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != field.default and field.name not in omitted
    }
    return " ".join(typed[name] for name in dict.fromkeys([*COMPARED, *typed]) if name in typed)


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


class InOrder(click.Group):
    """A group that lists its commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names as they were given."""
        return list(self.commands)


def command(name: str, options_class: type[Any], run: Callable[..., int]) -> click.Command:
    """Return a command that hands its parsed options to `run`, which returns the exit code."""
    options, about = click_options(options_class), inspect.getdoc(options_class)
    return click.Command(name, params=options, callback=run, help=about)


def group() -> click.Group:
    """Return the command `lvm` with a subcommand for every entry point."""
    commands = {name: command(name, one, partial(_run, name)) for name, one in OPTIONS.items()}
    about = "Latent vector models: predict the next text embedding from a long context of them."
    return click.version_option(package_name="lvm")(InOrder("lvm", commands, help=about))


def call(parser: click.Command, name: str, arguments: list[str] | None = None) -> int:
    """Parse `arguments` (None: sys.argv) and do what they say; return the exit code.

    `name` is what the help shows as the command that was typed.
    """
    try:
        return int(parser.main(arguments, name, standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except click.ClickException as error:
        refuse(error.format_message())
    return EXIT_USER_ERROR


def refuse(reason: str) -> None:
    """Print a user's mistake in one line; mark a run opened by `mlflow run` as FAILED with it."""
    from lvm.system.errors import one_line

    line = one_line(reason)
    if "MLFLOW_RUN_ID" in os.environ:
        from lvm.tracking.runs import refuse_launched_run

        refuse_launched_run(line)
    print(f"error: {line}", file=sys.stderr)


def stop_at_signals() -> None:
    """Let a stop signal end this process, even in a collective operation; no run is open."""
    from lvm.system.processes import SIGNALS

    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True)
class EntryPoint(Generic[Options]):
    """A command: its options, and the function that does its work in an MLflow run.

    `check` raises ValueError for options that need no run to be refused. Calling the entry point
    parses `arguments` (sys.argv if None) and returns the exit code. A user's mistake prints one
    line on stderr, marks the run FAILED with that line and returns exit code 2.
    """

    name: str
    options_class: type[Options]
    body: Callable[[Options], None]
    check: Callable[[Options], None] | None = None

    def __call__(self, arguments: list[str] | None = None) -> int:
        return call(self.command(), f"lvm {self.name}", arguments)

    def command(self) -> click.Command:
        """Return the click command."""
        return command(self.name, self.options_class, self.run)

    def run(self, **values: Any) -> int:
        """Do the work for parsed values; return the exit code."""
        from lvm.system.distributed import launched_rank
        from lvm.system.errors import Printable, explain_failure
        from lvm.tracking.store import STORE_ERRORS

        if launched_rank() > 0:
            os.environ.pop("MLFLOW_RUN_ID", None)  # of rank 0
        if not gc.isenabled():  # see start_command; otherwise the exit spends 1.4 s on the imports
            gc.freeze()
            gc.enable()
        try:
            with contextlib.redirect_stdout(typing.cast(typing.TextIO, Printable(sys.stdout))):
                options = self.options_class(**values)
                if self.check is not None:
                    self.check(options)
                self._open(options)
        except (ValueError, OSError, *STORE_ERRORS) as error:
            refuse(explain_failure(error))
            return EXIT_USER_ERROR
        return 0

    def _open(self, options: Options) -> None:
        """Do the work; under torchrun rank 0 does, and the other ranks assist it."""
        from lvm.system.distributed import joined, launched_rank

        if launched_rank() > 0:
            stop_at_signals()
        with joined("cpu") as world, world.assisted() as leads:
            if leads:
                self.lead(options)

    def lead(self, options: Options) -> None:
        """Do the work in an MLflow run."""
        from lvm.system import progress
        from lvm.tracking import runs

        fields = dataclasses.fields(self.options_class)  # type: ignore[arg-type]
        typed = {f.name: typed_text(f, getattr(options, f.name)) for f in fields}
        with runs.run(self.name, typed):
            self.body(options)
            runs.log_artifact(progress.report(), runs.SPENT)
        print(progress.time_line(), file=sys.stderr, flush=True)


def start(*words: str) -> NoReturn:
    """Run `lvm`, or its subcommand `words`, and end the process with its exit code."""
    start_command()
    sys.exit(call(group(), "lvm", [*words, *sys.argv[1:]]))


def _run(name: str, **values: Any) -> int:
    from lvm.system.progress import LOAD, part, watch

    with watch():
        with part(LOAD):
            module = importlib.import_module(f"entrypoints.{name.replace('-', '_')}")
        return int(module.main.run(**values))
