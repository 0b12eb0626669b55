"""The closed loop once: a lane loses train documents, ingestion finds them again, a replay decides.

    python -m benchmarks.loop --bank <bank with lanes> --lane Science --folder data/loop

Two banks are written: `base`, in which the lane keeps only --keep of its documents before the last
fifth, and `pool`, which holds the others. A model is trained on the base, diagnosed, and asked on
val; `ingest source=anchored` takes pages of the pool near the answers that it missed there; a
second model is trained on the extended bank; `shadow-eval` compares the two on the same test
queries over the extended bank. A step that is done already is not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import mlflow
import numpy as np
import pandas as pd

from lvm import tracking
from lvm.bank.store import Bank, open_bank, write_bank

LATE = 0.8  # documents that begin before this share of their sequence can be held back


def hold_back(bank: Bank, lane: str, keep: float, folder: Path) -> None:
    """Write `base`, `pool` below `folder`; raises ValueError for a lane that the bank lacks."""
    if lane not in bank.lanes:
        raise ValueError(f"lane: {lane!r} is not one of {', '.join(bank.lanes)}")
    documents = bank.document_table()
    first_row = documents["first_row"].to_numpy()
    start_N = bank.sequence_start_N()
    size_S = np.bincount(bank.sequence_N)
    place = (first_row - start_N[first_row]) / size_S[documents["sequence"]]
    assert bank.lane_N is not None
    is_early = (bank.lane_N[first_row] == bank.lanes.index(lane)) & (place < LATE)
    kept = np.flatnonzero(is_early)[:: max(1, round(1 / keep))]
    is_held = is_early.copy()
    is_held[kept] = False
    held_N = np.repeat(is_held, documents["num_rows"])
    for name, row in (("base", np.flatnonzero(~held_N)), ("pool", np.flatnonzero(held_N))):
        rows = pd.DataFrame(
            {
                "sequence": np.array(bank.sequences, dtype=object)[bank.sequence_N[row]],
                "document": np.array(bank.documents, dtype=object)[bank.document_N[row]],
                "lane": np.array([*bank.lanes, None], dtype=object)[bank.lane_N[row]],
            }
        )
        texts = bank.texts()
        if texts is not None:
            rows["text"] = texts[row]
        dtype = bank.vectors.dtype.name
        made = f"benchmarks.loop lane={lane} keep={keep} part={name} of {bank.sha256}"
        write_bank(folder / name, bank.vectors[row], rows, bank.encoder, made, dtype)


def step(folder: Path, name: str, entry: str, **options: Any) -> dict[str, Any]:
    """Run an entry point, its report in `folder`; read the report where the step is done."""
    report = folder / f"{name}.json"
    if not report.is_file():
        words = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", f"entrypoints.{entry}", *words, "--report", str(report)]
        print(f"\n$ {' '.join(command[1:])}", flush=True)
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def missed_on_val(folder: Path, version: str) -> Path:
    """Evaluate a version on val; return its per-query table."""
    step(folder, "val", "eval", model=f"models:/lvm/{version}", split="val", controls="false")
    client = mlflow.MlflowClient(tracking.configure())
    (run,) = client.search_runs(["0"], "tags.mlflow.runName = 'eval'", max_results=1)
    return Path(client.download_artifacts(run.info.run_id, "per_query.parquet", str(folder)))


@click.command(help=__doc__)
@click.option("--bank", required=True, help="Bank with lanes.")
@click.option("--lane", required=True, help="Lane whose documents are held back.")
@click.option("--keep", default=0.2, show_default=True, help="Share of them that stays.")
@click.option("--ctx", default=500, show_default=True, help="Rows of context.")
@click.option("--folder", default="data/loop", show_default=True, help="Where all is written.")
def main(bank: str, lane: str, keep: float, ctx: int, folder: str) -> None:
    where = Path(folder)
    base, larger = where / "base", where / "larger"
    if not (where / "pool").exists():
        where.mkdir(parents=True, exist_ok=True)
        hold_back(open_bank(bank), lane, keep, where)
    before = step(where, "before", "train", bank=base, phase="before", ctx=ctx)
    step(where, "lanes", "lane_diagnostics", model=f"models:/lvm/{before['version']}")
    missed = missed_on_val(where, before["version"])
    if not larger.exists():
        words = ["--source", f"anchored:{where / 'pool'}", "--base", str(base), "--lanes", lane]
        words += ["--queries", str(missed), "--bank", str(larger)]
        subprocess.run([sys.executable, "-m", "entrypoints.ingest", *words], check=True)
    after = step(where, "after", "train", bank=larger, phase="after", ctx=ctx)
    versions = f"{before['version']},{after['version']}"
    step(where, "shadow", "shadow_eval", candidates=versions, bank=larger, ctx=ctx)


if __name__ == "__main__":
    main()
