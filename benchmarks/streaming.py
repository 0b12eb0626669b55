"""Latency of one appended vector at the default size: `python -m benchmarks.streaming`.

The stream is warmed with `--ctx` rows and then takes `--rows` more. With the bound of ctx rows the
context is read again every ctx / 5 rows, which the column max shows. The column cpu is the 95th
percentile of the thread's processor time, without waiting for other processes.
"""

import argparse
import time

import numpy as np
import torch

from lvm.models.predict import open_stream
from lvm.models.table import build_model

PREDICTORS = (
    ("delta_memory", {}),
    ("memory_gru", {"cell": "gru"}),
    ("memory_gru", {"cell": "mingru"}),
    ("ema", {}),
    ("transformer", {}),
    ("ridge", {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ctx", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random = np.random.default_rng(0)
    shape = (options.ctx + options.rows, options.dim)
    vector_TD = random.standard_normal(shape).astype(np.float32)
    print(
        f"D {options.dim}, context of {options.ctx} rows, {options.rows} appended, "
        f"{options.threads} thread(s); milliseconds\n"
        f"{'predictor':<20}{'bound':>7}{'warm':>9}{'p50':>9}{'p95':>9}{'p99':>9}{'max':>9}{'cpu':>9}"
    )
    for name, sizes in PREDICTORS:
        torch.manual_seed(0)
        model = build_model({"model": name, "dim": options.dim} | sizes)
        for ctx in (None, options.ctx):
            figures = measure(model, vector_TD, options.ctx, ctx)
            shown = "".join(f"{value:9.2f}" for value in figures)
            label = " ".join([name, *map(str, sizes.values())])
            print(f"{label:<20}{ctx or 'none':>7}{shown}", flush=True)


def measure(
    model: torch.nn.Module, vector_TD: np.ndarray, warm_rows: int, ctx: int | None
) -> list[float]:
    """Return ms to warm up; p50, p95, p99, max of an append; p95 of its processor time."""
    stream = open_stream(model, ctx)
    stream.warm(vector_TD[:warm_rows])
    begin = time.perf_counter()
    stream.warm(vector_TD[:warm_rows])
    warm_ms = 1000 * (time.perf_counter() - begin)
    times, cpu_times = [], []
    for vector_D in vector_TD[warm_rows:]:
        begin, cpu_begin = time.perf_counter(), time.thread_time()
        stream.append(vector_D)
        cpu_times.append(1000 * (time.thread_time() - cpu_begin))
        times.append(1000 * (time.perf_counter() - begin))
    cpu_p95 = float(np.quantile(cpu_times, 0.95))
    return [warm_ms, *np.quantile(times, [0.5, 0.95, 0.99, 1.0]).tolist(), cpu_p95]


if __name__ == "__main__":
    main()
