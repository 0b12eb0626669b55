"""Whole shadow evaluations on a real store: who may become baseline, who may not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from entrypoints import rollback, shadow_eval
from lvm.bank.bank import Bank, write_bank
from lvm.models.baselines import CopyLast, Ridge
from lvm.models.facts import TRAINED, Facts, facts_of
from lvm.tracking import logged_models, runs
from lvm.tracking.registry import Registry
from lvm.windows.export import plan_windows
from tests.conftest import copy_store
from tests.synthetic import rotation

registry = Registry()

pytestmark = pytest.mark.slow
CTX, DIM = 20, 16
NUM_SEQUENCES, NUM_DOCUMENTS, DOCUMENT_ROWS = 12, 30, 8
BEST_ON_VAL = {"corrected_hit_at_5": "0.99 [0.98, 1]"}  # as `train` logs it


def linear(matrix_DD: np.ndarray) -> Ridge:
    """Return a model that maps the last vector by a matrix."""
    model = Ridge(DIM)
    weight = np.zeros((DIM, 4 * DIM), np.float32)
    weight[:, :DIM] = matrix_DD
    model.weight.copy_(torch.from_numpy(weight))
    return model


def changing_bank(path: Path) -> Bank:
    """Write a bank that turns by another rotation in the last tenth of its sequences.

    What fits its train rows does not fit its test rows; `linear(rotation(DIM, 1))` does.
    """
    random = np.random.default_rng(0)
    sequence_rows = NUM_DOCUMENTS * DOCUMENT_ROWS
    vectors = []
    for _ in range(NUM_SEQUENCES):
        vector_D = random.standard_normal(DIM)
        for row in range(sequence_rows):
            vectors.append(vector_D / np.linalg.norm(vector_D))
            vector_D = rotation(DIM, 1 if row >= 0.88 * sequence_rows else 0) @ vector_D
    row_N = np.arange(len(vectors))
    rows = pd.DataFrame(
        {
            "sequence": [f"sequence-{row // sequence_rows}" for row in row_N],
            "document": [f"document-{row // DOCUMENT_ROWS % NUM_DOCUMENTS}" for row in row_N],
        }
    )
    return write_bank(path, np.array(vectors), rows, "synthetic", "test", "float32")


@pytest.fixture(scope="module")
def bank(tmp_path_factory, empty_store):
    """A bank in a working folder with an empty store of its own."""
    folder = tmp_path_factory.mktemp("shadow-store")
    made = changing_bank(folder / "bank")
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, folder / "store", patch)
        patch.chdir(folder)
        yield made


@pytest.fixture(scope="module")
def facts(bank: Bank) -> Facts:
    known = facts_of("memory_gru", "none", bank, plan_windows(bank, CTX))
    assert known.kind == TRAINED
    return known


def register(model: nn.Module, facts: Facts, val: dict[str, str] | None = None) -> str:
    """Register a model as if it had been trained, with its figures on val; return its version."""
    with runs.run("train", {}):
        return registry.register(logged_models.log_predictor(model, facts), facts, val)


def evaluated(candidates: str) -> dict:
    arguments = ["--candidates", candidates, "--bank", "bank", "--ctx", str(CTX)]
    assert shadow_eval.main([*arguments, "--promote", "enabled", "--report", "report.json"]) == 0
    return json.loads(Path("report.json").read_text())


def unscored(version: str) -> str:
    return MlflowClient().get_model_version("lvm", version).tags["shadow_unscored"]


@pytest.fixture(scope="module")
def unworthy(bank, facts) -> list[str]:
    """Versions of a model that copies, noise, NaN, one evaluated on another bank."""
    elsewhere = dataclasses.replace(facts, bank_sha256="0" * 64)
    noise = np.random.default_rng(5).standard_normal((DIM, DIM))
    return [
        register(CopyLast(DIM), facts),
        register(linear(noise), facts),
        register(linear(np.full((DIM, DIM), np.nan)), facts),
        register(linear(rotation(DIM, 1)), elsewhere),
    ]


@pytest.fixture(scope="module")
def first(unworthy) -> dict:
    return evaluated(",".join(unworthy))


@pytest.fixture(scope="module")
def improved(first, facts) -> str:
    """The version of a genuine improvement, evaluated."""
    version = register(linear(rotation(DIM, 1)), facts, BEST_ON_VAL)
    evaluated("all")
    return version


def test_no_unworthy_model_becomes_the_first_baseline(first, unworthy):
    baseline = logged_models.load("models:/lvm@baseline")
    assert baseline.facts.kind == "free" and baseline.version not in unworthy
    assert first["decision"]["winner"] == baseline.facts.model
    assert len(registry.history()) == 1
    notes = [unscored(version) for version in unworthy]
    assert notes[:2] == ["none", "none"] and "not finite" in notes[2]
    assert "made from another bank (000000000000" in notes[3]


def test_nor_the_next_one(first, unworthy):
    before = registry.aliases()
    again = evaluated(",".join(unworthy))
    assert registry.aliases() == before and again["decision"]["promote"] == []
    assert {one["origin"] for one in again["outcomes"]} == {"read from the store", ""}


def test_a_genuine_improvement_is_promoted(first, improved):
    aliases = registry.aliases()
    assert aliases["baseline"] == improved
    free = registry.versions()[aliases["previous"]]
    assert (free.kind, free.model) == ("free", first["decision"]["winner"])


def test_a_tie_keeps_the_baseline(improved, facts):
    before = registry.aliases()
    twin = register(linear(rotation(DIM, 1)), facts, BEST_ON_VAL)
    report = evaluated("all")
    MlflowClient().delete_model_version("lvm", twin)
    assert registry.aliases() == before and report["decision"]["promote"] == []
    tied = [one for one in report["comparisons"] if one["hit_at_5"]["mean"] == 0]
    assert tied and report["decision"]["winner"].endswith(f"v{improved}")


def test_rollback_restores_the_one_before_and_no_replay_undoes_it(improved):
    before = registry.aliases()
    assert rollback.main([]) == 0
    now = registry.aliases()
    assert (now["baseline"], now["previous"]) == (before["previous"], before["baseline"])
    assert registry.history()[-1]["replaced"] == improved
    again = evaluated("all")
    assert registry.aliases() == now and registry.withdrawn() == {improved}
    (check,) = (
        check
        for check in again["decision"]["checks"]
        if check["gate"] == "not withdrawn" and not check["passed"]
    )
    assert check["candidate"].endswith(f"v{improved}")


def extended(bank: Bank, path: Path) -> Bank:
    """Write the bank with one pinned sequence more, as `ingest` extends one."""
    codes = np.append(bank.sequence_N, np.full(10, len(bank.sequences)))
    names = np.array([*bank.sequences, "chain"], dtype=object)[codes]
    documents = np.array([*bank.documents, "chain"], dtype=object)
    rows = pd.DataFrame(
        {
            "sequence": names,
            "document": documents[np.append(bank.document_N, np.full(10, len(bank.documents)))],
            "split": np.where(codes == len(bank.sequences), "train", None),
        }
    )
    chain = np.random.default_rng(5).standard_normal((10, DIM))
    vectors = np.concatenate([bank.unit(slice(None)), chain])
    return write_bank(path, vectors, rows, "synthetic", "test", "float32", bases=(bank.sha256,))


def test_models_of_a_bank_are_compared_on_one_that_extends_it(bank, facts):
    model = linear(rotation(DIM, 1))
    old = logged_models.log_predictor(model, facts, np.zeros((bank.num_rows, 2), np.float32))
    version = registry.register(old, facts)
    larger = extended(bank, Path("extended"))
    newer = facts_of("memory_gru", "none", larger, plan_windows(larger, CTX))
    assert newer.bank_sha256 != facts.bank_sha256
    other = register(model, newer)
    arguments = ["--candidates", f"{version},{other}", "--bank", "extended", "--ctx", str(CTX)]
    assert shadow_eval.main([*arguments, "--report", "report.json"]) == 0
    outcomes = json.loads(Path("report.json").read_text())["outcomes"]
    before, after = (
        next(one for one in outcomes if one["version"] == name) for name in (version, other)
    )
    assert before["figures"] == after["figures"] and before["leak"] is None
    assert before["corrected"]["hit_at_5"] > 0.5, "fitted anew for the rows of the larger bank"
    assert shadow_eval.main([*arguments[:2], "--bank", "bank", "--report", "report.json"]) == 0
    outcomes = json.loads(Path("report.json").read_text())["outcomes"]
    assert any("another bank" in (one["refusal"] or "") for one in outcomes)
