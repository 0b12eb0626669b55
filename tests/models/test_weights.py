"""Saved models and training states come back whole or are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvm.models.table import build_model
from lvm.models.weights import load_model, load_state, model_text, save_model, save_state
from lvm.system.atomic import with_checksum, write_array


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
    (folder / "config.json").write_text(json.dumps(with_checksum(config)))
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


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"chunk": 10**7 + 1}, "config.json: holds a size that no model has"),
        ({"slots": 10**9}, "config.json: holds a size that no model has"),
        ({"layers": 900}, "does not fit model 'memory_gru', whose layers is 900"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, sizes, reason) -> None:
    model = build_model({"model": "memory_gru", "dim": 4, "hidden": 4, "layers": 2})
    path = save_model(model, tmp_path / "model")
    written = (path / "config.json").read_bytes()
    model.config = model.config | sizes
    with pytest.raises(ValueError, match=f"{path}/.*{reason}"):
        save_model(model, path)
    assert (path / "config.json").read_bytes() == written
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


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


def test_a_state_of_other_values_is_refused(tmp_path) -> None:
    path = tmp_path / "state"
    save_state(path, {"a": torch.arange(3.0)}, {"step": 5})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not those of the sha256 in it; delete it"):
        load_state(path, is_hash_needed=False)


def test_a_state_without_a_hash_is_read_only_where_that_is_asked_for(tmp_path) -> None:
    path = tmp_path / "state"
    save_file({"a": torch.ones(2)}, path, metadata={"meta": '{"step": 1}'})
    assert load_state(path, is_hash_needed=False)[1] == {"step": 1}
    with pytest.raises(ValueError, match="sha256"):
        load_state(path)


def test_the_same_state_is_the_same_file(tmp_path) -> None:
    for number in range(8):
        save_state(tmp_path / str(number), {"a": torch.ones(2), "b": torch.ones(1)}, {"x": 1})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_state_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(OSError, match="state'"):
        save_state(tmp_path / "state", {"a": torch.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_model_folder_of_before_the_hashes_is_read(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["contents_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).config["model"] == "ridge"


def test_files_beside_a_model_are_part_of_it(tmp_path) -> None:
    model = build_model({"model": "ema", "dim": 4, "decay": 0.5})
    beside = {"more.npy": lambda path: write_array(path, np.arange(4))}
    folder = save_model(model, tmp_path / "model", beside)
    assert load_model(folder).config == model.config
    assert model_text(folder) == model_text(save_model(model, tmp_path / "bare"))
    np.save(folder / "more.npy", np.arange(1, 5))
    with pytest.raises(ValueError, match="more.npy: does not match the sha256"):
        load_model(folder)
    (folder / "more.npy").unlink()
    with pytest.raises(ValueError, match="more.npy: missing"):
        load_model(folder)


def test_a_changed_configuration_is_refused(folder) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"alpha": 0.25}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: differs from the sha256"):
        load_model(folder)


def test_a_model_of_the_memory_of_before_predicts_as_it_did(tmp_path) -> None:
    """The expected values are those of the code that such models were logged by."""
    sizes = {"model": "memory_gru", "dim": 6, "hidden": 8, "layers": 2, "chunk": 5, "slots": 3}
    old = build_model(sizes | {"memory": "addressed"})
    for name, weight in old.named_parameters():
        wave = torch.sin(torch.arange(weight.numel()) * 0.7 + len(name))
        weight.data.copy_(0.5 * wave.view_as(weight))
    old.config = {name: value for name, value in old.config.items() if name != "memory"}
    loaded = load_model(save_model(old, tmp_path / "model"))
    assert loaded.config == sizes | old.config | {"memory": "addressed"}
    context_1TD = torch.nn.functional.normalize(
        torch.sin(torch.arange(23 * 6) * 1.3).view(1, 23, 6), dim=-1
    )
    expected = [-0.648166, 0.450098, 0.437281, -0.430477, -0.022867, 0.015609]
    expected += [-0.75235, 0.472142, 0.267995, -0.288178, 0.135454, -0.194511]
    expected += [0.427702, -0.525021, -0.140536, -0.033334, -0.06657, 0.718422]
    with torch.no_grad():
        found = loaded(context_1TD)[0, [4, 12, 22]].flatten()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=3e-6)
    again = load_model(save_model(loaded, tmp_path / "again"))
    assert again.config["memory"] == "addressed"
    new = load_model(save_model(build_model(sizes), tmp_path / "new"))
    assert new.config["memory"] == "slots"


def test_a_model_larger_than_memory_is_refused_by_its_sizes() -> None:
    with pytest.raises(ValueError, match="of hidden 1000000000000 and layers None is larger than"):
        build_model({"model": "memory_gru", "dim": 16, "hidden": 10**12})
