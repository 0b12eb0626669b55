"""Tests of the bank: what is stored comes back, what is broken is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lvm.bank.bank import UNKNOWN_ENCODER, Bank, open_bank, write_bank
from lvm.bank.row_table import TMD_LANES
from lvm.system.atomic import with_checksum
from lvm.system.seeding import generator
from tests.synthetic import make_bank, noise_bank, rotation, rotation_bank


def vectors(num_rows: int = 10, dim: int = 4) -> np.ndarray:
    return generator(0, "vectors").standard_normal((num_rows, dim)).astype(np.float32)


def row_table(num_rows: int = 10, **columns: object) -> pd.DataFrame:
    return pd.DataFrame({"sequence": ["a"] * num_rows, **columns})


def copy_of(bank: Bank, path: Path) -> Path:
    shutil.copytree(bank.path, path)
    return path


def edit_contents(path: Path, **changes: object) -> None:
    contents = json.loads((path / "bank.json").read_text())
    (path / "bank.json").write_text(json.dumps(with_checksum(contents | changes)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_written_bank_reads_back(tmp_path: Path, dtype: str) -> None:
    rows = pd.DataFrame(
        {
            "sequence": ["a"] * 4 + ["b"] * 6,
            "document": ["x", "x", "y", "y", "y", "y", "x", "x", "z", "z"],
            "lane": ["Law", None, "Art", "", "Law", "Law", "Law", "Art", "Art", "Art"],
            "text": [f"row {row}" for row in range(9)] + [None],
        }
    )
    bank = write_bank(tmp_path / "bank", vectors(), rows, "some-encoder", "a test", dtype)
    assert (bank.num_rows, bank.dim, bank.encoder, bank.created_by) == (
        10,
        4,
        "some-encoder",
        "a test",
    )
    np.testing.assert_array_equal(bank.vectors, vectors().astype(dtype))
    assert bank.sequences == ("a", "b")
    assert bank.sequence_N.tolist() == [0] * 4 + [1] * 6
    assert bank.documents == ("x", "y", "y", "x", "z")
    assert bank.document_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert bank.lanes == ("Art", "Law")
    assert bank.lane_N is not None
    assert bank.lane_N.tolist() == [1, -1, 0, -1, 1, 1, 1, 0, 0, 0]
    texts = bank.texts()
    assert texts is not None
    assert texts.tolist() == [*(f"row {row}" for row in range(9)), ""]
    assert bank.sequence_start_N().tolist() == [0] * 4 + [4] * 6
    table = bank.document_table()
    assert table["first_row"].tolist() == [0, 2, 4, 6, 8]
    assert table["num_rows"].tolist() == [2] * 5
    assert table["sequence"].tolist() == [0, 0, 1, 1, 1]
    assert table["document"].tolist() == [0, 1, 2, 3, 4]


def test_unit_normalises_any_shape_of_rows(tiny_bank: Bank) -> None:
    row_BT = np.array([[3, 0, 1439], [7, 7, 2]])
    unit_BTD = tiny_bank.unit(row_BT)
    assert unit_BTD.shape == (2, 3, 16) and unit_BTD.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit_BTD, axis=-1), 1, atol=1e-6)
    whole_ND = tiny_bank.unit(slice(None))
    np.testing.assert_array_equal(unit_BTD, whole_ND[row_BT])
    blocks = list(tiny_bank.unit_blocks(block=1000))
    assert [start for start, _ in blocks] == [0, 1000]
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), whole_ND)


def test_folder_is_memory_mapped(tiny_bank: Bank) -> None:
    assert isinstance(tiny_bank.vectors, np.memmap)


def test_blocks_make_the_same_bank_as_one_array(tmp_path: Path) -> None:
    whole = write_bank(tmp_path / "whole", vectors(), row_table(), "e", "t")
    blocks = (vectors()[start : start + 3] for start in range(0, 10, 3))
    assert write_bank(tmp_path / "blocks", blocks, row_table(), "e", "t").sha256 == whole.sha256


def test_vectors_may_come_in_every_form(tmp_path: Path) -> None:
    given = vectors(6)
    columns = {"sequence": [1, 1, 1, 2, 2, 2], "text": list("abcdef"), "score": [0.5] * 6}
    frame = pd.DataFrame(columns, index=[9, 8, 7, 6, 5, 4]).assign(embedding=list(given))
    forms = {
        "array and frame": (given, frame),
        "column and frame": (frame["embedding"], frame),
        "list and mapping": (given.tolist(), columns),
        "blocks and mapping": (iter([given[:4], given[4:]]), columns),
    }
    banks = [write_bank(tmp_path / name, *form, dtype="float32") for name, form in forms.items()]
    for bank in banks:
        np.testing.assert_array_equal(bank.vectors, given)
        assert bank.sequences == ("1", "2") and bank.sequence_N.tolist() == [0, 0, 0, 1, 1, 1]
        texts = bank.texts()
        assert texts is not None and texts.tolist() == list("abcdef")
    assert len({bank.sha256 for bank in banks}) == 1
    assert {bank.encoder for bank in banks} == {UNKNOWN_ENCODER}


def test_vectors_alone_are_one_sequence_and_documents_are_sequences(tmp_path: Path) -> None:
    alone = write_bank(tmp_path / "alone", vectors(3))
    assert alone.sequences == ("alone",) and alone.vectors.dtype == np.float16
    parts = write_bank(tmp_path / "parts", vectors(3), {"document": ["x", "y", "y"]})
    assert parts.sequences == ("x", "y")


def test_what_is_no_table_of_vectors_is_refused(tmp_path: Path) -> None:
    ragged = pd.Series([[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="vectors: not one list of numbers of one length a row"):
        write_bank(tmp_path / "bank", ragged)
    with pytest.raises(ValueError, match="vectors: not one list of numbers"):
        write_bank(tmp_path / "bank", pd.Series(["a", "b"]))
    with pytest.raises(ValueError, match="give a table beside vectors in blocks"):
        write_bank(tmp_path / "bank", iter([vectors(3)]))
    assert not (tmp_path / "bank").exists()


def test_identity_follows_the_contents_alone(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "a", vectors(), row_table(), "e", "t")
    moved = open_bank(shutil.move(bank.path, tmp_path / "b"))
    assert moved.sha256 == bank.sha256
    other = write_bank(tmp_path / "c", vectors()[::-1], row_table(), "e", "t")
    assert other.sha256 != bank.sha256


def test_without_documents_blocks_of_a_hundred_rows(tmp_path: Path) -> None:
    rows = pd.DataFrame({"sequence": ["a"] * 250 + ["b"] * 30})
    bank = write_bank(tmp_path / "bank", vectors(280), rows, "e", "t")
    assert bank.documents == ("block-000000", "block-000001", "block-000002", "block-000000")
    assert np.bincount(bank.document_N).tolist() == [100, 100, 50, 30]
    assert bank.lane_N is None and bank.lanes == () and bank.texts() is None


def test_pinned_rows_and_bases_are_read_back(tmp_path: Path) -> None:
    rows = pd.DataFrame({"sequence": ["a", "a", "b"], "split": [None, "", "train"]})
    bank = write_bank(tmp_path / "bank", vectors(3), rows, "e", "t", bases=("cafe",))
    assert bank.pinned_N.tolist() == [False, False, True]
    assert bank.bases == ("cafe",) and open_bank(tmp_path / "bank").bases == ("cafe",)
    plain = write_bank(tmp_path / "plain", vectors(3), rows[["sequence"]], "e", "t")
    assert not plain.pinned_N.any() and plain.bases == ()


@pytest.mark.parametrize("dtype", ["int64", "category", "object"])
def test_lane_numbers_become_names(dtype: str, tmp_path: Path) -> None:
    rows = row_table(4, lane=pd.Series([15, -1, 0, 15], dtype=dtype))
    bank = write_bank(tmp_path / "bank", vectors(4), rows, "e", "t")
    assert bank.lanes == ("Science", "Software") == (TMD_LANES[0], TMD_LANES[15])
    assert bank.lane_N is not None and bank.lane_N.tolist() == [1, -1, 0, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            pd.DataFrame({"sequence": ["a", "b", "a"]}),
            "'a' ends at row 0 and begins again at row 2",
        ),
        (pd.DataFrame({"sequence": [1, 2, 1]}), "'1' ends at row 0"),
        (row_table(3, document=["x", "y", "x"]), "document 'x' .*begins again at row 2"),
        (row_table(3, document=["x", None, "x"]), "1 rows without a document, first at row 1"),
        (pd.DataFrame({"sequence": ["a", "a", ""]}), "1 rows without a sequence"),
        (pd.DataFrame({"name": ["a", "a", "a"]}), "no column 'sequence'"),
        (row_table(3, lane=[0, 16, 3]), "1 lane numbers out of range, first 16 at row 1"),
        (row_table(3, lane=[0, -2, 3]), "first -2 at row 1"),
        (row_table(3, lane=[0, 1.5, 3]), "first 1.5 at row 1"),
        (row_table(3, split=[None, "test", "train"]), "split 'test' at row 1; only 'train'"),
        (row_table(3, split=["train", None, "train"]), "split 'train' in some rows only"),
        (pd.DataFrame({"sequence": []}), "no rows"),
        (row_table(4), "3 rows for a row table of 4"),
        (row_table(2), "rows 0 to 3 are"),
    ],
)
def test_broken_row_table_is_refused(tmp_path: Path, rows: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        write_bank(tmp_path / "bank", vectors(3), rows, "e", "t")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "2 non-finite rows of 10, first row 4"),
        (np.inf, "2 non-finite rows of 10, first row 4"),
        (1e6, "2 non-finite rows of 10, first row 4"),  # float16 ends at 65,504
        (0.0, "2 zero rows of 10, first row 4"),
    ],
)
def test_rows_without_direction_are_refused(tmp_path: Path, value: float, message: str) -> None:
    broken = vectors()
    broken[[4, 8]] = value
    with pytest.raises(ValueError, match=message):
        write_bank(tmp_path / "bank", broken, row_table(), "e", "t")
    assert not list(tmp_path.iterdir())


def test_opening_refuses_zero_rows_too(tmp_path: Path, tiny_bank: Bank) -> None:
    path = copy_of(tiny_bank, tmp_path / "bank")
    stored = np.load(path / "vectors.npy", mmap_mode="r+")
    stored[77] = 0
    stored.flush()
    with pytest.raises(ValueError, match="1 zero rows of 1440, first row 77"):
        open_bank(path)


def test_existing_bank_is_kept_unless_overwritten(tmp_path: Path) -> None:
    first = write_bank(tmp_path / "bank", vectors(), row_table(), "e", "t")
    with pytest.raises(ValueError, match="exists already"):
        write_bank(tmp_path / "bank", vectors(5), row_table(5), "e", "t")
    with pytest.raises(ValueError, match="rows for a row table"):
        write_bank(tmp_path / "bank", vectors(5), row_table(6), "e", "t", overwrite=True)
    assert open_bank(tmp_path / "bank", verify=True).sha256 == first.sha256
    second = write_bank(tmp_path / "bank", vectors(5), row_table(5), "e", "t", overwrite=True)
    assert second.num_rows == 5
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_folder_that_is_no_bank_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a bank folder, so it is not replaced"):
        write_bank(tmp_path, vectors(), row_table(), "e", "t", overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    def blocks() -> Iterator[np.ndarray]:
        yield vectors(5)
        raise RuntimeError("the encoder died")

    with pytest.raises(RuntimeError):
        write_bank(tmp_path / "bank", blocks(), row_table(), "e", "t")
    assert not list(tmp_path.iterdir())


def test_verify_finds_one_changed_bit(tmp_path: Path, tiny_bank: Bank) -> None:
    path = copy_of(tiny_bank, tmp_path / "bank")
    stored = np.load(path / "vectors.npy", mmap_mode="r+")
    stored[5, 3] *= 1.5
    stored.flush()
    open_bank(path)
    with pytest.raises(ValueError, match="vectors.npy: its sha256 differs"):
        open_bank(path, verify=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 99}, r"holds \(1440, 16\) float16, but bank.json says \(99, 16\)"),
        ({"dtype": "float32"}, "says .* float32"),
        ({"format": 7}, "format is 7"),
        ({"format": True}, "format is True"),
        ({"files": {}}, "files must give"),
        ({"files": {"vectors.npy": "x", "rows.parquet": 1}}, "what is no sha256"),
        ({"rows": 1440.0}, "must be whole numbers"),
        ({"encoder": {"a": 1}}, "must be text"),
    ],
)
def test_contents_that_disagree_are_refused(
    tmp_path: Path, tiny_bank: Bank, changes: dict, message: str
) -> None:
    path = copy_of(tiny_bank, tmp_path / "bank")
    edit_contents(path, **changes)
    with pytest.raises(ValueError, match=message):
        open_bank(path)


@pytest.mark.parametrize("name", ["vectors.npy", "rows.parquet", "bank.json"])
@pytest.mark.parametrize("keep", [None, 0, 50])
def test_missing_or_short_file_is_named(
    tmp_path: Path, tiny_bank: Bank, name: str, keep: int | None
) -> None:
    file = copy_of(tiny_bank, tmp_path / "bank") / name
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=name) as caught:
        open_bank(file.parent)
    assert "\n" not in str(caught.value)


def test_row_table_of_another_length_is_refused(tmp_path: Path, tiny_bank: Bank) -> None:
    path = copy_of(tiny_bank, tmp_path / "bank")
    rows = pd.read_parquet(path / "rows.parquet")
    rows.iloc[:-1].to_parquet(path / "rows.parquet")
    with pytest.raises(ValueError, match="1439 rows for 1440 vectors"):
        open_bank(path)


def test_vectors_of_another_kind_are_refused(tmp_path: Path, tiny_bank: Bank) -> None:
    for name, array, message in (
        ("double", tiny_bank.vectors.astype(np.float64), "are float64"),
        ("columns", np.asfortranarray(tiny_bank.vectors), "not in C order"),
        ("flat", np.asarray(tiny_bank.vectors).ravel(), "must be"),
    ):
        path = copy_of(tiny_bank, tmp_path / name)
        np.save(path / "vectors.npy", array)
        dim = array.shape[1] if array.ndim == 2 else 1
        edit_contents(path, rows=len(array), dim=dim, dtype=array.dtype.name)
        with pytest.raises(ValueError, match="vectors.npy") as caught:
            open_bank(path)
        assert message in str(caught.value) or "holds" in str(caught.value)


def test_nothing_at_the_path_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder or .npz file"):
        open_bank(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no bank.json"):
        open_bank(tmp_path)


def test_npz_with_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "old.npz"
    np.savez(
        path,
        vectors=vectors(4),
        concept_texts=np.array(["one", "two", "three", "four"]),
        tmd_lanes=np.array([0, 15, 15, 2]),
        chain_ids=np.array([7, 7, 3, 3]),
        cpe_ids=np.array(["a", "b", "c", "d"]),
    )
    bank = open_bank(path)
    assert bank.sequences == ("7", "3") and bank.sequence_N.tolist() == [0, 0, 1, 1]
    assert bank.lanes == ("Science", "Software", "Technology")
    assert bank.lane_N is not None and bank.lane_N.tolist() == [0, 1, 1, 2]
    texts = bank.texts()
    assert texts is not None and texts.tolist() == ["one", "two", "three", "four"]
    assert len(bank.sha256) == 64
    np.testing.assert_array_equal(bank.vectors, vectors(4))


def test_npz_of_vectors_alone_is_one_sequence(tmp_path: Path) -> None:
    np.savez(tmp_path / "book.npz", vectors=vectors(120))
    bank = open_bank(tmp_path / "book.npz")
    assert bank.sequences == ("book",) and bank.documents == ("block-000000", "block-000001")
    assert bank.lane_N is None and bank.texts() is None


def test_npz_with_the_names_of_a_row_table(tmp_path: Path) -> None:
    columns = {
        "sequence": np.array(["a", "a", "b", "b"]),
        "document": np.array([1, 2, 1, 1]),
        "lane": np.array(["Law", "", "Art", "Art"]),
        "text": np.array(["one", "two", "three", "four"]),
    }
    np.savez(tmp_path / "mine.npz", vectors=vectors(4), **columns, matrix=np.ones((4, 4)))
    bank = open_bank(tmp_path / "mine.npz")
    assert bank.sequences == ("a", "b") and bank.sequence_N.tolist() == [0, 0, 1, 1]
    assert bank.documents == ("1", "2", "1") and bank.document_N.tolist() == [0, 1, 2, 2]
    assert bank.lanes == ("Art", "Law")
    texts = bank.texts()
    assert texts is not None and texts.tolist() == columns["text"].tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sequences": np.array(["a", "a", "b"])}, "name it one of sequence, document, lane, text"),
        ({"labels": np.array(["a", None, "b"], dtype=object)}, "'labels' has a value a row"),
        ({"lane": np.arange(3), "tmd_lanes": np.arange(3)}, "lane and tmd_lanes, the same column"),
        ({"text": np.arange(3)}, "text holds int64"),
        ({"concept_texts": np.array(["a", None, "b"], dtype=object)}, "pickled objects"),
        ({"tmd_lanes": np.array([0, 99, 1])}, "first 99 at row 1"),
        ({"tmd_lanes": np.array([0, 1])}, r"tmd_lanes is \(2,\); it must be \(3,\)"),
        ({"chain_ids": np.array([1, 2, 1])}, "begins again at row 2"),
        ({"vectors": np.zeros((3, 4), np.float32)}, "3 zero rows"),
        ({"vectors": np.ones((3, 4), np.int64)}, "are int64"),
    ],
)
def test_broken_npz_is_refused(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "old.npz", **({"vectors": vectors(3)} | arrays))
    with pytest.raises(ValueError, match=message):
        open_bank(tmp_path / "old.npz")


def test_npz_without_vectors_or_not_an_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    with pytest.raises(ValueError, match="no array 'vectors'"):
        open_bank(tmp_path / "a.npz")
    for name, contents in (("b.npz", b"PK\x03\x04nonsense"), ("c.npz", b"plain text")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(ValueError, match=name):
            open_bank(tmp_path / name)


def test_synthetic_banks_are_what_they_claim(tmp_path: Path, tiny_bank: Bank) -> None:
    assert (tiny_bank.num_rows, tiny_bank.dim, len(tiny_bank.lanes)) == (1440, 16, 3)
    assert make_bank(tmp_path / "again").sha256 == tiny_bank.sha256
    assert make_bank(tmp_path / "other", seed=1).sha256 != tiny_bank.sha256
    unit_ND = tiny_bank.unit(slice(0, 240))
    assert np.mean(np.sum(unit_ND[1:] * unit_ND[:-1], axis=1)) > 0.6
    turned = rotation_bank(tmp_path / "turned").unit(slice(0, 240))
    np.testing.assert_allclose(turned[1:], turned[:-1] @ rotation(16).T, atol=1e-6)
    noise = noise_bank(tmp_path / "noise").unit(slice(None))
    assert abs(np.mean(np.sum(noise[1:] * noise[:-1], axis=1))) < 0.05


def test_contents_that_differ_from_their_own_hash_are_refused(
    tmp_path: Path, tiny_bank: Bank
) -> None:
    path = copy_of(tiny_bank, tmp_path / "bank")
    contents = json.loads((path / "bank.json").read_text())
    (path / "bank.json").write_text(json.dumps(contents | {"encoder": "another"}))
    with pytest.raises(ValueError, match="bank.json: differs from the sha256 in it"):
        open_bank(path)
    del contents["contents_sha256"]
    (path / "bank.json").write_text(json.dumps(contents))
    assert open_bank(path).sha256 == tiny_bank.sha256, "banks of before have no such hash"


def test_a_refused_bank_is_named_by_its_own_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bank .*mine: vectors.npy: 1 zero rows") as refusal:
        write_bank(tmp_path / "mine", np.array([[1.0, 2.0], [0.0, 0.0]]))
    assert "scratch" not in str(refusal.value) and not (tmp_path / "mine").exists()


def test_a_tensor_is_written_like_an_array(tmp_path: Path) -> None:
    bank = write_bank(tmp_path / "mine", torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert bank.vectors.tolist() == [[1.0, 2.0], [2.0, 1.0]]
