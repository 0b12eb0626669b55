"""The table of `make test-faults`: fault, times injected, survived, lost."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tabulate import tabulate

PROPERTY = "fault"
LONGEST = ("test_phases_killed_again_and_again_end_in_the_same_page", "test_a_killed_command")


class Tally:
    """Counts the faults that one test injects."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self._record = record

    @contextmanager
    def injecting(self, fault: str, times: int = 1) -> Iterator[None]:
        """Count `times` injections: survived where the block ends well, lost where it raises."""
        try:
            yield
        except BaseException:
            self._record(PROPERTY, (fault, times, False))
            raise
        self._record(PROPERTY, (fault, times, True))


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    return Tally(record_property)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest begin first: at the end they would run alone."""
    items.sort(key=lambda item: [not item.name.startswith(name) for name in LONGEST])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    survived, lost = Counter[str](), Counter[str]()
    for status in ("passed", "failed"):
        for report in terminalreporter.getreports(status):
            for name, value in report.user_properties:
                if name == PROPERTY and report.when == "call":
                    fault, times, well = value
                    (survived if well else lost)[fault] += times
    faults = sorted({*survived, *lost})
    if faults:
        rows = [(f, survived[f] + lost[f], survived[f], lost[f]) for f in faults]
        rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))
        terminalreporter.write_sep("=", "faults")
        terminalreporter.write_line(
            tabulate(rows, ["fault", "times injected", "survived", "lost"], intfmt=",")
        )
