"""Speed of training: forward and backward of the models beside an unrolled GRU and plain matmul.

Run `python -m benchmarks.training`; it prints a table and checks nothing.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from lvm.models.table import build_model

HIDDEN, LAYERS = 512, 4
MATRIX = 2048


@dataclass(frozen=True)
class Speed:
    """Best of several timings: floating-point operations, seconds, windows of one call."""

    name: str
    flops: int
    seconds: float
    num_windows: int

    def row(self, unroll: "Speed", matrix: "Speed") -> list[str]:
        rate, peak = self.flops / self.seconds, matrix.flops / matrix.seconds
        windows = self.num_windows / self.seconds
        faster = windows * unroll.seconds / unroll.num_windows
        return [
            self.name,
            f"{rate / 1e9:.0f}",
            f"{100 * rate / peak:.0f} %",
            f"{windows:.2f}" if self.num_windows else "",
            f"{faster:.1f} x" if self.num_windows else "",
        ]


class UnrolledGRU(nn.Module):
    """What the replaced system trained: all layers step by step over the whole context."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, HIDDEN, LAYERS, batch_first=True)
        self.out = nn.Linear(HIDDEN, dim)

    def forward(self, context_BTD: Tensor) -> Tensor:
        state_BTH, _ = self.gru(context_BTD)
        return normalize(self.out(state_BTH), dim=-1)


def measure(name: str, call: Callable[[], object], num_windows: int, repeats: int) -> Speed:
    """Time `call`, the best of `repeats` after one to warm up; count its operations once."""
    with FlopCounterMode(display=False) as counter:
        call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return Speed(name, counter.get_total_flops(), min(seconds), num_windows)


def train_step(model: nn.Module, context_BTD: Tensor, half: bool) -> Callable[[], None]:
    """Return a forward and backward pass over every position."""
    weight_BTD = torch.randn_like(context_BTD)

    def step() -> None:
        with torch.autocast(context_BTD.device.type, torch.bfloat16, enabled=half):
            (model(context_BTD) * weight_BTD).sum().backward()
        if context_BTD.is_cuda:
            torch.cuda.synchronize()

    return step


def product(dtype: torch.dtype, device: str) -> Callable[[], None]:
    left, right = (torch.randn(MATRIX, MATRIX, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply


@click.command()
@click.option("--ctx", default=2000, show_default=True, help="Rows of context.")
@click.option("--batch", default=4, show_default=True, help="Windows a step.")
@click.option("--dim", default=768, show_default=True, help="Dimension of the vectors.")
@click.option("--repeats", default=3, show_default=True, help="Timings of each; the best counts.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--half/--no-half", default=False, help="bfloat16 autocast for the models.")
def main(ctx: int, batch: int, dim: int, repeats: int, device: str, half: bool) -> None:
    """Print GFLOP/s and windows a second of forward + backward."""
    torch.manual_seed(0)
    context_BTD = normalize(torch.randn(batch, ctx, dim, device=device), dim=-1)
    models: dict[str, nn.Module] = {f"nn.GRU, {LAYERS} layers, {ctx} steps": UnrolledGRU(dim)}
    for cell in ("gru", "mingru"):
        sizes = {"dim": dim, "hidden": HIDDEN, "layers": LAYERS, "cell": cell, "chunk": 200}
        models[f"memory_gru, cell={cell}"] = build_model({"model": "memory_gru", **sizes})
    matrix = measure("matmul, fp32", product(torch.float32, device), 0, 3 * repeats)
    speeds = [
        measure(name, train_step(model.to(device), context_BTD, half), batch, repeats)
        for name, model in models.items()
    ]
    halves = measure("matmul, bf16", product(torch.bfloat16, device), 0, 3 * repeats)
    rows = [speed.row(speeds[0], matrix) for speed in (*speeds, matrix, halves)]
    headers = ["forward + backward", "GFLOP/s", "of fp32 matmul", "windows/s", "against unroll"]
    print(f"ctx {ctx}, batch {batch}, D {dim}, {torch.get_num_threads()} threads, {device}")
    print(tabulate(rows, headers, colalign=("left", *["right"] * 4)))
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
