"""The memory battery: does a model remember, on drawn banks with known answers?

`python -m benchmarks.memory` trains each model on each bank of `benchmarks.drawn_banks` and prints
Hit@5 as a share of the oracle's, by the rows of context given: the curve has to rise where the
answer comes into reach. Results are stored in a file, so an interrupted run resumes.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from benchmarks.drawn_banks import BANKS, Drawn
from lvm.bank.bank import Bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.metrics import document_interval, hit_at
from lvm.models.predict import predict_queries
from lvm.models.table import FREE_MODELS
from lvm.retrieval.exact import exact_ranks
from lvm.training.config import TrainConfig
from lvm.training.loop import train
from lvm.windows.export import plan_windows
from lvm.windows.planning import Queries, Windows

LENGTHS = (100, 500, 1000, 2000)
TRAINED = {
    "delta_memory": {"model": "delta_memory"},
    "memory_gru": {"model": "memory_gru", "hidden": 128, "layers": 2},
    "memory_gru mingru": {"model": "memory_gru", "hidden": 128, "layers": 2, "cell": "mingru"},
    "transformer": {"model": "transformer", "hidden": 128, "layers": 2},
    "res_mlp": {"model": "res_mlp", "hidden": 128, "layers": 2},
    "skip": {"model": "skip"},
}
FREE = ("ema", "context-mean", "ridge", "context-ridge", "copy-last")
Asked = tuple[Drawn, Bank, Windows]


def asked_queries(drawn: Drawn, windows: Windows, split: str, most: int) -> Queries:
    """Return the queries of `split` with an answer known to the oracle; all if there are none."""
    queries = windows.queries[split]
    known_Q = drawn.reach_N[queries.target_row_Q] > 0
    return queries.take(np.flatnonzero(known_Q if known_Q.any() else ~known_Q)[:most])


def ranks(prediction_QD: Any, queries: Queries, bank: Bank, windows: Windows) -> Any:
    groups = windows.representative_N
    return exact_ranks(prediction_QD.astype(np.float32), queries, bank, groups)[0].rank_Q


def trained(sizes: dict[str, Any], asked: Asked, steps: int) -> nn.Module:
    """Train with the recipe's defaults for `steps` optimizer steps."""
    drawn, bank, windows = asked
    queries = asked_queries(drawn, windows, "val", 500)

    def validate(model: nn.Module) -> dict[str, float]:
        rank_Q = ranks(predict_queries(model, bank, queries), queries, bank, windows)
        return {f"hit_at_{k}": float(hit_at(rank_Q, k).mean()) for k in (1, 5, 10)}

    config = TrainConfig(**sizes, epochs=10_000, patience=10_000, max_steps=steps, negatives=2048)
    return train(bank, windows, config, validate=validate).model


def shares(model: nn.Module, asked: Asked, most: int) -> dict[str, Any]:
    """Return Hit@5 on test as a share of the oracle's, by the rows of context given.

    A query is read with at least that many rows if its sequence has them.
    """
    drawn, bank, windows = asked
    queries = asked_queries(drawn, windows, "test", most)
    answer_QD = drawn.answer_ND[queries.target_row_Q]
    oracle = 1.0
    if answer_QD.any():
        oracle = float(hit_at(ranks(answer_QD, queries, bank, windows), 5).mean())
    found: dict[str, Any] = {"oracle": oracle, "queries": len(queries)}
    for rows in LENGTHS:
        shorter = queries.with_ctx(rows * 5 // 4)
        rank_Q = ranks(predict_queries(model, bank, shorter), queries, bank, windows)
        interval = document_interval(rank_Q, bank.document_N[queries.target_row_Q], 0)
        figures = [float(hit_at(rank_Q, 5).mean()), *interval["hit_at_5"]]
        found[str(rows)] = [figure / oracle for figure in figures]
    return found


def measure(bank_name: str, model_name: str, steps: int, most: int) -> dict[str, Any]:
    """Draw the bank, train or fit the model, return its shares, parameters and seconds."""
    drawn = BANKS[bank_name]()
    with tempfile.TemporaryDirectory() as folder:
        bank = drawn.write(Path(folder) / "bank")
        longest = int(np.bincount(drawn.sequence_N).max())
        asked = drawn, bank, plan_windows(bank, min(2000, longest - 1))
        begin = time.monotonic()
        if model_name in FREE_MODELS:
            model = fit_free_predictors(bank, asked[2], (model_name,))[model_name]
        else:
            model = trained(TRAINED[model_name], asked, steps)
        seconds = time.monotonic() - begin
        found = shares(model, asked, most)
    parameters = sum(p.numel() for p in model.parameters())
    return found | {"seconds": seconds, "parameters": parameters, "steps": steps}


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    """Plot the shares by the rows of context, one panel per bank."""
    banks = list(dict.fromkeys(key.split("/")[0] for key in results))
    columns = min(4, len(banks))
    rows = -(-len(banks) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for place, bank in enumerate(banks):
        axes = figure.add_subplot(rows, columns, place + 1)
        for key, found in results.items():
            if key.split("/")[0] == bank:
                line = [100 * found[str(length)][0] for length in LENGTHS]
                axes.plot(LENGTHS, line, marker="o", label=key.split("/")[1])
        axes.set_title(bank)
        axes.set_xscale("log")
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.minorticks_off()
        axes.set_ylim(-3, 110)
        axes.grid(color="0.9")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6)
    figure.supxlabel("rows of context")
    figure.supylabel("Hit@5, % of the oracle's")
    return figure


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for key, found in results.items():
        bank, model = key.split("/")
        cells = []
        for length in LENGTHS:
            share, low, high = (100 * value for value in found[str(length)])
            cells.append(f"{share:.0f} [{low:.0f}, {high:.0f}]")
        oracle = f"{100 * found['oracle']:.0f}"
        rows.append([bank, model, oracle, *cells, found["parameters"], round(found["seconds"])])
    heads = [f"{length:,} rows" for length in LENGTHS]
    return tabulate(
        rows, ["bank", "model", "oracle Hit@5 %", *heads, "parameters", "seconds"], "github"
    )


@click.command()
@click.option("--banks", default=",".join(BANKS), show_default=True, help="Drawn banks.")
@click.option("--models", default=",".join([*TRAINED, *FREE]), show_default=True, help="Models.")
@click.option("--steps", default=600, show_default=True, help="Optimizer steps of a training.")
@click.option("--queries", default=1500, show_default=True, help="Test queries at most.")
@click.option("--keep", default="build/memory.json", show_default=True, help="File of results.")
def main(banks: str, models: str, steps: int, queries: int, keep: str) -> None:
    """Train each model on each bank; print and plot the shares of the oracle's Hit@5 by context."""
    torch.manual_seed(0)
    path = Path(keep)
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    cells = [(bank, model) for bank in banks.split(",") for model in models.split(",")]
    for bank, model in tqdm(cells, desc="cells", unit="cell", leave=False):
        key = f"{bank}/{model}"
        if key not in results:
            results[key] = measure(bank, model, steps, queries)
            path.write_text(json.dumps(results, indent=1))
            print(table({key: results[key]}).splitlines()[-1], flush=True)
    chosen = {f"{bank}/{model}": results[f"{bank}/{model}"] for bank, model in cells}
    print(table(chosen))
    draw(chosen).savefig(path.with_suffix(".png"), dpi=100)
    print(f"curves: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
