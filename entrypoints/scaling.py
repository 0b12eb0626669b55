"""Command: whether a model is limited by its data or by its size."""

if __name__ == "__main__":
    from entrypoints.cli import start

    start("scaling")

from dataclasses import replace
from pathlib import Path

from entrypoints.cli import EntryPoint, changed
from entrypoints.options import ScalingOptions
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.studies.scaling_cells import Trainer, divide_queries
from lvm.studies.scaling_grid import Plan, check_data, free_figures, lead_over_free, run_grid
from lvm.system.settings import read_scaling_rules
from lvm.tracking import runs
from lvm.tracking.datasets import make_inputs, read_bank
from lvm.tracking.study_runs import finish_scaling, log_cell, print_round
from lvm.training.config import TrainConfig, as_dict, resolve

CELLS = Path("data/scaling")


def check(options: ScalingOptions) -> None:
    """Raise ValueError for impossible sizes or training settings."""
    plan_of(options, 1.0)
    TrainConfig.of_options(vars(options))


def plan_of(options: ScalingOptions, lr: float) -> Plan:
    """Return the sizes of the grid; raises ValueError for a malformed list."""
    sizes = (options.fractions, options.widths, options.seeds)
    return Plan.parse(*sizes, options.max_steps, lr)


def body(options: ScalingOptions) -> None:
    """Train a grid of data fractions, widths and seeds; say what limits, with intervals."""
    inputs = make_inputs(read_bank(options.bank), options.ctx, options.windows, "training")
    rules = read_scaling_rules()
    bank, windows = inputs.bank, inputs.windows
    queries = divide_queries(bank, windows, rules.choice_share, options.max_queries)
    config = TrainConfig.of_options(vars(options))
    settings = resolve(config, windows.ctx, windows.num_train_rows)
    plan = plan_of(options, settings.lr)
    check_data(bank, windows, queries, plan, rules)
    models = fit_free_predictors(bank, windows, seed=windows.seed)
    decay = float(models["ema"].config["decay"])  # type: ignore[index]
    config = replace(config, decay=decay)
    runs.log_config(vars(options) | as_dict(replace(settings, decay=decay)) | vars(plan))
    runs.set_tags({"model": config.model, "recipe": config.recipe})
    typed = changed(options, ("bank", "ctx", "windows", "model", "device", "report"))
    runs.name_run(f"{config.model} ctx {windows.ctx} {typed}".rstrip())
    trainer = Trainer(bank, windows, queries, config, CELLS, print_round)
    free_ranks = {name: trainer.measured(model) for name, model in models.items()}
    free = free_figures(free_ranks, queries.document_Q, windows.seed)
    scaling = run_grid(trainer, plan, rules, lambda kind, result: log_cell(kind, result, inputs))
    lead = lead_over_free(scaling.results[0], free_ranks, queries.document_Q)
    finish_scaling(replace(scaling, lead=lead), plan, free, trainer, options.report)


main = EntryPoint("scaling", ScalingOptions, body, check)
