"""What each part of a model contributes on a bank: several seeds, paired over the same queries.

`python -m benchmarks.parts --bank <bank> --ctx 1000 --seeds 0,1,2` trains the model and
`model=skip` with the defaults, then evaluates on the same test queries: the whole model, the model
without each part, the model with the last 20 rows alone, the skip trained by itself, and the moving
average; plain and corrected.
"""

import time
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn

from lvm.bank.bank import Bank, open_bank
from lvm.evaluation.free_predictors import fit_free_predictors
from lvm.evaluation.metrics import Difference, figures, hit_at, paired_difference, points
from lvm.models.predict import predict_queries
from lvm.models.skip import without
from lvm.retrieval.exact import exact_ranks
from lvm.retrieval.hubness import fit_hubness
from lvm.training.config import TrainConfig
from lvm.training.loop import train
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Queries, Windows

VAL_QUERIES = 2000
FEW_ROWS = 20
Hits = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """The first queries of one split of a bank."""

    bank: Bank
    windows: Windows
    queries: Queries

    @classmethod
    def of(cls, bank: Bank, windows: Windows, split: str, most: int) -> "Asked":
        return cls(bank, windows, windows.queries[split].head(most))

    def ranks(
        self, model: nn.Module, corrections: list[Any], queries: Queries | None = None
    ) -> list[Hits]:
        """Return the ranks under each correction (None: plain)."""
        prediction_QD = predict_queries(model, self.bank, queries or self.queries)
        groups = self.windows.representative_N
        found = exact_ranks(prediction_QD, self.queries, self.bank, groups, corrections)
        return [ranks.rank_Q for ranks in found]

    def both_ranks(self, model: nn.Module, seed: int) -> list[Hits]:
        """Return the plain and the hubness-corrected ranks."""
        correction = fit_hubness(model, self.bank, self.windows, seed).row_correction
        return self.ranks(model, [None, correction])

    def hits(self, model: nn.Module, correction: Any, queries: Queries | None = None) -> list[Hits]:
        """Return the plain and the corrected Hit@5 of each query, each (Q,)."""
        return [hit_at(rank_Q, 5) for rank_Q in self.ranks(model, [None, correction], queries)]

    def difference(self, one_Q: Hits, other_Q: Hits) -> Difference:
        """Return the paired difference of two figures per query, with its interval."""
        document_Q = self.bank.document_N[self.queries.target_row_Q]
        return paired_difference(one_Q, other_Q, document_Q, seed=0)


def trained(bank: Bank, windows: Windows, decay: float, seed: int, **sizes: Any) -> nn.Module:
    """Train with the defaults; the epoch is chosen on a sample of val queries."""
    val = Asked.of(bank, windows, "val", VAL_QUERIES)

    def validate(model: nn.Module) -> dict[str, float]:
        return figures(val.ranks(model, [None])[0])

    begin = time.monotonic()
    config = TrainConfig(**sizes, seed=seed, decay=decay)
    result = train(bank, windows, config, validate=validate)
    curve = " ".join(f"{100 * record['val/hit_at_5']:.1f}" for record in result.history)
    count = sum(p.numel() for p in result.model.parameters())
    seconds = time.monotonic() - begin
    print(f"{config.model} seed {seed}: {count:,} parameters, {seconds:.0f} s, val {curve}")
    return result.model


def parts_of(model: nn.Module, asked: Asked, seed: int) -> dict[str, list[Hits]]:
    """Return the hits of the model, of the model without each part, and with few rows."""
    correction = fit_hubness(model, asked.bank, asked.windows, seed).row_correction
    found = {"full": asked.hits(model, correction)}
    for part in model.ablations:  # type: ignore[union-attr]
        found[f"without {part}"] = asked.hits(without(model, part), correction)  # type: ignore[type-var]
    few = asked.queries.with_ctx(FEW_ROWS)
    found[f"last {FEW_ROWS} rows"] = asked.hits(model, correction, few)
    return found


def compared(name: str, hits: list[list[Hits]], full: list[list[Hits]], asked: Asked) -> list[str]:
    """Return a row of the table: means over seeds, differences of the full model to this one."""
    row = [name]
    for kind in range(2):
        own_Q = np.mean([found[kind] for found in hits], axis=0)
        full_Q = np.mean([found[kind] for found in full], axis=0)
        row.append(f"{100 * own_Q.mean():.2f}")
        row.append(points(asked.difference(full_Q, own_Q)))
    return row


@click.command()
@click.option("--bank", "path", required=True, help="Bank folder.")
@click.option("--ctx", default=1000, show_default=True, help="Rows of context.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of the trainings.")
@click.option("--queries", default=10_000, show_default=True, help="Test queries at most.")
@click.option("--split", default="test", show_default=True, type=click.Choice(["val", "test"]))
@click.option("--model", default=TrainConfig.model, show_default=True, help="The whole model.")
def main(path: str, ctx: int, seeds: str, queries: int, split: str, model: str) -> None:
    """Print what each part of a model contributes on a bank, paired over the same queries."""
    bank = open_bank(path)
    windows = ensure_windows(bank, ctx)
    asked = Asked.of(bank, windows, split, queries)
    ema = fit_free_predictors(bank, windows, ("ema",), windows.seed)["ema"]
    decay = float(ema.config["decay"])  # type: ignore[index]
    hits: dict[str, list[list[Hits]]] = {}
    for seed in map(int, seeds.split(",")):
        whole = trained(bank, windows, decay, seed, model=model)
        skip = trained(bank, windows, decay, seed, model="skip")
        found = parts_of(whole, asked, seed)
        found["skip alone"] = parts_of(skip, asked, seed)["full"]
        for name, own in found.items():
            hits.setdefault(name, []).append(own)
    correction = fit_hubness(ema, bank, windows, windows.seed).row_correction
    hits["moving average"] = [asked.hits(ema, correction)]
    rows = [compared(name, own, hits["full"], asked) for name, own in hits.items()]
    heads = [model, "plain Hit@5 %", "full - this", "corrected Hit@5 %", "full - this"]
    print(f"{split}, {len(asked.queries):,} queries, ctx {ctx}, seeds {seeds}")
    print(tabulate(rows, heads, "github"))


if __name__ == "__main__":
    main()
