"""Thresholds of every decision, read from gates.yaml, which explains each of them."""

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lvm.system.errors import one_line_errors
from lvm.system.untrusted import read_yaml, validated

GATES_FILE = Path(__file__).parents[1] / "gates.yaml"
Count = Annotated[int, Field(ge=0, le=10**9)]
Number = Annotated[float, Field(ge=0, le=1e9)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, config=STRICT)
class GateRules:
    """What a candidate must reach to become the baseline."""

    min_queries: Count
    min_documents: Count
    floor_over_chance: Number
    alpha: Number
    lane_min_queries: Count
    lane_min_documents: Count
    lane_max_fall: Number
    latency_p95_ms: Number


@dataclass(frozen=True, config=STRICT)
class LaneRules:
    """When a lane counts as weak."""

    old_rule_fall: Number
    weak_share: Number
    min_queries: Count
    min_documents: Count
    min_chains: Count
    ingest_from: Count
    confusion_pairs: Count
    index_recall: Number
    index_loss: Number
    larger_k: Count
    larger_k_gain: Number
    assign_score: Number
    assign_margin: Number


@dataclass(frozen=True, config=STRICT)
class ScalingRules:
    """When a grid of trainings has a verdict."""

    min_steps: Count
    min_passes: Number
    step_gain: Number
    lr_factor: Number
    min_documents: Count
    min_queries: Count
    choice_share: Number
    extrapolation_sd: Number
    saturated_gain: Number
    both_gain: Number
    break_even_gain: Number


@dataclass(frozen=True, config=STRICT)
class ChainRules:
    """What a chain must be to enter a bank."""

    min_length: Count
    max_length: Count
    coherence_percentile: Number
    twin: Number
    answer_twin: Number
    repeated_share: Number
    candidates_per_chain: Count
    subtree_pieces: Count
    subtree_walks: Count
    failing_rank: Count
    anchor_percentile: Number
    soft_low: Number
    soft_high: Number
    hard_high: Number
    soft_low_percentile: Number
    soft_high_percentile: Number
    hard_percentile: Number
    negatives: Count
    cpesh_steps: Count
    min_attach: Number


Rules = TypeVar("Rules", GateRules, LaneRules, ScalingRules, ChainRules)


def read_gate_rules(path: str | Path = GATES_FILE) -> GateRules:
    """Read the section `promotion`; raises ValueError on a missing, unknown or wrong value."""
    return _read(Path(path), "promotion", GateRules)


def read_lane_rules(path: str | Path = GATES_FILE) -> LaneRules:
    """Read the section `lanes`; raises ValueError on a missing, unknown or wrong value."""
    return _read(Path(path), "lanes", LaneRules)


def read_scaling_rules(path: str | Path = GATES_FILE) -> ScalingRules:
    """Read the section `scaling`; raises ValueError on a missing, unknown or wrong value."""
    return _read(Path(path), "scaling", ScalingRules)


def read_chain_rules(path: str | Path = GATES_FILE) -> ChainRules:
    """Read the section `chains`; raises ValueError on a missing, unknown or wrong value."""
    return _read(Path(path), "chains", ChainRules)


@one_line_errors
def _read(path: Path, section: str, rules: type[Rules]) -> Rules:
    contents = read_yaml(path, "gates")
    if not isinstance(contents, dict) or not isinstance(contents.get(section), dict):
        raise ValueError(f"gates {path}: no section '{section}'; see lvm/gates.yaml")
    return validated(rules, contents[section], f"gates {path}: {section}")
