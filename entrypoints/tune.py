"""Command: search for better settings of a training."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("tune")

from typing import Any

from entrypoints.cli import EntryPoint
from entrypoints.options import TuneOptions
from lvm.studies.tuning import SPACE_FILE, check_name, read_space
from lvm.tracking import datasets, runs
from lvm.tracking.datasets import default_ctx, read_bank
from lvm.tracking.registry import Registry
from lvm.tracking.store import checkout_root
from lvm.tracking.study_runs import replay_seed
from lvm.tracking.tuning_runs import Setup, finish_tuning, run_trials, study_lock
from lvm.training.config import TrainConfig

# Options that every trial trains with, as `train` knows them.
SHARED = ("model", "epochs", "batch_size", "negatives", "seed")


def check(options: TuneOptions) -> None:
    """Raise ValueError on a space or settings that no study can have, and outside a checkout."""
    checkout_root()
    TrainConfig.of_options(shared_of(options))
    if options.study is not None:
        check_name(options.study)
    for name in read_space(options.space or SPACE_FILE):
        if shared_of(options).get(name) is not None:
            raise ValueError(f"{name}: the space varies it; leave it at auto, or omit it there")


def shared_of(options: TuneOptions) -> dict[str, Any]:
    """Return the options of `train` that all trials share and that are not auto."""
    given = {name: getattr(options, name) for name in SHARED}
    return {name: value for name, value in given.items() if value is not None}


def body(options: TuneOptions) -> None:
    """Train trials of the space, each a nested run; register the winner; report what it gained."""
    bank, registry = read_bank(options.bank), Registry(options.registry)
    registry.check_bank(bank)
    datasets.log_bank(bank, "tuning")
    ctx = options.ctx or default_ctx(bank)
    study = options.study or registry.name
    config = TrainConfig.of_options(shared_of(options))
    setup = Setup(study, bank, config, ctx, replay_seed(registry, bank))
    runs.log_config(vars(options) | {"ctx": ctx, "study": study})
    runs.name_run(f"{study} {options.trials} trials")
    with study_lock(study):
        tuning = run_trials(setup, read_space(options.space or SPACE_FILE), options.trials)
        shared = {"bank": options.bank, **shared_of(options)}
        finish_tuning(tuning, setup, registry, shared, options.report)


main = EntryPoint("tune", TuneOptions, body, check)
