"""Latency of a served model: `python -m benchmarks.serving --bank data/bank`.

Registers an untrained memory_gru of the default size and a moving average in a scratch store, loads
each as a user does, then times a warm stream with its index. The index is written to the scratch
folder, too. Last, the passages after a context are timed in each order of the second stage that the
bank allows, with weights that are not chosen, which takes as long.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
import numpy as np
import torch

from lvm.bank.bank import Bank, FloatArray, open_bank
from lvm.evaluation.latency import measure_latency, measure_search, measure_warm_latency
from lvm.models.facts import facts_of
from lvm.models.predict import predict_queries
from lvm.models.table import build_model
from lvm.retrieval.index import TUNING_QUERIES
from lvm.retrieval.rerank import (
    KINDS,
    NONE,
    Reranker,
    Weights,
    open_stage,
    possible_reranks,
)
from lvm.serving.predictor import Retriever, Wanted
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import BASELINE, BASELINE_URI, Registry
from lvm.windows.export import ensure_windows
from lvm.windows.planning import Queries, Windows

registry = Registry()
WARM_UP = 5  # the first search in each order opens its stage

MODELS = ["ema", "memory_gru"]
FIGURES = ("p95", "index_p50", "index_p95", "index_batch", "warm_p50", "warm_p95", "warm_max")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", default="data/bank")
    parser.add_argument("--ctx", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=400, help="vectors appended to the stream")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", default=MODELS)
    options = parser.parse_args()
    bank = open_bank(Path(options.bank).resolve())
    with scratch_store():
        windows = ensure_windows(bank, options.ctx)
        print(f"bank of {bank.num_rows:,} x {bank.dim}, ctx {options.ctx}; milliseconds")
        for name in options.models:
            torch.set_num_threads(max(options.threads))
            measure(name, bank, windows, options)


@contextmanager
def scratch_store() -> Iterator[None]:
    """Work in a new folder with its own store; both are deleted afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch}/mlflow.db"
        runs.configure()
        yield
        os.chdir("/")


def measure(name: str, bank: Bank, windows: Windows, options: argparse.Namespace) -> None:
    """Print the figures of one model, one line per number of threads."""
    reranks = possible_reranks(bank, windows)
    stage = open_stage(reranks[-1] if reranks else NONE, bank, windows)
    weights = dict.fromkeys(KINDS, Weights(0.05, beta=0.5, gamma=0.2))
    reranker = Reranker(stage.classifier, dict.fromkeys(reranks, weights))
    served = register_and_load(name, bank, windows, reranker)
    begin = time.perf_counter()
    index = served.index()
    print(f"\n{name}: {index.facts}; built in {time.perf_counter() - begin:.0f} s")
    print("threads" + "".join(f"{key:>13}" for key in FIGURES), flush=True)
    queries = windows.queries["test"].head(TUNING_QUERIES)
    prediction_QD = predict_queries(served.model, bank, queries)
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = measure_latency(served.model, bank, queries)
        found |= measure_search(index, prediction_QD)
        found |= measure_warm_latency(served.model, bank, windows.ctx, index, options.rows)
        print(f"{threads:>7}" + "".join(f"{found[key]:>13.2f}" for key in FIGURES), flush=True)
    for rerank in (NONE, *reranks):
        p50, p95 = order_times(served, bank, queries, prediction_QD, rerank)
        print(f"passages, rerank={rerank}: p50 {p50:.2f}, p95 {p95:.2f}", flush=True)


def order_times(  # type: ignore[no-untyped-def]
    served, bank: Bank, queries: Queries, prediction_QD: FloatArray, rerank: str
) -> tuple[float, float]:
    """Time the retrieval of 5 passages after each context, with its texts; P50 and P95 in ms."""
    retriever = Retriever(served.index(), served.facts.ctx, served.reranker)
    texts = bank.texts()
    wanted, spent = Wanted(5, rerank), []
    bounds = zip(queries.first_row_Q, queries.target_row_Q, prediction_QD, strict=True)
    for first, end, vector_D in bounds:
        unit_1TD = bank.unit(slice(first, end))[None]
        sentences = None if texts is None else [texts[first:end].tolist()]
        begin = time.perf_counter()
        retriever.best(unit_1TD, vector_D[None], wanted, sentences)
        spent.append(1000 * (time.perf_counter() - begin))
    p50, p95 = np.quantile(spent[WARM_UP:], [0.5, 0.95])
    return float(p50), float(p95)


def register_and_load(  # type: ignore[no-untyped-def]
    name: str, bank: Bank, windows: Windows, reranker: Reranker | None = None
):
    """Register the model; return the predictor loaded from models:/lvm@baseline."""
    torch.manual_seed(0)
    model = build_model({"model": name, "dim": bank.dim}).eval()
    facts = facts_of(name, "none", bank, windows)
    with runs.run("train", {}):
        version = registry.register(
            logged_models.log_predictor(model, facts, reranker=reranker), facts
        )
    registry.promote(version, registry.aliases().get(BASELINE), {})
    return mlflow.pyfunc.load_model(BASELINE_URI).unwrap_python_model()


if __name__ == "__main__":
    main()
