"""The table of results: all predictors, their rivals and the free ones, on one bank.

`make results`, or `python -m benchmarks.results --bank <bank>`. Every rank is exact over the whole
bank; the corrected order follows the plain one, then the second stage of the corrected order
(hybrid where the bank has lanes and texts). Differences are against the moving average in the same
order, paired by query, with the interval by document; with several seeds a query's figure is their
mean. Each predictor's ranks are cached under data/results as soon as it has been measured: the same
command resumes, and a longer list of seeds or models adds to what is there.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn

from benchmarks.parts import Asked
from benchmarks.rivals import RECIPES, train_rival
from lvm.bank.bank import Bank, open_bank
from lvm.evaluation.free_predictors import FREE, fit_free_predictors, tuned_decay
from lvm.evaluation.metrics import figures, hit_at, paired_difference, points, reciprocal_rank_at
from lvm.retrieval.hubness import fit_hubness
from lvm.retrieval.rerank import NONE, possible_reranks, stage_inputs
from lvm.shadow.replay import Questions, measure
from lvm.system.atomic import Entry, cache_key, compute_once
from lvm.training.config import TrainConfig
from lvm.training.loop import train
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Windows

VERSION = 1  # increase when a predictor gives other ranks from the same rows
CACHE = Path("data/results")
AVERAGE = "ema"
VAL_QUERIES = 1000
OURS: dict[str, dict[str, Any]] = {
    "skip": {"model": "skip"},
    "delta_memory": {"model": "delta_memory"},
    # The old system's recipe takes one optimizer step an epoch here; it had layers of this kind.
    "seed": {"model": "memory_gru", "recipe": "seed", "hidden": 192, "layers": 2},
}
MODELS = (*FREE, *OURS, *RECIPES)
ORDERS = {"plain": "rank", "corrected": "rank_corrected", "stage": "rank_corrected_reranked"}
Ranks = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Setting:
    """A bank, its windows, the test queries with the second stage, and its name."""

    bank: Bank
    windows: Windows
    asked: Questions
    rerank: str
    most_epochs: int | None = None  # of a rival

    @classmethod
    def of(cls, path: str, ctx: int, num_queries: int, most_epochs: int | None = None) -> "Setting":
        bank = open_bank(path)
        windows = ensure_windows(bank, ctx)
        queries = windows.queries["test"].head(num_queries)
        rerank = [NONE, *possible_reranks(bank, windows, windows.seed)][-1]
        stage = None
        if rerank != NONE:
            stage = stage_inputs(rerank, bank, windows, queries, windows.seed)
        asked = Questions(bank, windows.representative_N, queries, queries, stage)
        return cls(bank, windows, asked, rerank, most_epochs)

    @property
    def orders(self) -> dict[str, str]:
        """The columns of the orders by their titles."""
        names = {"plain": "plain", "corrected": "corrected", "stage": f"+ {self.rerank}"}
        return {names[key]: ORDERS[key] for key in names if key != "stage" or self.asked.stage}

    def measured(self, name: str, seed: int) -> Entry:
        """Return the ranks of a predictor (Q,) by column, its parameters and minutes; cached."""
        queries = self.asked.queries
        recipe = vars(RECIPES[name]) if name in RECIPES else OURS.get(name, {})
        parts = [VERSION, name, seed, recipe, self.rerank, torch.__version__]
        parts += [self.most_epochs if name in RECIPES else None]
        parts += [self.bank.sha256, self.windows.sha256, queries.ctx, len(queries)]
        key = cache_key(*parts)
        path = CACHE / self.bank.sha256[:12] / f"{name}-{seed}-{key[:12]}.safetensors"
        return compute_once(path, key, lambda: self._measure(name, seed))

    def _measure(self, name: str, seed: int) -> Entry:
        began = time.process_time()
        model, history = self._fitted(name, seed)
        minutes = (time.process_time() - began) / 60
        correction = fit_hubness(model, self.bank, self.windows, self.windows.seed).row_correction
        found = measure(model, self.asked, correction).ranks
        assert found is not None, "predictions are finite"
        ranks = {column: found[column].to_numpy(np.float64) for column in self.orders.values()}
        count = sum(one.numel() for one in model.parameters())
        hit = 100 * hit_at(ranks[ORDERS["corrected"]], 5).mean()
        curve = " ".join(f"{100 * value:.1f}" for value in history)
        click.echo(f"{name} seed {seed}: {minutes:.1f} min, corrected {hit:.1f} %, val {curve}")
        return Entry(ranks, {"parameters": count, "minutes": minutes, "val": history})

    def _fitted(self, name: str, seed: int) -> tuple[nn.Module, list[float]]:
        bank, windows = self.bank, self.windows
        if name in FREE:
            return fit_free_predictors(bank, windows, (name,), windows.seed)[name], []
        val = Asked.of(bank, windows, "val", VAL_QUERIES)

        def validate(model: nn.Module) -> dict[str, float]:
            return figures(val.ranks(model, [None])[0])

        if name in RECIPES:

            def score(model: nn.Module) -> float:
                return validate(model)["hit_at_5"]

            return train_rival(name, bank, windows, seed, score, self.most_epochs)
        config = TrainConfig(**OURS[name], seed=seed, decay=tuned_decay(bank, windows))
        result = train(bank, windows, config, validate=validate)
        return result.model, [record["val/hit_at_5"] for record in result.history]


def table_rows(setting: Setting, found: dict[str, list[Entry]]) -> list[list[Any]]:
    """Return a row for each predictor and order; `found` has the entries of each seed."""
    queries, rows = setting.asked.queries, []
    document_Q = setting.bank.document_N[queries.target_row_Q]
    for name, entries in found.items():
        values = [entry.values for entry in entries]
        sizes = [f"{values[0]['parameters']:,}", f"{np.mean([v['minutes'] for v in values]):.1f}"]
        sizes.append(", ".join(epochs_told(one["val"]) for one in values))
        for order, column in setting.orders.items():
            ranks = [entry.arrays[column] for entry in entries]
            hit_Q = np.mean([hit_at(one_Q, 5) for one_Q in ranks], axis=0)
            average_Q = hit_at(found[AVERAGE][0].arrays[column], 5)
            against = points(paired_difference(hit_Q, average_Q, document_Q, seed=0))
            hits = [f"{100 * np.mean([hit_at(one, k) for one in ranks]):.1f}" for k in (1, 5, 10)]
            mrr = f"{100 * np.mean([reciprocal_rank_at(one) for one in ranks]):.1f}"
            median = f"{np.mean([np.median(one) for one in ranks]):.0f}"
            first = [name, len(entries), *sizes] if order == "plain" else [""] * 5
            shown = "" if name == AVERAGE else against
            rows.append([*first, order, *hits, mrr, median, shown])
    return rows


def epochs_told(history: list[float]) -> str:
    """Return the best epoch and the last one, as in "6 of 9"; they are one if val still rose."""
    return f"{1 + history.index(max(history))} of {len(history)}" if history else ""


HEADERS = ["predictor", "seeds", "parameters", "CPU min", "best epoch", "order"] + [
    "Hit@1 %",
    "Hit@5 %",
    "Hit@10 %",
    "MRR@10 %",
    "median rank",
    "Hit@5 against ema, points",
]


@click.command(help=__doc__)
@click.option("--bank", default="data/public", show_default=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--queries", default=3000, show_default=True, help="Test queries at most.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the trainings.")
@click.option(
    "--epochs", default=None, type=int, help="Epochs of a rival at most; default: its own."
)
@click.option("--models", default=",".join(MODELS), show_default=True, help="Predictors.")
def main(bank: str, ctx: int, queries: int, seeds: str, epochs: int | None, models: str) -> None:
    names = models.split(",")
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        raise click.BadParameter(f"unknown {unknown[0]!r}; known: {', '.join(MODELS)}")
    try:
        setting = Setting.of(bank, ctx, queries, epochs)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found: dict[str, list[Entry]] = {AVERAGE: [setting.measured(AVERAGE, 0)]}
    for seed in map(int, seeds.split(",")):
        for name in names:
            if name not in FREE:
                found.setdefault(name, []).append(setting.measured(name, seed))
            elif name not in found:
                found[name] = [setting.measured(name, 0)]
    num = len(setting.asked.queries)
    target_row_Q = setting.asked.queries.target_row_Q
    documents = len(np.unique(setting.bank.document_N[target_row_Q]))
    click.echo(
        f"bank {setting.bank.sha256[:12]}: {setting.bank.num_rows:,} rows, ctx {ctx}, "
        f"{num:,} test queries from {documents:,} documents, seeds {seeds}"
    )
    ordered = {name: found[name] for name in MODELS if name in found}
    click.echo(tabulate(table_rows(setting, ordered), HEADERS, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
