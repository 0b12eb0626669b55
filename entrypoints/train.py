"""Command: train a predictor, log it, register it."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("train")

from dataclasses import replace

from torch import nn

from entrypoints.cli import EntryPoint, changed, stop_at_signals
from entrypoints.options import TrainOptions
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.models.tmd_experts import has_gate
from lvm.studies.phases import decided_by_phase
from lvm.system.distributed import joined, launched_rank, launched_size
from lvm.tracking import runs
from lvm.tracking.datasets import DEFAULT_CTX, default_ctx, make_inputs, read_bank
from lvm.tracking.initial import read_initial
from lvm.tracking.registry import Registry
from lvm.tracking.training_runs import (
    SHOWN_FREE,
    Publication,
    Validation,
    finish_training,
    log_epoch,
    name_training,
    prepare_state,
    state_path,
    train_logged,
)
from lvm.training.checkpoint import training_sha256
from lvm.training.config import TrainConfig, as_dict, chosen_device, resolve
from lvm.training.loop import train
from lvm.windows.export import ensure_windows

# Options that the run's name already shows, or that do not change the result.
NAMED_OTHERWISE = set(
    "bank ctx windows phase model recipe device resume register log_bank registry report".split()
)


def check(options: TrainOptions) -> None:
    """Raise ValueError for an unknown phase, and for settings that no training can have."""
    config_of(options)


def with_phase(options: TrainOptions, default: int = DEFAULT_CTX) -> tuple[TrainOptions, int]:
    """Return the options completed by their phase, and the context length.

    `default` is the context length if neither gives one.
    """
    settings = decided_by_phase(vars(options))
    ctx: int = options.ctx or settings.get("ctx") or default
    return replace(options, **settings | {"ctx": ctx}), ctx


def config_of(options: TrainOptions) -> TrainConfig:
    """Return the training config; what is auto is left to `TrainConfig`."""
    return TrainConfig.of_options(vars(options) | decided_by_phase(vars(options)))


class SharedEntryPoint(EntryPoint[TrainOptions]):
    """Under torchrun all ranks train; rank 0 alone opens a run, validates, logs and writes."""

    def _open(self, options: TrainOptions) -> None:
        if launched_rank() > 0:
            stop_at_signals()
            follow(options)
        else:
            self.lead(options)


def body(options: TrainOptions) -> None:
    """Train a predictor on the train rows of a bank, choosing the epoch by val Hit@5."""
    settings, typed = decided_by_phase(vars(options)), changed(options, NAMED_OTHERWISE)
    if settings:
        words = ", ".join(f"{k} {v}" for k, v in settings.items())
        print(f"phase {options.phase} decides: {words}")
    with joined(chosen_device(options.device)) as world:
        with world.assisted():
            bank, registry = read_bank(options.bank), Registry(options.registry)
            options, ctx = with_phase(options, default_ctx(bank))
            if options.register:
                registry.check_bank(bank)
            inputs = make_inputs(bank, ctx, options.windows, "training")
            validation = Validation(inputs)
            free = fit_free_predictors(inputs.bank, inputs.windows, SHOWN_FREE, inputs.windows.seed)
            started = read_initial(options.init, inputs, registry)
            initial = None if started is None else started.model
            if started is not None:
                started.log(inputs.windows)
            decay = float((initial or free["ema"]).config["decay"])  # type: ignore[index]
            chosen = replace(config_of(options), decay=decay)
            config = resolve(chosen, ctx, inputs.windows.num_train_rows)
            shown = vars(options) | as_dict(config) | {"overlap": inputs.windows.overlap}
            runs.log_config(shown, settings)
            name_training(config, options.phase, ctx, typed)
            runs.set_tags({"training_sha256": training_sha256(config, inputs.windows, initial)})
            state = state_path(config, inputs.windows, launched_size(), initial)
            prepare_state(state, options.resume, lambda record: log_epoch(record, inputs))
            rivals = validation.measure(free)
            print(validation.summary(rivals), flush=True)
            automatic = {k for k, v in vars(options).items() if v in (None, "auto")}
        world.from_main((config, initial, inputs.bank.sha256, inputs.windows.sha256))
        shared = {"world": world, "initial": initial}
        result = train_logged(inputs, config, validation, automatic, state, **shared)
        with world.assisted():
            own = registry if options.register else None
            published = Publication(
                options.phase or "none", own, options.log_bank, options.report, started
            )
            finish_training(inputs, result, rivals, published)
            if has_gate(result.model):
                runs.log_artifact(validation.experts_figure(result.model), "experts.png")
            state.unlink(missing_ok=True)


def follow(options: TrainOptions) -> None:
    """Train as a rank above 0, with the configuration of rank 0, once that has prepared the data.

    Raises ValueError if this process finds other data.
    """
    with joined(chosen_device(options.device)) as world:
        with world.assisted():
            pass
        shared: tuple[TrainConfig, nn.Module | None, str, str] = world.from_main(None)
        config, initial, *digests = shared
        bank = read_bank(options.bank)
        options, ctx = with_phase(options, default_ctx(bank))
        windows = ensure_windows(bank, ctx, options.windows)
        if digests != [bank.sha256, windows.sha256]:
            raise ValueError(f"bank: rank {world.rank} reads other rows or windows than rank 0")
        train(bank, windows, config, validate=lambda model: {}, world=world, initial=initial)
        with world.assisted():
            pass


main = SharedEntryPoint("train", TrainOptions, body, check)
