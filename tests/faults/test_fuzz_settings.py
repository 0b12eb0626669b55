"""Settings in YAML or JSON that are mutated: what they say, or a refusal in a line."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from lvm.bank.bank import Bank
from lvm.bank.row_table import TMD_LANES
from lvm.evaluation.lane_assignment import DOMAINS_FILE, read_domains, with_lanes
from lvm.models.facts import Facts, facts_from_tags
from lvm.models.memory_gru import MemoryGRU
from lvm.models.weights import CONFIG, WEIGHTS, load_model, save_model
from lvm.studies.phases import PHASES_FILE, chosen_phases, read_old_gates, read_phases
from lvm.system.atomic import CHECKSUM, with_checksum
from lvm.system.settings import (
    GATES_FILE,
    Count,
    Number,
    read_chain_rules,
    read_gate_rules,
    read_lane_rules,
    read_scaling_rules,
)
from tests.faults.conftest import Tally
from tests.faults.fuzzing import (
    ODD_TEXTS,
    fuzz,
    is_name,
    mutated_bytes,
    mutated_lines,
    mutated_tree,
    read_or_refused,
)

pytestmark = pytest.mark.faults

LINES = [
    "phases:",
    "  '1':",
    "\t- a",
    "  ctx: &a 5",
    "  x: *a",
    "  <<: *a",
    "key: [",
    "? {a: b}",
    "---",
]
LINES += [
    "  ctx: !!int 5",
    "  ctx: !!python/object/apply:os.system [id]",
    "  ctx: 5",
    "...",
    "%YAML 9",
]
LINES += ["2026-99-99: 1", "  ctx: 0b_", "  ctx: 1:40", "  ctx: " + "9" * 5000, "[" * 3000, "a: |"]
RULES = {
    "promotion": read_gate_rules,
    "lanes": read_lane_rules,
    "scaling": read_scaling_rules,
    "chains": read_chain_rules,
}


def dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def yaml_inputs(path: Path, part: Any) -> st.SearchStrategy[bytes]:
    """Return a settings file with values, lines or bytes changed; `part` is most of it."""
    text = yaml.safe_dump(part)
    lines = mutated_lines(text, LINES).map(lambda one: one.encode("utf-8", "surrogatepass"))
    trees = mutated_tree(part).map(dumped)
    return st.one_of(trees, trees, lines, mutated_bytes(text.encode()))


def assert_number(value: Any, kind: Any, least: float) -> None:
    assert type(value) is int or (kind in (float, "float") and type(value) is float)
    assert math.isfinite(value) and value >= least


@pytest.mark.parametrize("section", RULES)
def test_mutated_gates(section: str, tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "gates.yaml"
    good = {section: yaml.safe_load(GATES_FILE.read_text())[section]}

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        rules = read_or_refused(lambda: RULES[section](path), str(path))
        if rules is not None:
            assert vars(rules) == yaml.safe_load(raw)[section]
            for field in dataclasses.fields(rules):
                assert field.type in (Count, Number)
                assert_number(getattr(rules, field.name), int if field.type is Count else float, 0)

    fuzz(tally, "gates.yaml", 200, yaml_inputs(path, good), check)


def test_mutated_phases(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "phases.yaml"
    good = yaml.safe_load(PHASES_FILE.read_text())
    good["phases"] = dict(list(good["phases"].items())[:3])

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        phases = read_or_refused(lambda: read_phases(path), str(path))
        if phases is not None:
            told = yaml.safe_load(raw)["phases"]
            assert list(phases) == [str(name) for name in told]
            for name, one in zip(told, phases.values(), strict=True):
                assert is_name(one.name) and (one.ctx, one.chunk) == tuple(
                    told[name][key] for key in ("ctx", "chunk")
                )
                assert_number(one.ctx, int, 1)
                assert vars(one.seed) == told[name]["seed"] and one.grown == told[name].get("grown")
                published = told[name].get("published")
                assert (one.published and vars(one.published)) == published
        gates = read_or_refused(lambda: read_old_gates(path), str(path))
        if gates is not None:
            assert vars(gates) == yaml.safe_load(raw)["old_gates"]

    fuzz(tally, "phases.yaml", 600, yaml_inputs(path, good), check)


def test_mutated_domains(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "domains.yaml"
    good = dict(list(yaml.safe_load(DOMAINS_FILE.read_text()).items())[:4])
    good = {name: sentences[:2] for name, sentences in good.items()}

    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        domains = read_or_refused(lambda: read_domains(path), str(path))
        if domains is not None:
            assert domains == yaml.safe_load(raw) and set(domains) <= set(TMD_LANES)
            assert all(text.strip() for texts in domains.values() for text in texts)

    fuzz(tally, "domains.yaml", 500, yaml_inputs(path, good), check)


def test_names_of_phases(tally: Tally) -> None:
    known = read_phases()
    words = st.sampled_from([*ODD_TEXTS, *known, "3.50", "2b", ",", " 1 "])

    def check(text: str) -> None:
        found = read_or_refused(lambda: chosen_phases(text, known), "phases")
        if found is not None:
            names = [word.strip() for word in text.split(",") if word.strip()]
            assert [one.name for one in found] == list(dict.fromkeys(names))

    fuzz(tally, "names of phases", 300, st.lists(words, max_size=5).map(",".join), check)


def test_assigned_lanes(tiny_bank: Bank, tally: Tally) -> None:
    names: st.SearchStrategy[Any] = st.sampled_from(
        [None, "Law", "Art", "law", "", "\x1b", "x" * 9999]
    )
    num_documents = len(tiny_bank.documents)

    def check(drawn: list[Any]) -> None:
        lane_M = (drawn * num_documents)[:num_documents]
        bank = read_or_refused(lambda: with_lanes(tiny_bank, lane_M, ("Law", "Art")), "lanes")
        assert (bank is None) == bool({*drawn} - {None, "Law", "Art"})
        if bank is not None:
            found = [None if code < 0 else bank.lanes[code] for code in bank.lane_N]
            assert found == [lane_M[document] for document in bank.document_N]

    fuzz(tally, "assigned lanes", 300, st.lists(names, min_size=1, max_size=6), check)


FACTS = {
    "model": "ema",
    "kind": "free",
    "phase": "none",
    "dim": 4,
    "ctx": 50,
    "bank": "/bank",
    "bank_sha256": "a" * 64,
    "windows_sha256": "b" * 64,
    "split": "document",
    "seed": 0,
    "leaky": False,
}


def test_facts_of_strangers(tally: Tally) -> None:
    def check(tree: Any) -> None:
        try:
            facts = Facts(**{str(name): value for name, value in tree.items()})
        except (ValueError, TypeError):  # told in one line by the registry, which reads them
            facts = None
        if facts is not None:
            assert {name: vars(facts)[name] for name in tree} == tree
            assert all(type(tree[name]) is type(value) for name, value in FACTS.items())
            assert facts_from_tags({key: str(value) for key, value in vars(facts).items()}) == facts

    fuzz(tally, "facts of a model", 300, mutated_tree(FACTS), check)


def test_mutated_models(tmp_path: Path, tally: Tally) -> None:
    folder = save_model(MemoryGRU(dim=4, hidden=4, layers=2, slots=2, chunk=4), tmp_path / "model")
    good, weights = json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()
    del good[CHECKSUM]

    def check(changed: tuple[Any, bytes]) -> None:
        tree, raw = changed
        text = json.dumps(
            with_checksum(tree) if isinstance(tree, dict) else tree
        )  # past its own hash
        (folder / CONFIG).write_text(text)
        (folder / WEIGHTS).write_bytes(raw)
        model = read_or_refused(lambda: load_model(folder), str(folder), "model", *good)
        if model is not None:
            assert raw == weights and set(tree) <= set(good)
            told = {key: value for key, value in tree.items() if key != "weights_sha256"}
            assert {key: model.config[key] for key in told} == told

    trees = mutated_tree(good).map(lambda tree: (tree, weights))
    damaged = mutated_bytes(weights, header=300).map(lambda raw: (good, raw))
    fuzz(tally, "models", 400, st.one_of(trees, trees, damaged), check)
