"""What is written says where it failed; documents tell their damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvm.bank.files import write_vectors
from lvm.system.atomic import is_damaged, with_checksum, write_array, write_errors_name


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.arange(6).reshape(3, 2).T,
        np.zeros((0, 4), np.float32),
        np.array(2.5),
    ],
    ids=str,
)
def test_arrays_are_written_as_numpy_does(tmp_path: Path, array: np.ndarray) -> None:
    write_array(tmp_path / "own.npy", array)
    np.save(tmp_path / "theirs.npy", np.ascontiguousarray(array).reshape(array.shape))
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_vectors_in_blocks_are_written_as_numpy_does(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 8))
    blocks = (vectors[start : start + 7] for start in range(0, 50, 7))
    assert write_vectors(tmp_path / "own.npy", blocks, 50, "float16") == (50, 8)
    np.save(tmp_path / "theirs.npy", vectors.astype(np.float16))
    assert (tmp_path / "own.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="/own.npy'"):
        (tmp_path / "own.npy").mkdir()
        write_array(tmp_path / "own.npy", np.ones(3))
    with (
        pytest.raises(FileNotFoundError, match="/weights'"),
        write_errors_name(tmp_path / "weights"),
    ):
        save_file({"a": torch.ones(2)}, tmp_path / "no folder" / "weights")
    with (
        pytest.raises(OSError, match="Input/output error: '/array'"),
        write_errors_name(Path("/array")),
    ):
        raise OSError("8 requested and 2 written")


def test_a_sealed_document_tells_every_change() -> None:
    document = {"rows": 3, "share": 0.1, "names": ["a", "\u00e9"], "inner": {"x": None}}
    read = json.loads(json.dumps(with_checksum(document)))
    assert not is_damaged(read) and not is_damaged(with_checksum(with_checksum(document)))
    for changed in ({"rows": 4}, {"share": 0.2}, {"inner": {}}, {"more": 1}):
        assert is_damaged(read | changed)
    assert not is_damaged(document), "those of before carry no hash"
