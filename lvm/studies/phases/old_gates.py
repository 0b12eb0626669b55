"""The old criteria of success, shown beside the phases; no promotion follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvm.studies.phases.compared import PhaseComparison, Row
from lvm.studies.phases.table import OldGates

GATES = ("gain", "converged", "latency")


@dataclass(frozen=True)
class OldCheck:
    """One old gate for one phase; `passed` is None where there is nothing to judge by."""

    phase: str
    gate: str
    passed: bool | None
    detail: str


def old_checks(table: PhaseComparison, rules: OldGates) -> list[OldCheck]:
    """Judge every phase by the old criteria."""
    found = []
    for row in table.rows:
        verdicts = (
            _gain(row, None if row.before is None else table.row(row.before), rules),
            _converged(row.trained.report, rules),
            _fast(row, rules),
        )
        found += [
            OldCheck(row.name, gate, passed, detail)
            for gate, (passed, detail) in zip(GATES, verdicts, strict=True)
        ]
    return found


Verdict = tuple[bool | None, str]


def _gain(row: Row, before: Row | None, rules: OldGates) -> Verdict:
    """Judge a phase by the one before it, be they one training under two names."""
    if before is None:
        return None, "no phase before it"
    old, new = before.measured.figures, row.measured.figures
    changes = {"Hit@5": "hit_at_5", "Hit@10": "hit_at_10"}
    gains = {name: new[key] - old[key] for name, key in changes.items()}
    told = ", ".join(f"{name} {100 * value:+.1f}" for name, value in gains.items())
    passed = all(value > rules.gain_above for value in gains.values())
    return passed, f"{told} points over {before.name}"


def _converged(report: Mapping[str, Any], rules: OldGates) -> Verdict:
    best = int(report["best_epoch"])
    losses: Sequence[float] = [record["train/loss"] for record in report["history"]]
    if len(losses) < 2:
        return False, f"{len(losses)} epoch: nothing can be said of its end"
    lowest = min(losses[:-1])
    falls = losses[-1] <= lowest + rules.loss_rise * abs(lowest)
    detail = f"best epoch {best} of {len(losses)}, loss {losses[-1]:.4f} after {lowest:.4f}"
    return best > rules.best_epoch_above and falls, detail


def _fast(row: Row, rules: OldGates) -> Verdict:
    p95 = row.latency_ms.get("p95")
    if p95 is None:
        return None, "not measured"
    return p95 <= rules.latency_p95_ms, f"P95 {p95:.1f} ms, at most {rules.latency_p95_ms:g}"
