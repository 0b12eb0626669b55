"""Tuning: a space of settings in YAML, and the study of trainings in it that Optuna stores.

A study is interrupted and continued at any trial. What a trial is asked depends on the seed and on
the trials before it alone, so an interrupted study equals an uninterrupted one.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from lvm.bank.bank import Bank
from lvm.evaluation.evaluate import evaluate_together
from lvm.evaluation.metrics import Difference, hit_at, paired_difference
from lvm.system.errors import one_line_errors
from lvm.system.settings import STRICT, read_yaml, validated
from lvm.training.config import TrainConfig
from lvm.windows.planning import Windows

SPACE_FILE = Path(__file__).parents[1] / "tune.yaml"
CTX = "ctx"
SIZES = ("hidden", "layers", "slots", "chunk", "batch_size", "accumulation")
WEIGHTS = ("weight_decay", "alpha", "temperature", "focus", "dropout")
OPTIONS = (CTX, "lr", *WEIGHTS, "negatives", "hard_negatives", *SIZES)
DEFAULT_TRIAL = 0
RANDOM_TRIALS = 5  # drawn at random before TPE models the space
MEASURED_TRIALS = 3  # complete ones before pruning begins
FIRST_PRUNED = 2  # the epoch after which a trial is pruned at the earliest
DIGITS = 3  # of a value that is tried, so that its command can be typed
MADE_OF, VALUES, STATE = "made_of", "values", "state"

Space = dict[str, "Range | Choices"]
Distributions = dict[str, BaseDistribution]
Values = dict[str, float | int]


@dataclass(frozen=True, config=STRICT)
class Range:
    """Numbers from `low` to `high`; with `log` evenly over orders of magnitude."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, config=STRICT)
class Choices:
    """Numbers, one of which is tried."""

    choices: list[int | float] = Field(min_length=1)


@one_line_errors
def read_space(path: str | Path = SPACE_FILE) -> Space:
    """Read a space; raises ValueError for an unknown option and a missing or wrong value."""
    contents = read_yaml(Path(path), "space")
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"space {path}: holds no option; see lvm/tune.yaml")
    found: Space = {}
    for name, values in contents.items():
        if name not in OPTIONS:
            raise ValueError(f"space {path}: unknown {name!r}; known: {', '.join(OPTIONS)}")
        where = f"space {path}: {name}"
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {values!r}; give low and high, or choices")
        kind: type[Any] = Choices if "choices" in values else Range
        axis = validated(kind, values, where)
        if isinstance(axis, Range) and not (0 if axis.log else -1) < axis.low < axis.high:
            needed = "low below high" + (", and above 0 for log" if axis.log else "")
            raise ValueError(f"{where} has low {axis.low:g} and high {axis.high:g}; give {needed}")
        found[name] = axis
    return found


def distributions_of(
    space: Space, config: TrainConfig, defaults: Mapping[str, Any], longest: int
) -> Distributions:
    """Return the space for one bank, whose longest context is `longest`.

    `config` is what all trials share, `defaults` the resolved settings of the default with its ctx.
    Raises ValueError for values that no training can have, options that `config` fixes or its model
    lacks, and a range without the default.
    """
    found = {}
    for name, axis in space.items():
        default = defaults[name]
        if default is None:
            raise ValueError(f"space: {name}: the model {config.model} has none; leave it out")
        found[name] = _distribution(name, axis, default, longest)
        if name != CTX:
            for value in _ends(found[name]):
                replace(config, **{name: value})  # raises ValueError that names it
    return found


def _distribution(name: str, axis: Range | Choices, default: Any, longest: int) -> BaseDistribution:
    kind = type(default)
    given = axis.choices if isinstance(axis, Choices) else [axis.low, axis.high]
    if kind is int and any(value != int(value) for value in given):
        raise ValueError(f"space: {name}: {given} must be whole numbers")
    values = [kind(value) for value in given]
    if isinstance(axis, Choices):
        known = [value for value in values if name != CTX or 2 <= value <= longest]
        return CategoricalDistribution(sorted({*known, default}))
    low, high = values
    if not low <= default <= high:
        raise ValueError(f"space: {name}: {low} to {high} must include its default {default}")
    if kind is int:
        return IntDistribution(low, high, log=axis.log)
    return FloatDistribution(low, high, log=axis.log)


