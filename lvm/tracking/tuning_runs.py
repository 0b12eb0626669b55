"""Runs of `tune`: a nested run for each trial, the winner trained as `train` does, the report."""

import hashlib
import shlex
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlflow
from optuna import Trial, TrialPruned
from optuna.trial import TrialState

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import MAX_QUERIES
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.report.studies import (
    settings_text,
    trials_table,
    tuning_figure,
    tuning_parts,
    tuning_report,
)
from lvm.report.tables import MARKDOWN, TEXT
from lvm.studies.tuning import (
    CTX,
    DEFAULT_TRIAL,
    VALUES,
    Gain,
    Space,
    Tuned,
    Tuning,
    Values,
    distributions_of,
    measure_gain,
    open_study,
)
from lvm.tracking import logged_models, runs
from lvm.tracking.datasets import Inputs, log_inputs
from lvm.tracking.registry import Registry
from lvm.tracking.runs import publish_report
from lvm.tracking.store import database_file, project_root
from lvm.tracking.study_runs import find_or_launch, one_at_a_time
from lvm.tracking.training_runs import (
    CHOICE_QUERIES,
    SHOWN_FREE,
    Validation,
    log_epoch,
    prepare_state,
    state_path,
)
from lvm.training.checkpoint import TRAINING_VERSION, training_sha256
from lvm.training.config import Settings, TrainConfig, as_dict, resolve
from lvm.training.loop import TrainResult, train
from lvm.windows.export import ensure_windows, longest_context
from lvm.windows.planning import Windows

DATABASE = "optuna.db"
FIGURE = "importance.png"


@dataclass(frozen=True)
class Setup:
    """What the trials of a study share.

    `config` has what every trial trains with, `ctx` is that of the default, `split_seed` that of
    the windows, which are split by document.
    """

    study: str
    bank: Bank
    config: TrainConfig
    ctx: int
    split_seed: int

    def training(self, values: Mapping[str, Any]) -> tuple[Windows, Settings]:
        """Return the windows and the settings of the training with these values."""
        ctx, others = int(values.get(CTX, self.ctx)), {k: v for k, v in values.items() if k != CTX}
        windows = ensure_windows(self.bank, ctx, split="document", seed=self.split_seed)
        ema = fit_free_predictors(self.bank, windows, ("ema",), windows.seed)["ema"]
        decay = float(ema.config["decay"])  # type: ignore[index]
        chosen = replace(self.config, **others, decay=decay)
        return windows, resolve(chosen, windows.ctx, windows.num_train_rows)

    def open(self, space: Space) -> Tuning:
        """Open the study, or begin it; raises ValueError if it was begun with anything else."""
        windows, settings = self.training({})
        default = as_dict(settings) | {CTX: windows.ctx}
        longest = longest_context(self.bank)
        distributions = distributions_of(space, self.config, default, longest)
        shared = as_dict(self.config)
        made_of = shared | {"bank": self.bank.sha256, "windows": windows.sha256, CTX: self.ctx}
        made_of |= {"version of lvm's training": TRAINING_VERSION}
        return open_study(study_url(), self.study, made_of, distributions, default, shared["seed"])


def study_url() -> str:
    """Return the URL of the studies' database: beside the store, or in the project's folder."""
    store = database_file(mlflow.get_tracking_uri())
    folder = project_root() if store is None else store.parent
    return f"sqlite:///{folder / DATABASE}"


def study_lock(study: str) -> AbstractContextManager[None]:
    """Let one process on this machine at a time train trials of a study."""
    key = hashlib.sha256(f"{study_url()} {study}".encode()).hexdigest()
    return one_at_a_time(key, f"study {study}")


def run_trials(setup: Setup, space: Space, num_trials: int) -> Tuning:
    """Open the study and train until it has `num_trials`, those of earlier runs included."""
    tuning = setup.open(space)
    if tuning.ended():
        print(f"study {setup.study} goes on: {len(tuning.ended())} trials are done", flush=True)
    while len(tuning.ended()) < num_trials:
        run_trial(tuning, setup)
    return tuning


