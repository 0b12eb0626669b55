"""Command: set the alias baseline by hand."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("promote")

from dataclasses import asdict

from entrypoints.cli import EntryPoint
from entrypoints.options import PromoteOptions
from lvm.tracking import runs
from lvm.tracking.registry import BASELINE, BY_HAND, Registry


def body(options: PromoteOptions) -> None:
    """Make a version the baseline by hand, without the gates, for a logged reason."""
    assert options.version is not None and options.reason is not None
    from lvm.tracking.logged_models import load  # loads torch, which the help does not need

    runs.log_config(asdict(options))
    registry = Registry(options.registry)
    version = options.version.removeprefix(registry.uri(""))
    current = registry.aliases().get(BASELINE)
    predictor = load(registry.uri(version))
    version = registry.check_version(version)
    evidence = {
        "decision_run": runs.active_run_id(),
        "replaced_version": str(current).lower(),
        "reason": f"by hand: {options.reason}",
    }
    registry.promote(version, current, evidence, BY_HAND)
    runs.name_run(f"version {version}")
    runs.describe_run(f"Version {version} is the baseline, by hand: {options.reason}")
    runs.set_tags({"decision": "promoted by hand", BASELINE: version})
    runs.log_artifact({"moves": registry.history()}, "history.json")
    before = f"before: version {current}" if current is not None else "there was none before"
    print(f"baseline is version {version} ({predictor.facts.model}); {before}")


main = EntryPoint("promote", PromoteOptions, body)
