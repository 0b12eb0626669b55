"""Cached results: computed once, never read from a damaged or foreign file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from lvm.models.weights import load_state, save_state
from lvm.system.atomic import Entry, cache_key, compute_once, locked, read_entry, write_entry

ARRAYS = {
    "half": np.arange(1000, dtype=np.float16),
    "turned": np.arange(6.0).reshape(2, 3).T,
    "flags": np.array([True, False]),
    "none": np.zeros((0, 3), np.int64),
    "scalar": np.array(0.25),
}
VALUES = {"c": [0.25, None, "é"], "d": {"e": 1}}


class Computation:
    """A computation that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> Entry:
        self.runs += 1
        return Entry(ARRAYS, VALUES)


def assert_same(found: Entry) -> None:
    assert found.values == VALUES and set(found.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert np.array_equal(found.arrays[name], array)


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    path, key, compute = tmp_path / "cache" / "a", cache_key("a"), Computation()
    for _ in range(3):
        assert_same(compute_once(path, key, compute))
    assert compute.runs == 1 and [one.name for one in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "bare", "empty", "folder"])
def test_a_damaged_or_foreign_file_is_replaced(tmp_path: Path, damage: str) -> None:
    path, key, compute = tmp_path / "a", cache_key("a"), Computation()
    compute_once(path, key, compute)
    whole = path.read_bytes()
    if damage == "foreign":
        write_entry(path, cache_key("b"), Entry(ARRAYS, VALUES))
    elif damage == "bare":
        save_file({"half": ARRAYS["half"]}, path)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
        path.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    assert read_entry(path, key) is None
    assert_same(compute_once(path, key, compute))
    assert compute.runs == 2
    assert (damage == "folder") == (read_entry(path, key) is None)


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    compute = Computation()
    assert_same(compute_once(tmp_path / "file" / "a", cache_key("a"), compute))
    with pytest.raises(OSError, match="file/a"):
        write_entry(tmp_path / "file" / "a", cache_key("a"), compute())


def test_every_part_changes_the_key() -> None:
    ones = np.ones(4)
    parts = [
        (),
        ("a",),
        ("a", "b"),
        (["a", "b"],),
        ({"a": 1},),
        ({"a": 1.5},),
        (ones,),
        (ones, ones),
        (ones.reshape(2, 2),),
        (ones.astype(np.float32),),
        (np.nextafter(ones, 2),),
        (ones * 2,),
        ({"a": ones},),
    ]
    keys = [cache_key(*one) for one in parts]
    assert len(set(keys)) == len(parts)
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    assert cache_key(np.arange(6.0).reshape(2, 3).T) == cache_key(
        np.array([[0.0, 3], [1, 4], [2, 5]])
    )
    for stranger in (object(), np.array([object()]), torch.ones(2)):
        with pytest.raises(TypeError, match="cannot hash"):
            cache_key(stranger)


def test_entries_and_training_states_have_one_layout(tmp_path: Path) -> None:
    arrays = {name: torch.from_numpy(array.copy()) for name, array in ARRAYS.items()}
    save_state(tmp_path / "state", arrays, {"key": "k", "values": VALUES})
    found = read_entry(tmp_path / "state", "k")
    assert found is not None
    assert_same(found)
    write_entry(tmp_path / "entry", "k", Entry(ARRAYS, VALUES))
    tensors, meta = load_state(tmp_path / "entry")
    assert_same(Entry({name: tensor.numpy() for name, tensor in tensors.items()}, meta["values"]))


def test_one_process_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "index"
    with locked(path):
        with pytest.raises(Timeout):
            FileLock(path.parent / ".index.lock", timeout=0).acquire()
    with FileLock(path.parent / ".index.lock", timeout=0):
        pass


def test_a_place_that_takes_no_lock_is_computed_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "index"):
        pass
