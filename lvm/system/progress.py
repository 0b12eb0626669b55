"""Named parts of a command: what it does now, and where its time and its matrix products went.

    with part("fit ema"):
        for block in steps(blocks, "rank", "blocks"):
            ...
            add_products(2 * Q * K * D)

Time inside a part belongs to the innermost one; parts of one name are added up. While `watch` runs,
a line on stderr names the current part every PERIOD seconds; on a terminal, steps are a bar. Parts
begin and end in the main thread.
"""

import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

Result = TypeVar("Result")

PERIOD = 4.0
LOAD, REST = "load libraries", "rest"
SHOWN_SHARE = 0.02  # parts with less of the time are part of the rest of the line


@dataclass
class Spent:
    """Seconds, and the floating-point operations of matrix products."""

    seconds: float = 0.0
    products: float = 0.0


@dataclass
class Ledger:
    """What has been spent on each part so far, and the parts that are open, innermost last."""

    spent: dict[str, Spent] = field(default_factory=dict)
    open_parts: list[tuple[str, float, bool]] = field(default_factory=list)
    bars: list[tqdm] = field(default_factory=list)
    is_silent: bool = False
    since: float = field(default_factory=lambda: time.monotonic())

    def current(self) -> Spent:
        """Return the account of the innermost open part."""
        name = self.open_parts[-1][0] if self.open_parts else REST
        return self.spent.setdefault(name, Spent())

    def settle(self) -> None:
        """Give the time since the last call to the innermost open part."""
        now = time.monotonic()
        self.current().seconds += now - self.since
        self.since = now


_ledger = Ledger()


def silence() -> None:
    """Show nothing from here on: another process speaks for this one."""
    _ledger.is_silent = True


@contextmanager
def part(name: str, is_shown: bool = True) -> Iterator[None]:
    """Account for the block under `name`; no line names it unless `is_shown`."""
    ledger = _ledger
    ledger.settle()
    ledger.open_parts.append((name, time.monotonic(), is_shown))
    try:
        yield
    finally:
        ledger.settle()
        ledger.open_parts.pop()


def add_products(operations: float) -> None:
    """Add the operations of matrix products (2 m n k of one product) to the current part."""
    _ledger.current().products += operations


def count_products(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of `call` with the operations of its matrix products in this thread.

    torch's own FlopCounterMode fails in inference mode, where it looks for gradients.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0.0

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # torch would import its compiler, which takes seconds

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            count = flop_registry.get(func._overloadpacket)
            if count is None:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
            if count is not None:
                self.total += count(*args, **kwargs, out_val=result)
            return result

    with Counter() as counter:
        result = call()
    return result, counter.total


class Steps(tqdm):
    """A bar on a terminal; elsewhere its numbers alone, which `watch` prints."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        is_shown = sys.stderr.isatty() and not _ledger.is_silent
        shown = sys.stderr if is_shown else io.StringIO()
        super().__init__(*arguments, leave=False, delay=0.5, file=shown, **settings)
        if not self.disable and not _ledger.is_silent:
            _ledger.bars.append(self)

    def close(self) -> None:
        if self in _ledger.bars:
            _ledger.bars.remove(self)
        super().close()

    def display(self, *arguments: Any, **settings: Any) -> None:
        if self.fp is sys.stderr:
            super().display(*arguments, **settings)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = tqdm.__hash__


def steps(
    iterable: Iterable[Any] | None = None,
    title: str | None = None,
    unit: str = "steps",
    total: int | None = None,
    initial: int = 0,
) -> Any:
    """Return the iterable as a bar called `title`; with None it is not shown.

    Without an iterable it is a context manager with `update(number)`.
    """
    settings = {"total": total, "initial": initial, "unit": f" {unit}", "disable": title is None}
    return Steps(iterable, desc=title, **settings)


@contextmanager
def watch() -> Iterator[None]:
    """Say what the process does every PERIOD seconds, from its start."""
    reset()
    _ledger.spent[LOAD] = Spent(max(0.0, time.time() - psutil.Process().create_time()))
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(PERIOD):
            line = status_line()
            if line:
                tqdm.write(line, file=sys.stderr)
                sys.stderr.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def status_line() -> str:
    """Return what is done now, how far it is, for how long; "" where a terminal shows a bar."""
    bars, now = list(_ledger.bars), time.monotonic()
    open_parts = list(_ledger.open_parts)
    names = [name for name, _, _ in open_parts]
    if (
        _ledger.is_silent
        or (bars and sys.stderr.isatty())
        or not all(is_shown for _, _, is_shown in open_parts)
    ):
        return ""
    if not bars:
        return f"{': '.join(names)} ({now - open_parts[-1][1]:.0f} s)" if names else ""
    shown = bars[-1].format_dict
    number, unit, seconds = shown["n"], shown["unit"].strip(), shown["elapsed"]
    of_all = f"{number:,} of {shown['total']:,} {unit}" if shown["total"] else f"{number:,} {unit}"
    rate = number / seconds if seconds else 0
    speed = f", {rate:,.{int(rate < 10)}f} a second" if rate >= 1 else ""
    title = bars[-1].desc.removesuffix(": ")
    if names and title.startswith(names[-1].split()[0]):  # "read text: read notes" says it twice
        names.pop()
    names += [] if names and names[-1].startswith(title) else [title]
    return f"{': '.join(names)}: {of_all}{speed} ({seconds:.0f} s)"


def report() -> dict[str, Any]:
    """Return seconds and products in all and of each part, as JSON values."""
    _ledger.settle()
    return {
        "seconds": sum(one.seconds for one in _ledger.spent.values()),
        "products": sum(one.products for one in _ledger.spent.values()),
        "parts": {name: vars(one).copy() for name, one in _ledger.spent.items()},
    }


def merge(parts: Mapping[str, Mapping[str, float]]) -> None:
    """Take over the parts that another process reported while this one waited in a part."""
    own = _ledger.current()
    for name, other in parts.items():
        account = _ledger.spent.setdefault(name, Spent())
        account.seconds += other["seconds"]
        account.products += other["products"]
        own.seconds -= other["seconds"]


def reset() -> None:
    """Forget all parts: a new command begins, or a fork of one."""
    global _ledger
    _ledger = Ledger()


def time_line() -> str:
    """Return the seconds of the parts that took most, in one line."""
    found = report()
    whole = found["seconds"]
    ordered = sorted(found["parts"].items(), key=lambda item: -item[1]["seconds"])
    large = [
        (name, one["seconds"])
        for name, one in ordered
        if name != REST and one["seconds"] >= SHOWN_SHARE * whole
    ]
    large.append((REST, whole - sum(seconds for _, seconds in large)))
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in large)
    tera = 1e-12 * found["products"]
    products = f"; {tera:.1f} TFLOP of products" if tera >= 0.05 else ""
    return f"time: {whole:.0f} s ({listed}{products})"
