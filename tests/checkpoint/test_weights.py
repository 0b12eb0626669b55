"""Saved models and training states come back whole or are refused."""

import json

import pytest
import torch

from lvm.checkpoint.weights import load_model, load_state, save_model, save_state
from lvm.models.table import build_model


@pytest.fixture
def folder(tmp_path):
    return save_model(build_model({"model": "ridge", "dim": 4}), tmp_path / "model")


def test_a_model_folder_holds_weights_and_config_only(folder) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_changed_weights_are_refused(folder) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="sha256"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_model(folder)


def test_weights_of_other_sizes_are_refused(folder) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"dim": 5}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit model 'ridge'") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"layers": 10**9}, "a size that no model has"),
        ({"hidden": 10**400}, "a size that no model has"),
        ({"hidden": 10**6}, "does not fit model 'memory_gru', whose hidden is 1000000"),
        ({"layers": 900}, "does not fit model 'memory_gru', whose layers is 900"),
        ({"hidden": "512"}, "cannot be built"),
    ],
)
def test_sizes_are_looked_at_before_memory_is_taken(folder, sizes, reason) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {"model": "memory_gru", "dim": 4, "weights_sha256": config["weights_sha256"]} | sizes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_state_round_trips_and_a_torn_one_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(2)}
    save_state(path, tensors, {"step": 5})
    loaded, meta = load_state(path)
    assert meta == {"step": 5}
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a complete training state"):
        load_state(path)
