"""Latency of a model whose cost is known to grow with its context."""

import time

import torch
from torch import nn

from lvm.bank.bank import Bank
from lvm.evaluation import latency
from lvm.evaluation.latency import measure_latency, measure_search, measure_warm_latency
from lvm.models.baselines import MovingAverage
from lvm.retrieval.index import build_index
from lvm.system.processes import machine
from lvm.windows.export import plan_windows


class Counted(nn.Module):
    """Counts its calls and busily waits a millisecond for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, context_BTD: torch.Tensor) -> torch.Tensor:
        self.lengths.append(context_BTD.shape[1])
        end = time.perf_counter() + 0.001 * context_BTD.shape[1]
        while time.perf_counter() < end:
            pass
        return context_BTD


def test_single_queries_are_timed_with_their_whole_context(tiny_bank: Bank) -> None:
    queries = plan_windows(tiny_bank, 10).queries["test"]
    model = Counted()
    timed = measure_latency(model, tiny_bank, queries, num_queries=5)
    assert set(timed) == {"p50", "p95"}
    assert 10 <= timed["p50"] <= timed["p95"] < 1000
    assert model.lengths == [10] * 6  # one warms up


def test_a_slow_model_is_asked_fewer_queries(tiny_bank: Bank, monkeypatch) -> None:
    monkeypatch.setattr(latency, "MAX_SECONDS", 0.025)
    model = Counted()
    assert measure_latency(model, tiny_bank, plan_windows(tiny_bank, 10).queries["test"])["p50"] > 0
    assert 2 <= len(model.lengths) <= 4


def test_the_machine_is_told_with_its_threads(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    three = machine()
    assert three.endswith(", 3 threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine() != three


class Slow(MovingAverage):
    """Busily waits two milliseconds for an appended row, twenty for a context."""

    def begin(self, context_TD: torch.Tensor) -> tuple:
        wait(0.020)
        return super().begin(context_TD)

    def step(self, vector_D: torch.Tensor, cache) -> torch.Tensor:
        wait(0.002)
        return super().step(vector_D, cache)


def wait(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_warm_answer_pays_for_one_row_and_sometimes_for_a_context(tiny_bank: Bank) -> None:
    index = build_index(tiny_bank, list)
    timed = measure_warm_latency(Slow(tiny_bank.dim), tiny_bank, 50, index, num_rows=40)
    assert set(timed) == {"warm_p50", "warm_p95", "warm_max"}
    assert 2 <= timed["warm_p50"] < 20 <= timed["warm_max"]  # 10 rows fit between two readings


def test_a_search_is_timed_alone_as_well_as_in_a_batch(tiny_bank: Bank) -> None:
    timed = measure_search(build_index(tiny_bank, list), tiny_bank.unit(slice(0, 30)))
    assert set(timed) == {"index_p50", "index_p95", "index_batch"}
    assert 0 < timed["index_p50"] <= timed["index_p95"] and timed["index_batch"] > 0
