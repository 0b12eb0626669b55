"""The phase table, read from phases.yaml."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvm.models.table import TRAINED_MODELS
from lvm.retrieval.rerank import NONE, RERANKS
from lvm.system.errors import CONTROL, one_line_errors
from lvm.system.untrusted import read_yaml

PHASES_FILE = Path(__file__).parents[2] / "phases.yaml"
PHASE_KEYS = ("ctx", "chunk", "seed", "rerank", "grown", "after", "published")
OPTIONAL_KEYS = ("rerank", "grown", "after", "published")
SEED_KEYS = ("batch_size", "accumulation", "alpha")
MODEL = {"model": "memory_gru", "hidden": 512, "layers": 4}
MOST = 10**9


@dataclass(frozen=True)
class Published:
    """What the replaced system published of a phase: shares of queries, ranked in `pool`."""

    hit_at_1: float
    hit_at_5: float
    hit_at_10: float
    pool: int
    windows: int
    best_epoch: int
    last_epoch: int
    steps: int


@dataclass(frozen=True)
class Phase:
    """One phase: what it trains, which order it is shown in, what was published of it.

    `grown` names the model that is trained from the weights of its own, if any; `after` the phase
    that it is compared with, unless that is the one before it.
    """

    name: str
    ctx: int
    chunk: int
    seed: Mapping[str, float]
    rerank: str = NONE
    grown: str | None = None
    after: str | None = None
    published: Published | None = None

    def settings(self, recipe: str) -> dict[str, Any]:
        """Return the training options that the phase decides under a recipe.

        Model and sizes are those of the replaced system, whatever train's defaults are.
        """
        shared = {"ctx": self.ctx, "chunk": self.chunk, **MODEL}
        return shared | (dict(self.seed) if recipe == "seed" else {})


@dataclass(frozen=True)
class OldGates:
    """The old criteria of success; phases.yaml explains each."""

    gain_above: float
    best_epoch_above: int
    loss_rise: float
    latency_p95_ms: float


@one_line_errors
def read_phases(path: str | Path = PHASES_FILE) -> dict[str, Phase]:
    """Read the phases in their order; raises ValueError on a missing, unknown or wrong value."""
    named = _section(Path(path), "phases")
    found: dict[str, Phase] = {}
    for name, values in named.items():
        one = _phase(_phase_name(name, path), values, f"phases {path}")
        if one.name in found:
            raise ValueError(f"phases {path}: phase {one.name} stands there twice")
        if one.after is not None and one.after not in found:
            known = ", ".join(found) or "none"
            raise ValueError(
                f"phases {path}: phase {name}: after is {one.after!r}; it must be a phase above "
                f"it: {known}"
            )
        found[one.name] = one
    return found


@one_line_errors
def read_old_gates(path: str | Path = PHASES_FILE) -> OldGates:
    """Read the section `old_gates`; raises ValueError as `read_phases` does."""
    values = _section(Path(path), "old_gates")
    return OldGates(**_numbers(values, OldGates, f"phases {path}: old_gates"))


@one_line_errors
def chosen_phases(words: str, known: Mapping[str, Phase]) -> list[Phase]:
    """Return the phases named by commas, each once; raises ValueError on an unknown one or none."""
    names = list(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        wrong = f"unknown '{unknown[0]}'" if unknown else "none was given"
        raise ValueError(f"phases: {wrong}; the table has {', '.join(known)}")
    return [known[name] for name in names]


def _section(path: Path, section: str) -> dict[str, Any]:
    contents = read_yaml(path, "phases")
    values = contents.get(section) if isinstance(contents, dict) else None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"phases {path}: no section '{section}'; see lvm/phases.yaml")
    return values


def _phase_name(name: Any, path: str | Path) -> str:
    if not _is_name(name):
        raise ValueError(f"phases {path}: a phase is named {name!r}; give it a word or a number")
    return str(name)


def _is_name(name: Any) -> bool:
    is_number = isinstance(name, int | float) and not isinstance(name, bool)
    return is_number or (isinstance(name, str) and name != "" and not CONTROL.search(name))


def _phase(name: str, values: Any, where: str) -> Phase:
    where = f"{where}: phase {name}"
    needed = [key for key in PHASE_KEYS if key not in OPTIONAL_KEYS]
    _check_keys(values, PHASE_KEYS, needed, where)
    rerank = values.get("rerank", NONE)
    if not isinstance(rerank, str) or rerank not in RERANKS:
        raise ValueError(f"{where}: rerank is {rerank!r}; it must be {' or '.join(RERANKS)}")
    grown = values.get("grown")
    if grown is not None and (not isinstance(grown, str) or grown not in TRAINED_MODELS):
        known = ", ".join(TRAINED_MODELS)
        raise ValueError(f"{where}: grown is {grown!r}; it must be one of {known}")
    published = values.get("published")
    if published is not None:
        published = Published(**_numbers(published, Published, f"{where}: published"))
        _check_shares(published, f"{where}: published")
    _check_keys(values["seed"], SEED_KEYS, SEED_KEYS, f"{where}: seed")
    kinds = {"batch_size": int, "accumulation": int, "alpha": float}
    for key, kind in kinds.items():
        _check(values["seed"][key], kind, f"{where}: seed.{key}")
    for key in ("ctx", "chunk"):
        _check(values[key], int, f"{where}: {key}")
    after = values.get("after")
    if after is not None and not _is_name(after):
        raise ValueError(f"{where}: after is {after!r}; it must be the name of a phase")
    return Phase(
        name,
        values["ctx"],
        values["chunk"],
        values["seed"],
        rerank,
        grown,
        None if after is None else str(after),
        published,
    )


def _check_shares(published: Published, where: str) -> None:
    for key in ("hit_at_1", "hit_at_5", "hit_at_10"):
        share = getattr(published, key)
        if share > 1:
            raise ValueError(f"{where}.{key} is {share}; it must be a share from 0 to 1")


def _numbers(values: Any, kind: type[Any], where: str) -> dict[str, Any]:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    _check_keys(values, fields, fields, where)
    for name, number in fields.items():
        _check(values[name], number, f"{where}.{name}")
    return dict(values)


def _check_keys(values: Any, known: Any, needed: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must have the keys {', '.join(known)}")
    wrong = [f"does not know {key}" for key in values if key not in known]
    wrong += [f"misses {key}" for key in needed if key not in values]
    if wrong:
        raise ValueError(f"{where} {'; '.join(wrong)}; its keys are {', '.join(known)}")


def _check(value: Any, kind: Any, where: str) -> None:
    """A whole number must be 1 or more, another 0 or more; true is no number."""
    accepted, least = (int, 1) if kind is int else ((int, float), 0)
    is_number = isinstance(value, accepted) and not isinstance(value, bool)
    if not is_number or not least <= value <= MOST:
        kind_name = "a whole number of 1" if kind is int else "a number of 0"
        raise ValueError(f"{where} is {value!r}; it must be {kind_name} or more, up to {MOST:,}")
