"""Runs of `scaling`: a nested run for each cell, the verdict, the report."""

from collections.abc import Mapping
from typing import Any

from lvm.evaluation.metrics import figures, soft_hit_at
from lvm.report.scaling import (
    scaling_figure,
    scaling_note,
    scaling_page,
    scaling_report,
    scaling_text,
)
from lvm.studies.scaling.cells import Cell, CellResult, Trainer
from lvm.studies.scaling.grid import Plan, Scaling
from lvm.studies.scaling.verdict import K
from lvm.tracking import runs
from lvm.tracking.datasets import Inputs
from lvm.tracking.runs import publish_report


def print_round(cell: Cell, record: Mapping[str, float]) -> None:
    """Print one round of a training as a line."""
    print(
        f"{_name(cell)}, round {record['epoch']:.0f}: loss {record['train/loss']:.4f}  "
        f"val Hit@5 {100 * record['val/hit_at_5']:.2f} %  ({record['train/seconds']:.0f} s)",
        flush=True,
    )


def log_cell(kind: str, result: CellResult, inputs: Inputs) -> None:
    """Log a cell as a nested run once it is finished, so that none is left half logged."""
    facts = {"kind": kind, **vars(result.cell), "kept": result.was_kept}
    measured = figures(result.rank_Q)
    with runs.child_run(f"{kind}: {_name(result.cell)}", facts):
        for record in result.history:
            values = {name: value for name, value in record.items() if name != "epoch"}
            runs.log_metrics(values, step=int(record["epoch"]), dataset=inputs.dataset)
        best = {f"measured/{name}": value for name, value in measured.items()}
        best["measured/soft_hit_at_5"] = float(soft_hit_at(result.rank_Q, K).mean())
        best |= {"parameters": result.parameters, "documents": result.documents}
        runs.log_metrics(best, step=result.best_round, dataset=inputs.dataset)
    kept = ", kept from an earlier run" if result.was_kept else ""
    shown = f"Hit@5 {100 * measured['hit_at_5']:.2f} % measured"
    print(
        f"{kind}: {_name(result.cell)}: {shown}, best round {result.best_round}{kept}", flush=True
    )


def finish_scaling(
    scaling: Scaling,
    plan: Plan,
    free: dict[str, dict[str, Any]],
    trainer: Trainer,
    report_path: str | None,
) -> None:
    """Log verdict, gains, page, figure; print the tables; write the report."""
    num_queries, name = len(trainer.queries.measured), scaling.verdict.name
    runs.set_tags({"verdict": name})
    page = scaling_page(scaling, plan, free, num_queries, trainer.bank.sha256[:12])
    runs.log_artifact(page, "scaling.md")
    runs.describe_run(scaling_note(scaling))
    if scaling.soft is not None and scaling.hit is not None:
        runs.log_artifact(scaling_figure(scaling, plan, free), "scaling.png")
        gains = {"data": scaling.soft.data, "parameters": scaling.soft.parameters}
        bounds = ("mean", "low", "high")
        runs.log_metrics({f"gain/{k}_{b}": getattr(g, b) for k, g in gains.items() for b in bounds})
    print(f"\n{scaling_text(scaling, plan, free, num_queries)}\n")
    publish_report(scaling_report(scaling, plan, free, num_queries), report_path)


def _name(cell: Cell) -> str:
    trial = f"{cell.fraction:g} of the data, width {cell.width}, seed {cell.seed}"
    return f"{trial}, {cell.steps} steps at lr {cell.lr:g}"
