"""Run the closed loop once: a lane loses documents, ingestion recovers them, a replay decides.

    python -m benchmarks.loop --bank <bank with lanes> --lane Science --folder data/loop

Two banks are written: `base`, in which the lane keeps only the share --keep of its documents before
the last fifth, drawn by seed, and `pool`, which holds the others. A model is trained on the base,
diagnosed, and evaluated on val; `ingest source=anchored` takes pages of the pool near the answers
that it missed; a second model is trained on the extended bank; `shadow-eval` compares the two on
the same test queries over the extended bank. Finished steps are not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import mlflow
import numpy as np
from numpy.typing import NDArray

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.corpus.ingest import existing_bank, row_names
from lvm.system.seeding import generator
from lvm.tracking import runs

LATE = 0.8  # documents that begin before this share of their sequence can be held back
SEED = 0


def hold_back(bank: Bank, lane: str, keep: float, folder: Path) -> None:
    """Write `pool` and `base` below `folder` unless they exist.

    Raises ValueError for a lane that the bank lacks, for a share that holds back no document, and
    for another bank at either path.
    """
    held_N = held_rows(bank, lane, keep)
    for name, row in (("pool", np.flatnonzero(held_N)), ("base", np.flatnonzero(~held_N))):
        made = f"benchmarks.loop; lane={lane}; keep={keep}; part={name}; sha256={bank.sha256}"
        if (folder / name).exists():
            existing_bank(folder / name, made)
            continue
        rows, dtype = row_names(bank).iloc[row], bank.vectors.dtype.name
        write_bank(folder / name, bank.vectors[row], rows, bank.encoder, made, dtype)


def held_rows(bank: Bank, lane: str, keep: float) -> NDArray[np.bool_]:
    """Return a mask of the rows of the documents that the lane loses; the share `keep` stays."""
    if lane not in bank.lanes:
        raise ValueError(f"lane: {lane!r} is not one of {', '.join(bank.lanes) or 'no lanes'}")
    if not 0 <= keep < 1:
        raise ValueError(f"keep: {keep:g} must be a share from 0 to below 1")
    documents = bank.document_table()
    first_row = documents["first_row"].to_numpy()
    start_N = bank.sequence_start_N()
    size_S = np.bincount(bank.sequence_N)
    place = (first_row - start_N[first_row]) / size_S[documents["sequence"]]
    assert bank.lane_N is not None
    is_early = (bank.lane_N[first_row] == bank.lanes.index(lane)) & (place < LATE)
    early = generator(SEED, "documents held back").permutation(np.flatnonzero(is_early))
    held = early[round(keep * len(early)) :]
    if not len(held):
        raise ValueError(f"keep: {keep:g} of {len(early)} documents of {lane} leaves none to find")
    is_held = np.zeros(len(documents), dtype=bool)
    is_held[held] = True
    return np.repeat(is_held, documents["num_rows"])


def step(folder: Path, name: str, entry: str, **options: Any) -> dict[str, Any]:
    """Run an entry point with its report in `folder`; a finished step only reads its report."""
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
    model = f"models:/lvm/{version}"
    step(folder, "val", "eval", model=model, bank=folder / "base", split="val", controls="false")
    run_id = run_of(folder / "val.json", model, open_bank(folder / "base").sha256)
    client = mlflow.MlflowClient(runs.configure())
    return Path(client.download_artifacts(run_id, "per_query.parquet", str(folder)))


def run_of(report: Path, model: str, bank_sha256: str) -> str:
    """Return the id of the eval that wrote this report of `model` on val of the bank.

    Raises ValueError if the report is of something else, or if no such run of the store wrote it.
    """
    contents = json.loads(report.read_text())
    asked = {"split": "val", "bank_sha256": bank_sha256}
    for name, value in asked.items():
        if contents.get(name) != value:
            raise ValueError(
                f"{report}: its {name} is {contents.get(name)}, not {value}; delete it, run again"
            )
    client = mlflow.MlflowClient(runs.configure())
    everywhere = [one.experiment_id for one in client.search_experiments()]
    query = f"params.report = '{report}' and params.model = '{model}' and params.split = 'val'"
    for run in client.search_runs(everywhere, query):
        try:
            if runs.read_json(run.info.run_id, "report.json") == contents:
                return str(run.info.run_id)
        except ValueError:  # this run ended before it wrote its report
            continue
    where = mlflow.get_tracking_uri()
    raise ValueError(f"{report}: no eval of {model} in {where} wrote it; delete it, run again")


def run_loop(bank: str, lane: str, keep: float, ctx: int, where: Path) -> None:
    """Run the steps that are not finished; raises ValueError for bad input."""
    base, larger = where / "base", where / "larger"
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


@click.command(help=__doc__)
@click.option("--bank", required=True, help="Bank with lanes.")
@click.option("--lane", required=True, help="Lane whose documents are held back.")
@click.option("--keep", default=0.2, show_default=True, help="Share of them that stays.")
@click.option("--ctx", default=500, show_default=True, help="Rows of context.")
@click.option("--folder", default="data/loop", show_default=True, help="Where all is written.")
def main(bank: str, lane: str, keep: float, ctx: int, folder: str) -> None:
    try:
        run_loop(bank, lane, keep, ctx, Path(folder))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except subprocess.CalledProcessError as error:  # the step printed the reason
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
