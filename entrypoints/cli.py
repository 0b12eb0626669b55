"""The command `lvm`: a group of all entry points, each loaded only when it runs."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import click

from entrypoints import start_command
from entrypoints.options import OPTIONS
from entrypoints.options.fields import click_options

EXIT_USER_ERROR = 2


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
    """Print a user's mistake in one line; mark the run that `mlflow run` opened FAILED with it."""
    from lvm.system.errors import one_line

    line = one_line(reason)
    if "MLFLOW_RUN_ID" in os.environ:
        from lvm.tracking.runs import refuse_launched_run

        refuse_launched_run(line)
    print(f"error: {line}", file=sys.stderr)


def start(*words: str) -> NoReturn:
    """Be the process of `lvm`, of its subcommand `words` where it is named."""
    start_command()
    sys.exit(call(group(), "lvm", [*words, *sys.argv[1:]]))


def _run(name: str, **values: Any) -> int:
    from lvm.system.progress import part, watch

    with watch():
        with part("start"):
            module = importlib.import_module(f"entrypoints.{name.replace('-', '_')}")
        return int(module.main.run(**values))