def run_trial(tuning: Tuning, setup: Setup) -> None:
    """Train the next trial as a nested run, from its state file where it was interrupted.

    A training that diverges or does not fit fails its trial alone; the default must succeed.
    """
    trial = tuning.next_trial()
    values = tuning.values(trial)
    name = "default" if trial.number == DEFAULT_TRIAL else f"trial {trial.number}"
    print(f"\n== {name}: {settings_text(values)}", flush=True)
    windows, settings = setup.training(values)
    state = state_path(settings, windows)
    try:
        with runs.child_run(f"{name}: {settings_text(values)}", {"trial": trial.number, **values}):
            runs.set_tags(
                {"study": setup.study, "model": settings.model, "recipe": settings.recipe}
            )
            inputs = log_inputs(setup.bank, windows, "training")
            told = partial(_tell_epoch, tuning, trial, inputs)
            try:
                prepare_state(state, "auto", told)
                result = train_again(inputs, settings, told)
            except TrialPruned:
                runs.set_tags({"pruned": "true"})
                result = None
    except ValueError as error:
        if trial.number == DEFAULT_TRIAL:
            raise
        print(f"{name} failed: {error}", flush=True)
        return tuning.drop(trial, state, TrialState.FAIL)
    if result is None:
        print(f"{name} is pruned: worse than most trials were at this epoch", flush=True)
        return tuning.drop(trial, state, TrialState.PRUNED)
    tuning.end(trial, state, max(record["val/hit_at_5"] for record in result.history))


def train_again(
    inputs: Inputs, settings: Settings, on_epoch: Any = lambda record: None
) -> TrainResult:
    """Train from the state file, which holds all of a training that is finished."""
    return train(
        inputs.bank,
        inputs.windows,
        settings,
        validate=Validation(inputs).figures,
        on_epoch=on_epoch,
        state_path=state_path(settings, inputs.windows),
    )


def _tell_epoch(tuning: Tuning, trial: Trial, inputs: Inputs, record: dict[str, float]) -> None:
    log_epoch(record, inputs)
    tuning.report(trial, int(record["epoch"]), record["val/hit_at_5"])


def finish_tuning(
    tuning: Tuning,
    setup: Setup,
    registry: Registry,
    shared: Mapping[str, Any],
    report_path: str | None,
) -> None:
    """Train the winner as `train` does, measure its gain over the default, publish the report.

    `shared` are the options of `train` that all trials have, as typed. The winner's training goes
    on from the state file of its trial, at whose end that is.
    """
    best = tuning.best()
    values: Values = best.user_attrs[VALUES]
    windows, settings = setup.training(values)
    typed = {**shared, CTX: windows.ctx, **values, "registry": registry.name}
    typed["windows"] = str(windows.folder)
    sha256 = training_sha256(settings, windows)
    done = find_or_launch(registry, f"trial {best.number}", sha256, typed)
    gains: tuple[Gain, ...] = ()
    if best.number != DEFAULT_TRIAL:
        own_windows, own = setup.training(tuning.complete()[0].user_attrs[VALUES])
        default = train_again(log_inputs(setup.bank, own_windows, "training"), own).model
        rivals: dict[str, Any] = done.report["baselines"]
        free = max(rivals, key=lambda name: float(rivals[name]["corrected"]["hit_at_5"]))
        fitted = fit_free_predictors(setup.bank, windows, SHOWN_FREE, windows.seed)[free]
        winner = logged_models.load(f"models:/{done.model_id}").model
        subjects = {"default": (default, own_windows), f"trial {best.number}": (winner, windows)}
        subjects |= {free: (fitted, windows)}
        asked = {"val": CHOICE_QUERIES, "test": MAX_QUERIES}
        gains = tuple(measure_gain(split, subjects, setup.bank, k) for split, k in asked.items())
    command = "mlflow run . -e train " + " ".join(
        f"-P {name}={shlex.quote(str(value))}" for name, value in typed.items()
    )
    tuned = Tuned(
        setup.study,
        tuning.ended(),
        best,
        tuning.importance(),
        gains,
        f"{command} --env-manager local",
        done.run_id,
        done.version,
    )
    publish_tuning(tuned, setup, report_path)


def publish_tuning(tuned: Tuned, setup: Setup, report_path: str | None) -> None:
    """Log figure, page, command, trials and metrics; print the tables; write the report."""
    for one in tuned.trials:
        if one.state == TrialState.COMPLETE:
            runs.log_metrics({"tune/hit_at_5": float(one.value or 0)}, step=one.number + 1)
    for gain in tuned.gains:
        bounds = {"": gain.plain.mean, "_low": gain.plain.low, "_high": gain.plain.high}
        runs.log_metrics({f"tune/{gain.split}_gain{end}": v for end, v in bounds.items()})
    told = {"study": setup.study, "best_trial": tuned.best.number}
    runs.set_tags(told | {"model": setup.config.model, "recipe": setup.config.recipe})
    runs.log_artifact(tuning_figure(tuned), FIGURE)
    runs.log_artifact(tuned.command + "\n", "best_command.txt")
    runs.log_artifact(trials_table(tuned), "trials.json")
    page = "\n\n".join(tuning_parts(tuned, MARKDOWN))
    runs.log_artifact(f"{page}\n\n![importance]({FIGURE})\n", "tuning.md")
    runs.describe_run(page)
    print("\n" + "\n\n".join(tuning_parts(tuned, TEXT)) + "\n", flush=True)
    publish_report(tuning_report(tuned), report_path)
