"""A field of a dataclass as an option: its click type, its range, the word that stands for None."""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

DEFAULT_BANK = "data/bank"
DEFAULT_CTX = 1000
COMPARED = ("hidden", "lr", "seed")
BANK_HELP = "Bank folder or .npz file."
REGISTRY = "lvm"
REGISTRY_HELP = "Registered model of the bank: its versions, its alias baseline."
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

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, str) and not value.strip():
            self.fail(f"{value!r} is not a valid boolean; use true or false.", param, ctx)
        return bool(super().convert(value, param, ctx))


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


def changed(options: Any, omitted: Collection[str]) -> str:
    """Return the options that are not their defaults, as typed, for a run's name: `lr 0.001`.

    Those of COMPARED come first: the run list cuts long names.
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


def check_bank(path: str | None) -> None:
    """Raise ValueError, before any work, if there is no bank at `path`; the default may be made."""
    if path in (None, DEFAULT_BANK) or Path(str(path)).exists():
        return
    raise ValueError(
        f"bank {path}: no such folder or .npz file; make it with `lvm ingest --bank {path}`"
    )


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


class Checked:
    """Options that are checked before any work: the bank is there, the report can be written."""

    def __post_init__(self) -> None:
        check_bank(getattr(self, "bank", None))
        check_report(getattr(self, "report", None))
