"""Command: set the alias baseline by hand."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import asdict, dataclass

from entrypoints.options import EntryPoint, option
from lvm.tracking import registry, runs
from lvm.tracking.registry import BASELINE, check_version


@dataclass(frozen=True)
class PromoteOptions:
    """Options of `promote`."""

    version: str | None = option(None, "Version of lvm to promote; needed.", unset="none")
    reason: str | None = option(None, "Why, in a few words; needed.", unset="none")

    def __post_init__(self) -> None:
        if self.version is None:
            raise ValueError("version: none was given; name the version of lvm to promote")
        if self.reason is None:
            raise ValueError("reason: none was given; say why the gates are passed over")


def body(options: PromoteOptions) -> None:
    """Make a version the baseline by hand, passing over the gates, for a logged reason."""
    assert options.version is not None and options.reason is not None
    from lvm.tracking.logged_models import load  # loads torch, which the help does not need

    runs.log_config(asdict(options))
    version = options.version.removeprefix(f"models:/{registry.NAME}/")
    current = registry.aliases().get(BASELINE)
    predictor = load(f"models:/{registry.NAME}/{version}")
    version = check_version(version)
    evidence = {
        "decision_run": runs.active_run_id(),
        "replaced_version": str(current).lower(),
        "reason": f"by hand: {options.reason}",
    }
    registry.promote(version, current, evidence, registry.BY_HAND)
    runs.name_run(f"version {version}")
    runs.describe_run(f"Version {version} is the baseline, by hand: {options.reason}")
    runs.set_tags({"decision": "promoted by hand", BASELINE: version})
    runs.log_artifact({"moves": registry.history()}, "history.json")
    before = f"before: version {current}" if current is not None else "there was none before"
    print(f"baseline is version {version} ({predictor.facts.model}); {before}")


main = EntryPoint("promote", PromoteOptions, body)

if __name__ == "__main__":
    sys.exit(main())
