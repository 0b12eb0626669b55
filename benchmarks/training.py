"""Speed of training: forward and backward of the models, an unrolled GRU and plain products.

Run `python -m benchmarks.training`; it prints a table and checks nothing. Each round times all rows
of the table in turn, so that other load on the machine affects them alike.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import click
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

from lvm.models.recurrent import CELLS
from lvm.models.table import build_model
from lvm.training.config import TrainConfig, resolve
from lvm.training.loss import SampledSoftmax
from lvm.training.optimizer import make_optimizer

HIDDEN, LAYERS = 512, 4
MATRIX = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNROLL, MATMUL = f"nn.GRU, {LAYERS} layers, unrolled", "matmul"
DELTA = "delta_memory"


@dataclass
class Timed:
    """A call in one precision, with its floating-point operations, windows, seconds per round."""

    name: str
    precision: str
    call: Callable[[], object]
    num_windows: int = 0
    flops: int = 0
    seconds: list[float] = field(default_factory=list)

    def count(self) -> None:
        """Count the operations of one call; the call also warms up."""
        with FlopCounterMode(display=False) as counter:
            self.call()
        self.flops = counter.get_total_flops()

    def time(self) -> None:
        begin = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - begin)

    def rate(self) -> float:
        """Return operations a second in the best round."""
        return self.flops / min(self.seconds)

    def windows(self) -> float:
        """Return windows a second in the best round."""
        return self.num_windows / min(self.seconds)


class UnrolledGRU(nn.Module):
    """The old system's model: all layers step by step over the whole context."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, HIDDEN, LAYERS, batch_first=True)
        self.out = nn.Linear(HIDDEN, dim)

    def forward(self, context_BTD: Tensor) -> Tensor:
        state_BTH, _ = self.gru(context_BTD)
        return normalize(self.out(state_BTH), dim=-1)


def train_step(model: nn.Module, context_BTD: Tensor, precision: str) -> Callable[[], None]:
    """Return a forward and backward pass over every position."""
    weight_BTD = torch.randn_like(context_BTD)
    half = precision == "bf16"

    def step() -> None:
        with torch.autocast(context_BTD.device.type, torch.bfloat16, enabled=half):
            prediction_BTD = model(context_BTD)
        (prediction_BTD * weight_BTD).sum().backward()
        if context_BTD.is_cuda:
            torch.cuda.synchronize()

    return step


def whole_step(model: nn.Module, context_BTD: Tensor, precision: str) -> Callable[[], None]:
    """Return a step of training: forward, the loss over all positions, backward, AdamW."""
    config = resolve(TrainConfig(precision=precision), context_BTD.shape[1])
    half = precision == "bf16"
    objective = SampledSoftmax(config.temperature, config.alpha, config.focus, half)
    optimizer = make_optimizer(model, objective.to(context_BTD.device), config)
    draw = torch.randn(config.negatives, context_BTD.shape[2], device=context_BTD.device)
    target_PD = context_BTD.roll(-1, dims=1).flatten(0, 1)
    negative_KD = normalize(draw, dim=-1)

    def step() -> None:
        with torch.autocast(context_BTD.device.type, torch.bfloat16, enabled=half):
            prediction_BTD = model(context_BTD)
        prediction_PD = prediction_BTD.float().flatten(0, 1)
        objective(prediction_PD, target_PD, negative_KD, None).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if context_BTD.is_cuda:
            torch.cuda.synchronize()

    return step


def product(precision: str, device: str) -> Callable[[], None]:
    draws = (torch.randn(MATRIX, MATRIX, device=device) for _ in range(2))
    left, right = (draw.to(DTYPES[precision]) for draw in draws)

    def multiply() -> None:
        for _ in range(4):
            left @ right
        if device == "cuda":
            torch.cuda.synchronize()

    return multiply


def table(rows: list[Timed]) -> str:
    """Format each row beside the matrix products and the unrolled GRU, in both precisions."""
    found = {(row.name, row.precision): row for row in rows}
    lines = []
    for row in rows:
        against = [found[MATMUL, "fp32"], found[MATMUL, row.precision]]
        cells = [row.name, row.precision, f"{row.rate() / 1e9:.0f}"]
        cells += [f"{100 * row.rate() / other.rate():.0f} %" for other in against]
        if row.num_windows:
            unrolls = [found[UNROLL, "fp32"], found[UNROLL, row.precision]]
            cells.append(f"{row.windows():.2f}")
            cells += [f"{row.windows() / other.windows():.1f} x" for other in unrolls]
        lines.append(cells)
    headers = ["forward + backward", "precision", "GFLOP/s", "of fp32 matmul", "of own matmul"]
    headers += ["windows/s", "against fp32 unroll", "against own unroll"]
    return tabulate(
        lines, headers, colalign=("left", "left", *["right"] * 6), disable_numparse=True
    )


@click.command()
@click.option("--ctx", default=2000, show_default=True, help="Rows of context.")
@click.option("--batch", default=4, show_default=True, help="Windows a step.")
@click.option("--dim", default=768, show_default=True, help="Dimension of the vectors.")
@click.option("--repeats", default=3, show_default=True, help="Rounds; the best counts.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
def main(ctx: int, batch: int, dim: int, repeats: int, device: str) -> None:
    """Print GFLOP/s and windows per second of forward + backward, in fp32 and bf16."""
    torch.manual_seed(0)
    context_BTD = normalize(torch.randn(batch, ctx, dim, device=device), dim=-1)
    models: dict[str, nn.Module] = {UNROLL: UnrolledGRU(dim)}
    for cell in CELLS:
        sizes = {"dim": dim, "hidden": HIDDEN, "layers": LAYERS, "cell": cell, "chunk": 200}
        models[f"memory_gru, cell={cell}"] = build_model({"model": "memory_gru", **sizes})
    models[DELTA] = build_model({"model": "delta_memory", "dim": dim})
    rows = [
        Timed(name, precision, train_step(model.to(device), context_BTD, precision), batch)
        for name, model in models.items()
        for precision in DTYPES
    ]
    rows += [
        Timed(f"{DELTA}, loss, AdamW", precision, whole_step(models[DELTA], context_BTD, precision))
        for precision in DTYPES
    ]
    rows += [Timed(MATMUL, precision, product(precision, device)) for precision in DTYPES]
    for row in rows:
        row.count()
    for _ in range(repeats):
        for row in rows:
            row.time()
    print(f"ctx {ctx}, batch {batch}, D {dim}, {torch.get_num_threads()} threads, {device}")
    default = resolve(TrainConfig(device=device), ctx).precision
    print(f"training's default precision here (precision=auto): {default}")
    print(table(rows))
    for name, model in models.items():
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory {peak:.1f} GiB")


if __name__ == "__main__":
    main()
