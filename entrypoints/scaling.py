"""Command: whether a model is limited by its data or by its size."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("scaling")

from dataclasses import replace
from pathlib import Path
from typing import Any

from entrypoints.cli import EntryPoint, changed
from entrypoints.options import ScalingOptions
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.metrics import document_interval, figures, soft_hit_at
from lvm.studies.scaling_cells import Trainer, divide_queries
from lvm.studies.scaling_grid import Plan, check_data, lead_over_free, run_grid
from lvm.studies.scaling_verdict import K
from lvm.system.settings import read_scaling_rules
from lvm.tracking import runs
from lvm.tracking.datasets import make_inputs, read_bank
from lvm.tracking.study_runs import finish_scaling, log_cell, print_round
from lvm.training.config import TrainConfig, as_dict, resolve

CELLS = Path("data/scaling")


def check(options: ScalingOptions) -> None:
    """Raise ValueError for impossible sizes or training settings."""
    plan_of(options, 1.0)
    config_of(options)


def plan_of(options: ScalingOptions, lr: float) -> Plan:
    """Return the sizes of the grid; raises ValueError for a malformed list."""
    return Plan(
        fractions=tuple(_numbers("fractions", options.fractions, float)),
        widths=tuple(_numbers("widths", options.widths, int)),
        seeds=tuple(_numbers("seeds", options.seeds, int)),
        steps=options.max_steps,
        lr=lr,
    )


def config_of(options: ScalingOptions) -> TrainConfig:
    """Return the settings that all cells share."""
    shared = set(as_dict(TrainConfig())) & set(vars(options))
    return TrainConfig(**{name: getattr(options, name) for name in shared})


def body(options: ScalingOptions) -> None:
    """Train a grid of data fractions, widths and seeds; say what limits, with intervals."""
    inputs = make_inputs(read_bank(options.bank), options.ctx, options.windows, "training")
    rules = read_scaling_rules()
    bank, windows = inputs.bank, inputs.windows
    queries = divide_queries(bank, windows, rules.choice_share, options.max_queries)
    settings = resolve(config_of(options), windows.ctx, windows.num_train_rows)
    plan = plan_of(options, settings.lr)
    check_data(bank, windows, queries, plan, rules)
    models = fit_free_predictors(bank, windows, seed=windows.seed)
    decay = float(models["ema"].config["decay"])  # type: ignore[index]
    config = TrainConfig(**(as_dict(config_of(options)) | {"decay": decay}))
    runs.log_config(vars(options) | as_dict(replace(settings, decay=decay)) | vars(plan))
    runs.set_tags({"model": config.model, "recipe": config.recipe})
    typed = changed(options, ("bank", "ctx", "windows", "model", "device", "report"))
    runs.name_run(f"{config.model} ctx {windows.ctx} {typed}".rstrip())
    trainer = Trainer(bank, windows, queries, config, CELLS, print_round)
    free, free_ranks = {}, {name: trainer.measured(model) for name, model in models.items()}
    for name, rank_Q in free_ranks.items():
        interval = document_interval(rank_Q, queries.document_Q, windows.seed)
        soft = float(soft_hit_at(rank_Q, K).mean())
        free[name] = {**figures(rank_Q), "soft": soft, "ci95": interval}
    scaling = run_grid(trainer, plan, rules, lambda kind, result: log_cell(kind, result, inputs))
    lead = lead_over_free(scaling.results[0], free_ranks, queries.document_Q)
    finish_scaling(replace(scaling, lead=lead), plan, free, trainer, options.report)


def _numbers(name: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: {text!r} is not a comma-separated list of numbers") from None


main = EntryPoint("scaling", ScalingOptions, body, check)
