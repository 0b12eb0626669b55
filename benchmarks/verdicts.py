"""Verdicts on banks whose limit is known: truth against verdict, over seeds.

`python -m benchmarks.verdicts --seeds 3 --keep <folder>`. Each bank is a chain
x_{t+1} = unit(R x_{t-lag} + noise), R a random rotation; dims and lag decide what helps:

* data: 64 dims, lag 0, which the skip of any width can express; few documents.
* capacity: 64 dims, lag 4, which only the hidden layer sees; many documents, narrow models, so that
  the rank of the map they can express is at most their width.
* saturated: 16 dims, lag 0, learnt from the smallest fraction, with so little noise that the score
  is at its ceiling: below it, cells of 300 steps scatter by half a point.
* unoptimised: the data bank at a hundredth of the learning rate.

The gains of actually training on twice the data and with twice the parameters are printed beside
each verdict. With `--keep` the cells are stored, and a second run trains only new ones.
Shapes: N bank rows, D vector dim, H features.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch
from tabulate import tabulate

from lvm.bank.bank import Bank, write_bank
from lvm.evaluation.metrics import soft_hit_at
from lvm.models.table import build_model
from lvm.studies.scaling_cells import Trainer, divide_queries
from lvm.studies.scaling_grid import Plan, check_data, run_grid
from lvm.studies.scaling_verdict import CAPACITY, DATA, INCONCLUSIVE, NOT_OPTIMISED, SATURATED, K
from lvm.system.seeding import generator
from lvm.system.settings import read_scaling_rules
from lvm.training.config import TrainConfig
from lvm.windows.export import plan_windows

OUTCOMES = ("right", "open", "WRONG")
CTX, DOCUMENT_ROWS, SEQUENCES = 20, 10, 10
MODEL = "res_mlp"
SEEDS = (0, 1)  # the minimum for scaling


@dataclass(frozen=True)
class Truth:
    """A bank and the grid that is trained on it."""

    verdict: str
    dim: int
    num_rows: int
    noise: float
    lag: int
    fractions: tuple[float, ...]
    widths: tuple[int, ...]
    lr: float
    steps: int
    layers: int = 2


FEW, HALF, WHOLE = (0.02, 0.04, 0.08), (0.125, 0.25, 0.5), (0.25, 0.5, 1.0)
TRUTHS = {
    "data": Truth(DATA, 64, 12_000, 1.3, 0, FEW, (8, 16, 64), 7e-2, 500),
    "capacity": Truth(CAPACITY, 64, 12_000, 0.7, 4, WHOLE, (2, 4, 8), 1e-1, 800, layers=1),
    "saturated": Truth(SATURATED, 16, 12_000, 0.3, 0, HALF, (4, 16, 64), 8e-2, 300),
}
TRUTHS["unoptimised"] = replace(TRUTHS["data"], verdict=NOT_OPTIMISED, lr=7e-4)


def make_bank(path: Path, truth: Truth, seed: int) -> Bank:
    """Write the chains of one truth."""
    random = generator(seed, "verdicts")
    turn_DD = np.linalg.qr(random.standard_normal((truth.dim, truth.dim)))[0]
    rows = truth.num_rows // SEQUENCES
    vector_SND = _unit(random.standard_normal((SEQUENCES, rows, truth.dim)))
    noise_SND = random.standard_normal(vector_SND.shape) * truth.noise / np.sqrt(truth.dim)
    for row in range(truth.lag + 1, rows):
        source_SD = vector_SND[:, row - 1 - truth.lag]
        vector_SND[:, row] = _unit(source_SD @ turn_DD + noise_SND[:, row])
    row_N = np.arange(SEQUENCES * rows)
    table = pd.DataFrame(
        {
            "sequence": [f"sequence-{row // rows}" for row in row_N],
            "document": [f"document-{row // DOCUMENT_ROWS}" for row in row_N],
        }
    )
    flat_ND = vector_SND.reshape(-1, truth.dim).astype(np.float32)
    origin = {"encoder": "synthetic", "created_by": "benchmarks/verdicts.py"}
    return write_bank(path, flat_ND, table, **origin, dtype="float32", overwrite=True)


def run(truth: Truth, seed: int, folder: Path, really: bool) -> tuple[str, list[str], float]:
    """Return verdict, cells of the table, seconds of one bank."""
    begin = time.monotonic()
    rules = read_scaling_rules()
    bank = make_bank(folder / "bank", truth, seed)
    windows = plan_windows(bank, CTX)
    config = TrainConfig(
        model=MODEL,
        layers=truth.layers,
        dropout=0.0,
        batch_size=25,
        negatives=256,
        precision="fp32",
    )
    queries = divide_queries(bank, windows, rules.choice_share, None)
    trainer = Trainer(bank, windows, queries, config, folder / "cells")
    plan = Plan(truth.fractions, truth.widths, SEEDS, truth.steps, truth.lr)
    check_data(bank, windows, queries, plan, rules)
    scaling = run_grid(trainer, plan, rules)
    print(scaling.verdict.sentence, flush=True)
    if scaling.soft is None:
        return scaling.verdict.name, ["-"] * 4, time.monotonic() - begin
    cells = []
    reals = _real_gains(trainer, plan) if really else ("-", "-")
    for gain, real in zip((scaling.soft.data, scaling.soft.parameters), reals, strict=True):
        cells += [f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]", real]
    return scaling.verdict.name, cells, time.monotonic() - begin


def _real_gains(trainer: Trainer, plan: Plan) -> Iterator[str]:
    """Yield the gain of training on twice the data, then with twice the parameters, in points."""
    fraction, width = plan.fractions[-1], plan.widths[-1]
    wider = _width_of_twice_the_parameters(trainer, width)
    for more in ((2 * fraction, width), (fraction, wider)):
        if more[0] > 1:
            yield "-"
            continue
        means = []
        for f, w in ((fraction, width), more):
            cells = [plan.cell(f, w, seed) for seed in plan.seeds]
            means.append(np.mean([soft_hit_at(trainer.result(c).rank_Q, K).mean() for c in cells]))
        yield f"{100 * (means[1] - means[0]):+.1f}"


def _width_of_twice_the_parameters(trainer: Trainer, width: int) -> int:
    layers, dim = trainer.config.layers, trainer.bank.dim

    def count(hidden: int) -> int:
        sizes = {"model": MODEL, "dim": dim, "hidden": hidden, "layers": layers}
        return sum(p.numel() for p in build_model(sizes).parameters())

    twice = 2 * count(width)
    return min(range(width + 2, 32 * width + 1, 2), key=lambda wider: abs(count(wider) - twice))


@contextmanager
def _folder(keep: Path | None, name: str) -> Iterator[Path]:
    """Yield the folder of one bank, a temporary one if cells are not stored."""
    if keep is not None:
        yield keep / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _unit(vector_SD: np.ndarray) -> np.ndarray:
    return vector_SD / np.linalg.norm(vector_SD, axis=-1, keepdims=True)


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Banks of each truth.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first of them.")
@click.option("--truths", default=",".join(TRUTHS), show_default=True, help="Which of them.")
@click.option("--steps", type=int, help="Optimizer steps, other than each truth's own.")
@click.option("--really/--no-really", default=True, help="Train what the gains foretell, too.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder of banks and cells to keep.")
def main(
    seeds: int, first_seed: int, truths: str, steps: int | None, really: bool, keep: Path | None
) -> None:
    """Print truth against verdict."""
    torch.set_num_threads(1)
    lines, tally = [], Counter[tuple[str, str]]()
    for seed in range(first_seed, first_seed + seeds):
        for name in truths.split(","):
            truth = TRUTHS[name] if steps is None else replace(TRUTHS[name], steps=steps)
            with _folder(keep, f"{name}-{seed}") as folder:
                verdict, cells, seconds = run(truth, seed, folder, really)
            right = {truth.verdict: "right", INCONCLUSIVE: "open"}.get(verdict, "WRONG")
            tally[name, right] += 1
            lines.append([name, seed, verdict, right, *cells, f"{seconds:.0f}"])
            print(tabulate(lines[-1:], tablefmt="plain", disable_numparse=True), flush=True)
    headers = ["truth", "seed", "verdict", "", "twice the data", "really"]
    headers += ["twice the parameters", "really", "seconds"]
    print(tabulate(lines, headers, disable_numparse=True))
    counts = [[name, *(tally[name, one] for one in OUTCOMES)] for name in truths.split(",")]
    print(f"\n{tabulate(counts, ['truth', *OUTCOMES])}")


if __name__ == "__main__":
    main()
