"""What every command does: options from parsed values, a run around the body, errors in a line."""

import contextlib
import dataclasses
import gc
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import click

from entrypoints import cli
from entrypoints.options.fields import typed_text
from lvm.system import progress
from lvm.system.errors import explain_failure, printable
from lvm.tracking import runs
from lvm.tracking.store import STORE_ERRORS

Options = TypeVar("Options")
USER_ERRORS = (ValueError, OSError, *STORE_ERRORS)


def no_check(options: Any) -> None:
    """Accept every value that the options themselves accept."""


@dataclass(frozen=True)
class EntryPoint(Generic[Options]):
    """A command: the dataclass of its options, the function that does its work in an MLflow run.

    `check` raises ValueError on options that no run needs to be opened for. Calling the entry
    point parses `arguments` (sys.argv if None) and returns the exit code. A user's mistake
    prints one line on stderr, marks the run FAILED with that line and returns exit code 2.
    """

    name: str
    options_class: type[Options]
    body: Callable[[Options], None]
    check: Callable[[Options], None] = no_check

    def __call__(self, arguments: list[str] | None = None) -> int:
        return cli.call(self.command(), f"lvm {self.name}", arguments)

    def command(self) -> click.Command:
        """Return the click command."""
        return cli.command(self.name, self.options_class, self.run)

    def run(self, **values: Any) -> int:
        """Do the work for parsed values; return the exit code."""
        if not gc.isenabled():  # see start_command; the exit would collect the imports for 1.4 s
            gc.freeze()
            gc.enable()
        try:
            with contextlib.redirect_stdout(typing.cast(typing.TextIO, Printable(sys.stdout))):
                options = self.options_class(**values)
                self.check(options)
                self._open(options)
        except USER_ERRORS as error:
            cli.refuse(explain_failure(error))
            return cli.EXIT_USER_ERROR
        return 0

    def _open(self, options: Options) -> None:
        fields = dataclasses.fields(self.options_class)  # type: ignore[arg-type]
        typed = {f.name: typed_text(f, getattr(options, f.name)) for f in fields}
        with runs.run(self.name, typed):
            self.body(options)
            runs.log_artifact(progress.report(), runs.SPENT)
        print(progress.time_line(), file=sys.stderr, flush=True)


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
