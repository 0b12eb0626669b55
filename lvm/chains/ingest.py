"""Ingestion of chains: walks or pages through the gates to a bank."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvm.bank.store import FloatArray, open_bank
from lvm.chains.cpesh import Mined, mine
from lvm.chains.gates import CoherenceRule, coherence_rule
from lvm.chains.gating import Gated, pass_gates
from lvm.chains.plan import ChainPlan, check_plan, created_by
from lvm.chains.sources import find_candidates
from lvm.chains.writing import ChainBank, check_records, read_report, write_chains
from lvm.corpus.ingest import existing_bank
from lvm.system.thresholds import ChainRules, read_chain_rules

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class ChainReport:
    """What an ingestion of chains did; `gates` are name, dropped, reason in their order."""

    path: str
    source: str
    encoder: str
    created_by: str
    sha256: str
    base_rows: int
    rows: int
    dim: int
    candidates: int
    chains: int
    gates: list[dict[str, Any]]
    coherence: dict[str, Any]
    cpesh: dict[str, Any]
    lanes: dict[str, int]
    notes: list[str]
    reused: bool
    seconds: float


def ingest_chains(plan: ChainPlan, rules: ChainRules | None = None) -> ChainReport:
    """Make the bank of `plan`; reuse a bank there that was made in the same way.

    Raises ValueError on bad input, where the gates leave no chain, where fewer chains than
    `min_attach` have a CPESH record; then nothing is written.
    """
    started = time.monotonic()
    rules = rules or read_chain_rules()
    check_plan(plan)
    rule = coherence_rule(plan.coherence, rules)
    base = None if plan.base is None else open_bank(plan.base, verify=True)
    made_by = created_by(plan, base, rules)
    path = Path(plan.bank)
    reused = path.exists()
    if reused:
        bank = existing_bank(path, made_by)
        found = read_report(path)
        check_records(path, found)
    else:
        candidates, model = find_candidates(plan, base, rules)
        gated = pass_gates(candidates, model, base, rule, rules, plan.max_chains)
        mined = mine(gated.chains, gated.pool, gated.adjacent_E, rules, plan.seed)
        notes = [*candidates.notes, *_base_notes(gated)]
        counted = {"candidates": len(candidates.chains), "notes": notes}
        found = counted | _found(gated, rule, mined)
        contents = ChainBank(candidates.kind, gated.chains, gated.pool, base, mined.records, found)
        bank = write_chains(path, contents, made_by)
    return ChainReport(
        path=str(path),
        source=plan.source,
        encoder=bank.encoder,
        created_by=bank.created_by,
        sha256=bank.sha256,
        base_rows=0 if base is None else base.num_rows,
        rows=bank.num_rows,
        dim=bank.dim,
        **found,
        reused=reused,
        seconds=time.monotonic() - started,
    )


def _found(gated: Gated, rule: CoherenceRule, mined: Mined) -> dict[str, Any]:
    """What the bank's folder keeps of its making, in JSON's types."""
    return {
        "chains": len(gated.chains),
        "gates": [asdict(gate) for gate in gated.dropped],
        "coherence": {
            "least": gated.least,
            **asdict(rule),
            "candidates": _percentiles(gated.coherence_C),
            "kept": _percentiles(gated.kept_C),
        },
        "cpesh": {
            **asdict(mined.bands),
            "records": len(mined.records),
            "rate": mined.rate,
            "absolute_rate": mined.absolute_rate,
        },
        "lanes": dict(sorted(Counter(chain.lane or "" for chain in gated.chains).items())),
    }


def _base_notes(gated: Gated) -> list[str]:
    if not gated.in_base:
        return []
    return [
        f"{gated.in_base:,} distinct rows of the chains stand in the base, too: an export asks no "
        "query whose answer is among them"
    ]


def _percentiles(value_C: FloatArray) -> dict[str, float]:
    values = np.percentile(value_C, PERCENTILES).tolist() if len(value_C) else []
    return {f"p{p}": value for p, value in zip(PERCENTILES, values, strict=False)}
