"""A hand-made replay of three models, as the phases read it."""

from typing import Any

import numpy as np
import pandas as pd

from lvm.bank.bank import Bank
from lvm.studies.phase_comparison import PhaseComparison, Trained, measure_phases
from lvm.studies.phases import read_phases

NUM_ANSWERS = 1200
NUM_QUERIES = 240


def targets(bank: Bank) -> np.ndarray:
    """Return the rows asked: twenty of each of twelve documents."""
    return np.arange(NUM_QUERIES)


def ranks_table(name: str, bank: Bank, rank: int, every: int, better: int) -> pd.DataFrame:
    """Return ranks of `rank`, each `every`-th of 1; by lane they are `better` smaller."""
    number_Q = np.arange(NUM_QUERIES)
    rank_Q = np.where(number_Q % every == 0, 1.0, float(rank))
    return pd.DataFrame(
        {
            "candidate": name,
            "target_row": targets(bank),
            "rank": rank_Q,
            "rank_raw": rank_Q,
            "rank_reranked": np.maximum(1.0, rank_Q - better),
        }
    )


def training(steps: int, **changes: Any) -> dict[str, Any]:
    """Return the report of a training of three epochs, the second of which was best."""
    losses = (3.0, 2.0, 2.01)
    return {
        "plan": {"examples_per_epoch": 4000, "steps": steps, "steps_per_epoch": steps // 3},
        "optimiser_steps": steps,
        "best_epoch": 2,
        "warnings": [f"only {steps} optimizer steps are planned"],
        "history": [{"epoch": e, "train/loss": loss} for e, loss in enumerate(losses, start=1)],
    } | changes


def replay() -> dict[str, Any]:
    """Return what is read of the replay's report."""
    names = ("short", "long", "ema", "ridge")
    return {
        "best_free": "ema",
        "seed": 0,
        "num_answers": NUM_ANSWERS,
        "num_queries": NUM_QUERIES,
        "num_documents": 12,
        "num_rows": 1440,
        "outcomes": [
            {
                "name": name,
                "kind": "trained" if name in ("short", "long") else "free",
                "leak": None,
                "latency_ms": {"p50": 2.0, "p95": 5.0},
            }
            for name in names
        ],
    }


def trained(name: str, candidate: str, **changes: Any) -> Trained:
    """Return phase `name` of recipe dense, trained as `candidate`."""
    version = {"short": "1", "long": "2"}.get(candidate, "9")
    report = training(30, **changes)
    return Trained(name, name, read_phases()[name], "dense", "run", version, candidate, report)


def per_query(bank: Bank) -> pd.DataFrame:
    """Return the ranks: 1 each third of long, each fourth of the others, each fifth of ridge.

    The rest is 7 for short, long, ridge, 20 for ema; by lane ridge answers all, ema no more.
    """
    tables = [
        ranks_table("short", bank, 7, 4, 3),
        ranks_table("long", bank, 7, 3, 3),
        ranks_table("ema", bank, 20, 4, 3),
        ranks_table("ridge", bank, 7, 5, 2),
    ]
    return pd.concat(tables, ignore_index=True)


def compared(bank: Bank) -> PhaseComparison:
    """Return phases 1, 2, 2B (the same as 2), 4 (2's model by lane) of that replay."""
    runs = [("1", "short"), ("2", "long"), ("2B", "long"), ("4", "long")]
    return measure_phases([trained(*run) for run in runs], replay(), per_query(bank), bank)
