"""The old criteria of success, shown beside the phases; no promotion follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lvm.phases.measured import Pair, PhaseComparison, Row
from lvm.phases.table import OldGates

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
    gains = {pair.later: pair for pair in table.successive}
    found = []
    for row in table.rows:
        verdicts = (
            _gain(gains.get(row.same_as or row.name), rules),
            _converged(row.trained.report, rules),
            _fast(row, rules),
        )
        found += [
            OldCheck(row.name, gate, passed, detail)
            for gate, (passed, detail) in zip(GATES, verdicts, strict=True)
        ]
    return found


Verdict = tuple[bool | None, str]


def _gain(pair: Pair | None, rules: OldGates) -> Verdict:
    if pair is None:
        return None, "no phase before it"
    changes = {"Hit@5": pair.hit_at_5.mean, "Hit@10": pair.hit_at_10.mean}
    told = ", ".join(f"{name} {100 * value:+.1f}" for name, value in changes.items())
    passed = all(value > rules.gain_above for value in changes.values())
    return passed, f"{told} points over {pair.earlier}"


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
