"""Latency of a model whose cost is known to grow with its context."""

import time

import torch
from torch import nn

from lvm.bank import Bank
from lvm.latency import measure_latency
from lvm.windows import plan_windows


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
