"""Arrays in .npy or .npz files: what is read, what is refused before it costs anything."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lvm.bank import files
from lvm.bank.files import Pickled, map_array, read_arrays

ARRAYS = {"a": np.arange(12.0).reshape(3, 4), "b": np.array(["x", "yé"]), "c": np.zeros(0)}


def npy(array: np.ndarray) -> bytes:
    opened = io.BytesIO()
    np.save(opened, array)
    return opened.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_known_arrays_are_read(save, tmp_path: Path) -> None:
    save(tmp_path / "x.npz", **ARRAYS, other=np.array([None]))
    found = read_arrays(tmp_path / "x.npz", ("a", "b", "c", "missing"))
    assert list(found) == ["a", "b", "c"]
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    with pytest.raises(Pickled, match="other.npy holds pickled objects"):
        read_arrays(tmp_path / "x.npz", ("other",))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.npy", "a"], "holds 'a' twice"),
        (["../a.npy"], "holds '../a.npy', a path"),
        (["/etc/a.npy"], "a path"),
        ([".."], "a path"),
    ],
)
def test_names_are_names(names: list[str], reason: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as opened:
        for name in names:
            opened.writestr(name, npy(ARRAYS["a"]))
    with pytest.raises(ValueError, match=reason):
        read_arrays(tmp_path / "x.npz", ("a",))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (npy(ARRAYS["a"]).replace(b"(3, 4)", b"(9, 9)"), "says it has 776 bytes, but has 224"),
        (npy(ARRAYS["a"])[:-1], "says it has 224 bytes, but has 223"),
        (b"no array", "not a readable .npz file"),
    ],
)
def test_an_array_is_as_large_as_it_says(raw: bytes, reason: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as opened:
        opened.writestr("a.npy", raw)
    with pytest.raises(ValueError, match=reason):
        read_arrays(tmp_path / "x.npz", ("a",))
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(ValueError, match="not a whole .npy array"):
        map_array(tmp_path / "x.npy")


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**20))
    assert read_arrays(tmp_path / "x.npz", ("a",))["a"].shape == (2**20,)
    monkeypatch.setattr(files, "FREE_BYTES", 2**20)
    with pytest.raises(ValueError, match="as zip bombs do; store it by np.savez"):
        read_arrays(tmp_path / "x.npz", ("a",))
    np.savez(tmp_path / "x.npz", a=np.zeros(2**20))
    assert read_arrays(tmp_path / "x.npz", ("a",))["a"].shape == (2**20,)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=ARRAYS["a"])
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(ValueError, match="is an archive"):
        map_array(tmp_path / "x.npy")
    for name in ("none.npy", "."):
        with pytest.raises(ValueError, match="missing, or not a regular file"):
            map_array(tmp_path / name)
    np.save(tmp_path / "good.npy", ARRAYS["a"])
    assert np.array_equal(map_array(tmp_path / "good.npy"), ARRAYS["a"])
