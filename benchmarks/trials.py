"""Compare training configs on val, paired with the moving average.

`python -m benchmarks.trials --bank <bank> --ctx 1000 model=memory_gru lr=2e-3,hard_negatives=32`:
each word is one trial, settings of `TrainConfig` with commas between them.
"""

import time
from dataclasses import fields
from typing import Any

import click
import yaml
from tabulate import tabulate
from torch import nn

from benchmarks.parts import Asked
from lvm.bank.bank import open_bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.metrics import figures, hit_at, points
from lvm.training.config import TrainConfig
from lvm.training.loop import train
from lvm.windows.export import ensure_windows

HEADERS = ["trial", "Hit@1 %", "Hit@5 %", "Hit@10 %", "median", "against ema, points"] + [
    "corrected Hit@5 %",
    "against ema, points",
    "best epoch",
    "seconds",
]


def settings(trial: str) -> dict[str, Any]:
    """Parse `name=value,name=value`; values are typed as in YAML."""
    known = {field.name for field in fields(TrainConfig)}
    pairs = dict(pair.split("=", 1) for pair in trial.split(",") if pair)
    unknown = sorted(set(pairs) - known)
    if unknown:
        raise click.BadParameter(f"unknown {unknown[0]!r}; known: {', '.join(sorted(known))}")
    numbers = {"lr", "weight_decay", "alpha", "temperature", "dropout", "hard_from"}
    return {
        name: float(value) if name in numbers else yaml.safe_load(value)
        for name, value in pairs.items()
    }


def row(name: str, asked: Asked, ranks: list[Any], rivals: list[Any], *more: object) -> list[Any]:
    plain, corrected = (figures(rank_Q) for rank_Q in ranks)
    pairs = zip(ranks, rivals, strict=True)
    shown = [points(asked.difference(hit_at(own, 5), hit_at(other, 5))) for own, other in pairs]
    hits = [f"{100 * plain[f'hit_at_{k}']:.2f}" for k in (1, 5, 10)]
    median = f"{plain['median_rank']:.0f}"
    return [name, *hits, median, shown[0], f"{100 * corrected['hit_at_5']:.2f}", shown[1], *more]


@click.command()
@click.option("--bank", "path", required=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--queries", default=10_000, show_default=True, help="Val queries at most.")
@click.argument("trials", nargs=-1, required=True)
def main(path: str, ctx: int, queries: int, trials: tuple[str, ...]) -> None:
    """Train each of TRIALS; print its val figures when it ends, and a table at the end."""
    bank = open_bank(path)
    windows = ensure_windows(bank, ctx)
    asked = Asked.of(bank, windows, "val", queries)
    ema = fit_free_predictors(bank, windows, ("ema",), windows.seed)["ema"]
    rivals = asked.both_ranks(ema, windows.seed)
    decay = float(ema.config["decay"])  # type: ignore[index]
    rows = [row("ema", asked, rivals, rivals, "", "")]

    def validate(model: nn.Module) -> dict[str, float]:
        return figures(asked.ranks(model, [None])[0])

    for trial in trials:
        config = TrainConfig(**{"decay": decay, **settings(trial)})
        begin = time.monotonic()
        result = train(bank, windows, config, validate=validate)
        seconds = round(time.monotonic() - begin)
        ranks = asked.both_ranks(result.model, windows.seed)
        rows.append(row(trial, asked, ranks, rivals, result.best_epoch, seconds))
        curve = " ".join(f"{100 * record['val/hit_at_5']:.2f}" for record in result.history)
        print(f"{trial}: val Hit@5 by epoch {curve}", flush=True)
        print(tabulate(rows[-1:], HEADERS), flush=True)
    print(tabulate(rows, HEADERS))


if __name__ == "__main__":
    main()
