"""Settings: strict JSON and YAML files, the thresholds of gates.yaml, the settings of a server.

Files may come from anyone: nothing in them is executed, and paths must stay in their folder.
gates.yaml explains each threshold.
"""

import inspect
import json
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from lvm.system.errors import one_line_errors

MAX_BYTES = 16 * 2**20  # of a settings file; those that lvm writes have some thousand bytes
KEY_ERRORS = {"missing", "unexpected_keyword_argument", "extra_forbidden"}
# What may differ from server to server: a logged model's model_config, environment variables.
SERVER_SETTINGS = {
    "bank": "LVM_BANK",
    "cache_bytes": "LVM_CACHE_BYTES",
    "request_log": "LVM_REQUEST_LOG",
}
GATES_FILE = Path(__file__).parents[1] / "gates.yaml"
Count = Annotated[int, Field(ge=0, le=10**9)]
Number = Annotated[float, Field(ge=0, le=1e9)]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
T = TypeVar("T")


class _PlainLoader(yaml.SafeLoader):
    """Refuses tags, anchors and repeated keys, which yaml.safe_load accepts."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors are not read", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    place = key_node.start_mark
                    raise yaml.MarkedYAMLError(None, None, f"{key!r} appears twice", place)
                seen.add(key)
        return super().construct_mapping(node, deep)


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` in `folder`.

    Raises ValueError if it is missing, not a regular file, or a link out of the folder.
    """
    where = folder / name
    if not where.is_file():
        raise ValueError(f"{where}: missing, or not a regular file")
    if not where.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: is a link out of its folder; put the file itself there")
    return where


def read_small_text(path: Path) -> str:
    """Return the text of a small UTF-8 file; raises OSError or ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: is longer than {MAX_BYTES // 2**20} MiB")
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError for invalid JSON, nesting too deep for Python, repeated keys, NaN, infinities
    and lone surrogates.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_yaml(path: Path, what: str) -> Any:
    """Return the contents of a YAML file of plain values; `what` begins the error message.

    Raises ValueError for files that cannot be read and for anchors, tags and repeated keys.
    """
    try:
        return yaml.load(read_small_text(path), _PlainLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{what} {path}: not a readable YAML file without tags: {why}") from None


def validated(kind: type[T], values: Mapping[Any, Any], where: str) -> T:
    """Return `values` as `kind`, a pydantic model or dataclass; `where` begins error messages.

    Raises ValueError that names every missing and unknown key, or the first wrong value.
    """
    try:
        return kind(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        found = error.errors(include_url=False)
    wrong_keys = {str(one["loc"][-1]) for one in found if one["type"] in KEY_ERRORS}
    if wrong_keys:
        raise ValueError(
            f"{where} misses or does not know {', '.join(sorted(wrong_keys))}; "
            f"its keys are {', '.join(inspect.signature(kind).parameters)}"
        )
    key = ".".join(str(part) for part in found[0]["loc"])
    reason = found[0]["msg"].replace("Input should", "it must")
    raise ValueError(f"{where}.{key} is {found[0]['input']!r}; {reason}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


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


def server_settings(model_config: Mapping[str, Any]) -> dict[str, str]:
    """Return SERVER_SETTINGS, each from `model_config`, else from the environment; "" if unset."""
    given = {name: model_config.get(name) for name in SERVER_SETTINGS}
    return {
        name: os.environ.get(variable, "") if given[name] is None else str(given[name])
        for name, variable in SERVER_SETTINGS.items()
    }