def _ends(distribution: BaseDistribution) -> list[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return [distribution.low, distribution.high]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A study with its space; use `open_study`."""

    study: optuna.Study
    distributions: Distributions
    seed: int

    def next_trial(self) -> optuna.Trial:
        """Return the trial that was interrupted, else a new one; the first is the default."""
        for known in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            return optuna.Trial(self.study, known._trial_id)
        number = len(self.study.get_trials(deepcopy=False))
        # A sampler of its own for each trial: one that is made again after an interruption would
        # draw the values of the first trials again.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + number, n_startup_trials=RANDOM_TRIALS
        )
        return self.study.ask()

    def values(self, trial: optuna.Trial) -> Values:
        """Return the settings that a trial trains with, drawn unless they were before."""
        values = {name: _value(trial, name, one) for name, one in self.distributions.items()}
        trial.set_user_attr(VALUES, values)
        return values

    def report(self, trial: optuna.Trial, epoch: int, hit_at_5: float) -> None:
        """Record an epoch; raises optuna.TrialPruned if it is worse than most trials were then."""
        known = self.study.get_trials(deepcopy=False)[trial.number]
        if epoch not in known.intermediate_values:
            trial.report(hit_at_5, epoch)
        if trial.number != DEFAULT_TRIAL and trial.should_prune():
            raise optuna.TrialPruned

    def end(self, trial: optuna.Trial, state: Path, hit_at_5: float) -> None:
        """Record that a trial is complete; delete the state files of all but default and best."""
        trial.set_user_attr(STATE, str(state))
        self.study.tell(trial, hit_at_5)
        for one in self.complete():
            if one.number not in (DEFAULT_TRIAL, self.best().number):
                Path(one.user_attrs[STATE]).unlink(missing_ok=True)

    def drop(self, trial: optuna.Trial, state: Path, outcome: TrialState) -> None:
        """Record that a trial is pruned or failed; delete its state file."""
        self.study.tell(trial, state=outcome)
        state.unlink(missing_ok=True)

    def ended(self) -> list[FrozenTrial]:
        """Return the trials that ended, pruned and failed ones among them."""
        return [one for one in self.study.get_trials(deepcopy=False) if one.state.is_finished()]

    def complete(self) -> list[FrozenTrial]:
        """Return the trials that trained to their end."""
        return [one for one in self.ended() if one.state == TrialState.COMPLETE]

    def best(self) -> FrozenTrial:
        """Return the complete trial of the best val Hit@5, the first of equals."""
        return max(self.complete(), key=lambda one: (one.value, -one.number))

    def importance(self) -> dict[str, float]:
        """Return the share of each option in the variance of val Hit@5 over the complete trials.

        By fANOVA (Hutter, Hoos, Leyton-Brown, ICML 2014), the largest first; empty where the
        complete trials are too few or too alike.
        """
        if len({one.value for one in self.complete()}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.seed)
        found = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}


@dataclasses.dataclass(frozen=True)
class Gain:
    """Default, winner and the best free predictor on the same queries of a split.

    `reports` are those of their evaluations by name, `free` that of the free one; `plain` and
    `corrected` are the differences of Hit@5, winner - default, paired by query.
    """

    split: str
    free: str
    reports: dict[str, dict[str, Any]]
    plain: Difference
    corrected: Difference


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A finished study: what was tried, the winner's run and version, what is left of its gain.

    `gains` is empty where the default itself is the winner.
    """

    name: str
    trials: list[FrozenTrial]
    best: FrozenTrial
    importance: dict[str, float]
    gains: tuple[Gain, ...]
    command: str
    run_id: str
    version: str

    @property
    def left(self) -> float | None:
        """Return the share of the gain on val that is left on test; None without a gain."""
        val, test = (one.plain.mean for one in self.gains) if self.gains else (0.0, 0.0)
        return test / val if val > 0 else None


def measure_gain(
    split: str,
    subjects: Mapping[str, tuple[nn.Module, Windows]],
    bank: Bank,
    max_queries: int,
) -> Gain:
    """Ask all the first queries of a split, each with its own windows.

    `subjects` are the default, the winner and a free predictor, in this order. Windows of one bank
    and seed have the same queries, whatever their ctx.
    """
    measured = []
    for name, (model, windows) in subjects.items():
        queries = windows.queries[split].head(max_queries)
        measured += evaluate_together({name: model}, bank, windows, queries, windows.seed)
    default, winner, free = measured
    target_row_Q = default.per_query["target_row"].to_numpy()
    assert (target_row_Q == winner.per_query["target_row"]).all()
    document_Q = bank.document_N[target_row_Q]

    def gain(order: str) -> Difference:
        hit_Q, before_Q = (hit_at(one.per_query[order], 5) for one in (winner, default))
        return paired_difference(hit_Q, before_Q, document_Q, windows.seed)

    reports = {one.name: one.report for one in measured}
    return Gain(split, free.name, reports, gain("rank"), gain("rank_corrected"))


def check_name(study: str) -> None:
    """Raise ValueError if `study` is not the name of a study."""
    if not re.fullmatch(r"[\w.-]{1,100}", study):
        raise ValueError(
            f"study: {study!r} is not a name; use up to 100 letters, digits, '_', '.', '-'"
        )


def open_study(
    url: str,
    name: str,
    made_of: Mapping[str, Any],
    distributions: Distributions,
    default: Values,
    seed: int,
) -> Tuning:
    """Open the study of this name in the database at `url`, or begin it with the default.

    `made_of` has what a study rests on beside its space, by words for the user. Raises ValueError
    if the study was begun with anything else.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    pruner = optuna.pruners.MedianPruner(MEASURED_TRIALS, FIRST_PRUNED)
    study = optuna.create_study(
        storage=url, study_name=name, pruner=pruner, direction="maximize", load_if_exists=True
    )
    space = {key: optuna.distributions.distribution_to_json(d) for key, d in distributions.items()}
    asked = {"space": space, **made_of}
    if MADE_OF not in study.user_attrs:
        study.set_user_attr(MADE_OF, asked)
    known = study.user_attrs[MADE_OF]
    other = [key for key in asked if known.get(key) != asked[key]]
    if other:
        raise ValueError(
            f"study: {name} was begun with a different {', '.join(other)}; give the same, or "
            "study=<a new name>"
        )
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial({key: default[key] for key in distributions})
    return Tuning(study, distributions, seed)


def _value(trial: optuna.Trial, name: str, one: BaseDistribution) -> float | int:
    if isinstance(one, CategoricalDistribution):
        chosen: Any = trial.suggest_categorical(name, one.choices)
        return chosen
    if isinstance(one, IntDistribution):
        return trial.suggest_int(name, one.low, one.high, log=one.log)
    assert isinstance(one, FloatDistribution)
    return float(f"{trial.suggest_float(name, one.low, one.high, log=one.log):.{DIGITS}g}")
