"""Command: is a model limited by its data or by its size."""

if __name__ == "__main__":
    from entrypoints import start_command

    start_command()

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrypoints.options import BANK_HELP, REPORT_HELP, EntryPoint, check_report, option
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.metrics import document_interval, figures, soft_hit_at
from lvm.studies.scaling_cells import Trainer, divide_queries
from lvm.studies.scaling_grid import Plan, check_data, lead_over_free, run_grid
from lvm.studies.scaling_verdict import K
from lvm.system.thresholds import read_scaling_rules
from lvm.tracking import runs
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, make_inputs, read_bank
from lvm.tracking.study_runs import finish_scaling, log_cell, print_round
from lvm.training.config import DEVICES, PRECISIONS, TrainConfig, as_dict, resolve

CELLS = Path("data/scaling")
# Models of any width; experts grow from a trained one.
DENSE_MODELS = ("delta_memory", "memory_gru", "transformer", "res_mlp")


@dataclass(frozen=True)
class ScalingOptions:
    """Options of `scaling`; those of `TrainConfig` have its defaults."""

    bank: str = option(DEFAULT_BANK, BANK_HELP)
    ctx: int = option(DEFAULT_CTX, "Rows of context.", low=2)
    windows: str | None = option(None, "Folder of the windows (auto: data/windows/ctx<ctx>).")
    fractions: str = option("0.125,0.25,0.5,1", "Fractions of the train documents, ascending.")
    widths: str = option("128,256,512", "Widths of the model, ascending.")
    seeds: str = option("0,1,2", "Seeds of each cell: documents, weights, batches.")
    model: str = option(TrainConfig.model, "Predictor.", choices=DENSE_MODELS)
    max_steps: int = option(600, "Optimiser steps of each cell.", low=1)
    max_queries: int | None = option(None, "Measured val queries at most (auto: 10,000).", low=1)
    batch_size: int | None = option(TrainConfig.batch_size, "Windows a batch.", low=1)
    lr: float | None = option(TrainConfig.lr, "Peak learning rate.", low=0)
    negatives: int | None = option(TrainConfig.negatives, "Bank negatives a step.", low=0)
    chunk: int = option(TrainConfig.chunk, "Steps of one chunk of the cache.", low=1)
    slots: int = option(TrainConfig.slots, "Slots of the memory.", low=1)
    cell: str = option(TrainConfig.cell, "Recurrent cell.", choices=("gru", "mingru"))
    layers: int | None = option(TrainConfig.layers, "Layers (auto: the model's).", low=1)
    dropout: float = option(TrainConfig.dropout, "Share of states dropped in training.", low=0)
    device: str = option(TrainConfig.device, "Where to train.", choices=DEVICES)
    precision: str = option(TrainConfig.precision, "Arithmetic.", choices=PRECISIONS)
    report: str | None = option(None, REPORT_HELP, unset="none")

    def __post_init__(self) -> None:
        check_report(self.report)
        self.plan(1.0)
        self.config()

    def plan(self, lr: float) -> Plan:
        """Return the sizes of the grid; raises ValueError on a list that cannot be one."""
        return Plan(
            fractions=tuple(_numbers("fractions", self.fractions, float)),
            widths=tuple(_numbers("widths", self.widths, int)),
            seeds=tuple(_numbers("seeds", self.seeds, int)),
            steps=self.max_steps,
            lr=lr,
        )

    def config(self) -> TrainConfig:
        """Return what all cells share."""
        shared = set(as_dict(TrainConfig())) & set(vars(self))
        return TrainConfig(**{name: getattr(self, name) for name in shared})


def body(options: ScalingOptions) -> None:
    """Train a grid of data fractions, widths, seeds; say what limits, with intervals."""
    inputs = make_inputs(read_bank(options.bank), options.ctx, options.windows, "training")
    rules = read_scaling_rules()
    bank, windows = inputs.bank, inputs.windows
    queries = divide_queries(bank, windows, rules.choice_share, options.max_queries)
    settings = resolve(options.config(), windows.ctx)
    plan = options.plan(settings.lr)
    check_data(bank, windows, queries, plan, rules)
    models = fit_free_predictors(bank, windows, seed=windows.seed)
    decay = float(models["ema"].config["decay"])  # type: ignore[index]
    config = TrainConfig(**(as_dict(options.config()) | {"decay": decay}))
    runs.log_config(vars(options) | as_dict(resolve(config, windows.ctx)) | vars(plan))
    runs.set_tags({"model": config.model, "recipe": config.recipe})
    runs.name_run(f"{config.model} ctx {windows.ctx}")
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
        raise ValueError(f"{name}: {text!r} is no list of numbers with commas between") from None


main = EntryPoint("scaling", ScalingOptions, body)

if __name__ == "__main__":
    sys.exit(main())
