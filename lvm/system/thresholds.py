"""Thresholds of every decision, read from gates.yaml."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lvm.system.errors import one_line_errors
from lvm.system.untrusted import read_yaml

GATES_FILE = Path(__file__).parents[1] / "gates.yaml"
MOST = 10**9  # no threshold is above


@dataclass(frozen=True)
class GateRules:
    """What a candidate must reach to become the baseline; gates.yaml explains each field."""

    min_queries: int
    min_documents: int
    floor_over_chance: float
    alpha: float
    lane_min_queries: int
    lane_min_documents: int
    lane_max_fall: float
    latency_p95_ms: float


@dataclass(frozen=True)
class LaneRules:
    """When a lane counts as weak; gates.yaml explains each field."""

    old_rule_fall: float
    weak_share: float
    min_queries: int
    min_documents: int
    min_chains: int
    ingest_from: int
    confusion_pairs: int
    index_recall: float
    index_loss: float
    larger_k: int
    larger_k_gain: float
    assign_score: float
    assign_margin: float


@dataclass(frozen=True)
class ScalingRules:
    """When a grid of trainings has a verdict; gates.yaml explains each field."""

    min_steps: int
    min_passes: float
    step_gain: float
    lr_factor: float
    min_documents: int
    min_queries: int
    choice_share: float
    extrapolation_sd: float
    saturated_gain: float
    both_gain: float
    break_even_gain: float


@dataclass(frozen=True)
class ChainRules:
    """What a chain must be to enter a bank; gates.yaml explains each field."""

    min_length: int
    max_length: int
    coherence_percentile: float
    twin: float
    answer_twin: float
    repeated_share: float
    candidates_per_chain: int
    subtree_pieces: int
    subtree_walks: int
    failing_rank: int
    anchor_percentile: float
    soft_low: float
    soft_high: float
    hard_high: float
    soft_low_percentile: float
    soft_high_percentile: float
    hard_percentile: float
    negatives: int
    cpesh_steps: int
    min_attach: float


Rules = TypeVar("Rules", GateRules, LaneRules, ScalingRules, ChainRules)


def read_gate_rules(path: str | Path = GATES_FILE) -> GateRules:
    """Read the section `promotion`; raises ValueError on a missing, unknown or negative value."""
    return _read(Path(path), "promotion", GateRules)


def read_lane_rules(path: str | Path = GATES_FILE) -> LaneRules:
    """Read the section `lanes`; raises ValueError on a missing, unknown or negative value."""
    return _read(Path(path), "lanes", LaneRules)


def read_scaling_rules(path: str | Path = GATES_FILE) -> ScalingRules:
    """Read the section `scaling`; raises ValueError on a missing, unknown or negative value."""
    return _read(Path(path), "scaling", ScalingRules)


def read_chain_rules(path: str | Path = GATES_FILE) -> ChainRules:
    """Read the section `chains`; raises ValueError on a missing, unknown or negative value."""
    return _read(Path(path), "chains", ChainRules)


@one_line_errors
def _read(path: Path, section: str, rules: type[Rules]) -> Rules:
    contents = read_yaml(path, "gates")
    values = contents.get(section) if isinstance(contents, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"gates {path}: no section '{section}'; see lvm/gates.yaml")
    fields = {field.name: field.type for field in dataclasses.fields(rules)}
    if set(values) != set(fields):
        wrong = sorted(str(name) for name in set(values) ^ set(fields))
        raise ValueError(
            f"gates {path}: {section} misses or does not know {', '.join(wrong)}; "
            f"its keys are {', '.join(fields)}"
        )
    for name, kind in fields.items():
        _check(values[name], kind, f"gates {path}: {section}.{name}")
    return rules(**values)


def _check(value: Any, kind: Any, where: str) -> None:
    """A whole number is a float, too; true is no number."""
    accepted = int if kind is int else (int, float)
    is_number = isinstance(value, accepted) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= MOST:
        kind_name = "a whole number" if kind is int else "a number"
        raise ValueError(f"{where} is {value!r}; it must be {kind_name} from 0 to {MOST:,}")
