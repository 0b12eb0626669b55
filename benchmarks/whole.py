"""Where the time of whole commands goes, beside the matrix products that they need.

`python -m benchmarks.whole demo` runs `main` (size=quick), `python -m benchmarks.whole headline`
runs `train -P ctx=2000`, each as a user does after `git clone`: in a fresh clone of the committed
checkout, with nothing computed before. `python -m benchmarks.whole large` draws a bank of
637,997 x 768 (benchmarks/text_bank.py), then runs export, train for two epochs of a model of 11.3
million parameters, eval, shadow-eval on it. Prints seconds and products of every part of every run,
the rate of this machine's own products, measured just before and after, the ratio of the time to
that of the products alone, the peak of resident memory and the longest silence of each command.
Products are counted from shapes.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import mlflow
import torch
from tabulate import tabulate

from lvm.system.processes import has_native_bf16, machine, num_cores
from lvm.system.progress import LOAD, REST
from lvm.tracking import runs

LARGE = ["bank=data/large", "ctx=2000"]
SEED_SIZE = ["model=memory_gru", "hidden=512", "layers=4", "epochs=2"]
COMMANDS = {
    "demo": [["main", "size=quick"]],
    "headline": [["train", "ctx=2000"]],
    "large": [
        ["export", *LARGE],
        ["train", *LARGE, *SEED_SIZE],
        ["eval", *LARGE, "model=models:/lvm/1"],
        ["shadow-eval", *LARGE],
    ],
}
SIDE, TIMES = 2048, 8


def product_rate(dtype: torch.dtype) -> float:
    """Return the operations a second of a square product on all cores."""
    torch.set_num_threads(num_cores())
    left, right = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(SIDE, SIDE, dtype=dtype)
    seconds = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        torch.matmul(left, right)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * SIDE**3 / sorted(seconds)[len(seconds) // 2]


def rates() -> dict[str, float]:
    """Return the rates of this machine by the name of the arithmetic."""
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_native_bf16() else {})
    return {name: product_rate(dtype) for name, dtype in dtypes.items()}


def run_stamped(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a command, its output passed on with the seconds; return how long, how large, how silent.

    Raises click.ClickException where it fails.
    """
    begin = last = time.monotonic()
    longest, when = 0.0, ""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        while True:
            text = os.read(process.stdout.fileno(), 1 << 16)
            now = time.monotonic()
            if now - last > longest:
                longest, when = now - last, f"from second {last - begin:.0f} on"
            last = now
            if not text:
                break
            for line in text.decode(errors="replace").splitlines():
                print(f"{now - begin:7.1f}  {line}", flush=True)
        _, status, used = os.wait4(process.pid, 0)  # of the largest process of the command
        process.returncode = os.waitstatus_to_exitcode(status)
    words = " ".join(command)
    if process.returncode:
        raise click.ClickException(f"{words} ended with code {process.returncode}")
    return (
        f"{words}: {time.monotonic() - begin:.0f} s, peak {used.ru_maxrss / 1024:,.0f} MB, "
        f"longest silence {longest:.1f} s {when}"
    )


def spent_rows(store: str, rate: dict[str, float]) -> tuple[list[list[Any]], float, float]:
    """Return a row a part of every run of a store, with all seconds and products of the runs."""
    mlflow.set_tracking_uri(store)
    rows, all_seconds, all_products = [], 0.0, 0.0
    found = mlflow.search_runs(
        search_all_experiments=True, order_by=["attributes.start_time ASC"], output_format="list"
    )
    for run in found:
        spent = runs.read_json(run.info.run_id, runs.SPENT)
        entry = run.data.tags[runs.ENTRY]
        parts = sorted(spent["parts"].items(), key=lambda item: -item[1]["seconds"])
        if entry == "main":  # the parts of its own are the other runs
            parts = [(name, part) for name, part in parts if name in (LOAD, REST)]
        rows += [_row(entry, name, part, rate) for name, part in parts]
        all_seconds += sum(part["seconds"] for _, part in parts)
        all_products += sum(part["products"] for _, part in parts)
        if entry != "main":
            rows.append(_row(entry, "ALL", spent, rate))
    return rows, all_seconds, all_products


def _row(entry: str, name: str, spent: dict[str, float], rate: dict[str, float]) -> list[Any]:
    seconds, products = spent["seconds"], spent["products"]
    ratios = [f"{seconds * one / products:.1f}" if products else "" for one in rate.values()]
    return [entry, name, f"{seconds:.1f}", f"{1e-12 * products:.2f}", *ratios]


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(tuple(COMMANDS)))
@click.option("--max-rows", default=None, help="headline: ingest so many rows first, or all.")
@click.option("--rows", default=637_997, show_default=True, help="large: rows of the bank.")
@click.option("--scratch", default=None, help="Folder for the clone.")
def main(what: str, max_rows: str | None, rows: int, scratch: str | None) -> None:
    commands = COMMANDS[what]
    if max_rows is not None:
        commands = [["ingest", f"max_rows={max_rows}"], *commands]
    before, told = rates(), []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        clone = Path(folder) / "lvm"
        checkout = str(Path(__file__).resolve().parents[1])
        subprocess.run(["git", "clone", "--quiet", checkout, str(clone)], check=True)
        store = f"sqlite:///{clone}/mlflow.db"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(clone)}
        environment |= {"MLFLOW_TRACKING_URI": store}
        if what == "large":
            drawing = [sys.executable, "-m", "benchmarks.text_bank", "data/large", "--rows"]
            told.append(run_stamped([*drawing, str(rows)], clone, environment))
        for entry, *parameters in commands:
            words = [word for parameter in parameters for word in ("-P", parameter)]
            words = ["mlflow", "run", ".", "-e", entry, *words, "--env-manager", "local"]
            told.append(run_stamped(words, clone, environment))
        lines, seconds, products = spent_rows(store, before)
    after = rates()
    print(f"\n{machine()}")
    for name in before:
        first, last = 1e-9 * before[name], 1e-9 * after[name]
        print(f"{name} products: {first:.0f} GFLOP/s before, {last:.0f} after")
    headers = ["command", "part", "seconds", "TFLOP", *(f"x {name}" for name in before)]
    print(tabulate(lines, headers, disable_numparse=True, stralign="right"))
    shares = ", ".join(f"{seconds * one / products:.1f} x {name}" for name, one in before.items())
    print(f"in all {1e-12 * products:.1f} TFLOP, {seconds:.0f} s: {shares}")
    print("\n".join(told))


if __name__ == "__main__":
    main()
