"""Command: restore the previous baseline."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("rollback")

from dataclasses import asdict

from entrypoints.cli import EntryPoint
from entrypoints.options import RollbackOptions
from lvm.tracking import runs
from lvm.tracking.registry import BASELINE, PREVIOUS, Registry, locked


def body(options: RollbackOptions) -> None:
    """Restore the previous baseline, after a check that its model can be loaded."""
    from lvm.tracking.logged_models import check_previous  # loads torch; the help does not need it

    registry = Registry(options.registry)
    runs.log_config(asdict(options))
    with locked():
        registry.repair()
        check_previous(registry, registry.aliases().get(PREVIOUS))
        restored, withdrawn = registry.rollback({"decision_run": runs.active_run_id()})
    runs.name_run(f"to version {restored}")
    runs.describe_run(f"Version {restored} is the baseline again, instead of {withdrawn}.")
    runs.set_tags({"decision": "rolled back", BASELINE: restored})
    runs.log_artifact({"moves": registry.history()}, "history.json")
    print(f"baseline is version {restored} again; version {withdrawn} is now previous")


main = EntryPoint("rollback", RollbackOptions, body)
