"""Pickles or YAML tags in files that are read: refused, and never executed."""

import ast
import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from lvm.bank.bank import Bank, open_bank
from lvm.bank.files import CONTENTS, NPZ_COLUMNS, ROWS, VECTORS
from lvm.evaluation.lane_assignment import read_domains
from lvm.models.baselines import MovingAverage
from lvm.models.facts import facts_of
from lvm.models.weights import CONFIG, WEIGHTS, load_model, load_state, save_model
from lvm.studies.phases import read_phases
from lvm.system.atomic import with_checksum
from lvm.system.settings import read_gate_rules
from lvm.tracking import logged_models, runs
from lvm.windows.export import plan_windows
from tests.faults.conftest import Tally
from tests.faults.fuzzing import in_memory, in_time, read_or_refused
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]


class Touches:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def pickled(marker: Path) -> np.ndarray:
    return np.array([Touches(marker)] * 6, dtype=object)


def test_the_marker_is_written_where_a_pickle_is_read(marker: Path) -> None:
    pickle.loads(pickle.dumps(Touches(marker)))
    assert marker.exists()


@pytest.mark.parametrize("name", ["vectors", *NPZ_COLUMNS])
def test_a_pickle_in_an_npz(name: str, marker: Path, tmp_path: Path, tally: Tally) -> None:
    arrays = {"vectors": np.eye(6, dtype=np.float32)} | {name: pickled(marker)}
    np.savez(tmp_path / "bank.npz", **arrays)
    with tally.injecting("pickles"):
        assert read_or_refused(lambda: open_bank(tmp_path / "bank.npz"), "pickled objects") is None
        assert not marker.exists()


def torch_bytes(marker: Path) -> bytes:
    opened = io.BytesIO()
    torch.save({"weight": Touches(marker)}, opened)
    return opened.getvalue()


def npy_bytes(marker: Path) -> bytes:
    opened = io.BytesIO()
    np.save(opened, pickled(marker), allow_pickle=True)
    return opened.getvalue()


@pytest.mark.parametrize("make", [torch_bytes, npy_bytes, lambda m: pickle.dumps(Touches(m))])
def test_a_pickle_in_place_of_a_file(
    make: Any, tiny_bank: Bank, marker: Path, tmp_path: Path, tally: Tally
) -> None:
    raw = make(marker)
    bank = make_bank(tmp_path / "bank", num_sequences=1, num_twins=1)
    model = save_model(MovingAverage(16), tmp_path / "model")
    config = json.loads((model / CONFIG).read_text())
    places = {
        bank.path / VECTORS: lambda: open_bank(bank.path),
        bank.path / ROWS: lambda: open_bank(bank.path),
        bank.path / CONTENTS: lambda: open_bank(bank.path),
        tmp_path / "x.npz": lambda: open_bank(tmp_path / "x.npz"),
        model / WEIGHTS: lambda: load_model(model),
        model / CONFIG: lambda: load_model(model),
        tmp_path / "last.safetensors": lambda: load_state(tmp_path / "last.safetensors"),
    }
    for path, reader in places.items():
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(raw)
        if path == model / WEIGHTS:  # with the right hash, so that the file itself is looked at
            config["weights_sha256"] = hashlib.sha256(raw).hexdigest()
            (model / CONFIG).write_text(json.dumps(with_checksum(config)))
        with tally.injecting("pickles"), in_time():
            assert read_or_refused(reader, str(path), str(bank.path)) is None
            assert not marker.exists()
        if before is not None:
            path.write_bytes(before)


def test_a_pickled_model_as_candidate(
    tiny_bank: Bank, store: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    """A model of MLflow's own pickle flavour, which has the facts of a predictor of lvm."""

    class Hostile(mlflow.pyfunc.PythonModel):
        def __init__(self) -> None:
            self.payload = None

        def predict(self, context: Any, model_input: Any) -> Any:
            return model_input

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # the attacker's machine
    facts = facts_of("ema", "none", tiny_bank, plan_windows(tiny_bank, 50))
    hostile = Hostile()
    with runs.run("train", {}):
        logged = mlflow.pyfunc.log_model(
            name="model", python_model=hostile, metadata=vars(facts), pip_requirements=[]
        )
    mlflow.register_model(f"models:/{logged.model_id}", "other")
    where = Path(mlflow.get_logged_model(logged.model_id).artifact_location.removeprefix("file://"))
    payload = pickle.dumps(Touches(marker))
    changed = [path for path in where.rglob("*.pkl") if path.write_bytes(payload)]
    assert changed, "the flavour holds a pickle"
    for reference in ("models:/other/1", f"models:/{logged.model_id}"):
        with tally.injecting("pickles"):
            found = read_or_refused(lambda r=reference: logged_models.load(r), reference)
            assert found is None and not marker.exists()


YAML = [
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/name:os.system",
    "!x 1",
    "!!set {{a}}",
]
YAML += ["&a [1, *a]", "&a {{x: *a}}", "{{<<: &a {{b: 1}}}}"]


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize("reader", [read_phases, read_gate_rules, read_domains])
def test_tags_and_anchors_in_yaml(
    reader: Any, text: str, marker: Path, tmp_path: Path, tally: Tally
) -> None:
    path = tmp_path / "x.yaml"
    sections = ("phases", "old_gates", "promotion", "Law")
    path.write_text("".join(f"{name}: {text.format(marker)}\n" for name in sections))
    with tally.injecting("YAML tags, anchors"), in_time():
        assert (
            read_or_refused(lambda: reader(path), "not a readable YAML file without tags") is None
        )
        assert not marker.exists()


def test_a_million_laughs(tmp_path: Path, tally: Tally) -> None:
    path = tmp_path / "gates.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text("\n".join([*lines, "promotion: *a11"]))
    with tally.injecting("YAML tags, anchors"), in_time(), in_memory():
        assert read_or_refused(lambda: read_gate_rules(path), str(path)) is None


def calls(name: str) -> list[tuple[str, ast.Call]]:
    files = [*(ROOT / "lvm").rglob("*.py"), *(ROOT / "entrypoints").glob("*.py")]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                found.append((f"{path.name}:{node.lineno}", node))
    return found


def test_nothing_in_the_source_reads_a_pickle() -> None:
    loads = calls("np.load")
    assert loads
    for place, call in loads:
        told = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert told.get("allow_pickle") == "False", place
    for name in (
        "torch.load",
        "pickle.load",
        "joblib.load",
        "yaml.unsafe_load",
        "eval",
    ):
        assert not calls(name), name
    # A process of a replay reads the job that its parent has just written for it.
    assert [place.split(":")[0] for place, _ in calls("pickle.loads")] == ["workers.py"]
    for place, call in calls("yaml.load"):
        assert ast.unparse(call.args[1]) == "_PlainLoader", place
