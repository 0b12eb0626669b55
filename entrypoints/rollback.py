"""Command: restore the previous baseline."""

import sys
from dataclasses import dataclass

from entrypoints._options import EntryPoint
from lvm import tracking
from lvm.registry import alias
from lvm.registry.alias import BASELINE


@dataclass(frozen=True)
class RollbackOptions:
    """`rollback` has no options."""


def body(options: RollbackOptions) -> None:
    """Give the alias back to the version that had it before."""
    tracking.log_config({})
    restored, withdrawn = alias.rollback({"decision_run": tracking.active_run_id()})
    tracking.name_run(f"to version {restored}")
    tracking.describe_run(f"Version {restored} is the baseline again, instead of {withdrawn}.")
    tracking.set_tags({"decision": "rolled back", BASELINE: restored})
    tracking.log_report({"moves": alias.history()}, "history.json")
    print(f"baseline is version {restored} again; version {withdrawn} is now previous")


main = EntryPoint("rollback", RollbackOptions, body)

if __name__ == "__main__":
    sys.exit(main())
