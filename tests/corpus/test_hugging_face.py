"""Hugging Face datasets: folders that save_to_disk wrote, folders of data files, splits."""

from pathlib import Path

import datasets
import numpy as np
import pytest

from lvm.bank import vector_tables
from lvm.bank.bank import open_bank
from lvm.corpus import hugging_face
from lvm.corpus.ingest import ingest

VECTORS = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
COLUMNS = {
    "document": [7, 7, 7, 7, 8, 8, 8],
    "chunk_index": [3, 2, 1, 0, 0, 1, 2],
    "text": list("abcdefg"),
    "embedding": VECTORS.tolist(),
}
ORDER = [3, 2, 1, 0, 4, 5, 6]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vector_tables, hugging_face):
        monkeypatch.setattr(module, "BATCH_ROWS", 3)


def written(way: str, columns: dict, folder: Path) -> Path:
    """Write a dataset in one of the ways that its library has."""
    dataset = datasets.Dataset.from_dict(columns)
    if way == "save_to_disk":
        dataset.save_to_disk(folder, num_shards=2)
        (folder / "cache-0.arrow").write_bytes(b"what map left there")
    elif way == "splits":
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder)
    else:
        folder.mkdir()
        dataset.to_parquet(folder / "data.parquet")
    return folder


@pytest.mark.parametrize("way", ["save_to_disk", "splits", "parquet"])
def test_a_dataset_of_vectors_becomes_a_bank(way: str, tmp_path: Path) -> None:
    folder = written(way, COLUMNS, tmp_path / "set")
    report = ingest(f"hf:{folder}", "some/encoder", tmp_path / "bank")
    bank = open_bank(tmp_path / "bank", verify=True)
    np.testing.assert_allclose(bank.vectors, VECTORS[ORDER], rtol=1e-6)
    assert bank.sequences == ("7", "8") and bank.encoder == "some/encoder"
    texts = bank.texts()
    assert texts is not None and "".join(texts) == "dcbaefg"
    assert "rows are in the order of the column chunk_index" in report.notes
    assert ingest(f"hf:{folder}", "some/encoder", tmp_path / "bank").reused


@pytest.mark.parametrize("way", ["save_to_disk", "parquet"])
def test_a_dataset_of_texts_is_encoded(way: str, tmp_path: Path) -> None:
    texts = ["The river runs past the mill.", "Nobody saw it.", "A third row of text."]
    columns = {"text": texts, "sequence": ["a", "a", "b"], "label": [0, 1, 0]}
    folder = written(way, columns, tmp_path / "set")
    report = ingest(f"hf:{folder}", None, tmp_path / "bank")
    assert report.encoder == "wordllama" and report.sequences == {"a": 2, "b": 1}
    found = open_bank(tmp_path / "bank").texts()
    assert found is not None and found.tolist() == texts


def test_a_split_is_chosen_by_its_name(tmp_path: Path) -> None:
    folder = written("splits", COLUMNS, tmp_path / "set")
    assert ingest(f"hf:{folder}:test", None, tmp_path / "bank").rows == 1
    with pytest.raises(ValueError, match="has the splits train, test; give one as hf:"):
        ingest(f"hf:{folder}:dev", None, tmp_path / "other")


def test_what_is_no_dataset_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "surely/not-a-dataset"):
        with pytest.raises(ValueError, match="source hf:.*: cannot be opened") as caught:
            ingest(f"hf:{name}", None, tmp_path / "bank")
        assert "\n" not in str(caught.value)
    folder = written("parquet", {"label": [1, 2]}, tmp_path / "set")
    with pytest.raises(ValueError, match='row 0: must be an object with a string "text"'):
        ingest(f"hf:{folder}", None, tmp_path / "bank")


def test_a_dataset_on_the_hub_is_told_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of another commit is not taken for this one; one command reads one commit."""
    builder = datasets.load_dataset_builder(str(written("parquet", COLUMNS, tmp_path / "set")))
    asked: list[str] = []

    def hub(name: str) -> datasets.DatasetBuilder:
        asked.append(name)
        builder.hash = "c" * 40 if name == "me/set" else "d" * 40
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", hub)
    report = ingest("hf:me/set", None, tmp_path / "bank")
    assert report.rows == 7 and report.created_by.endswith(f"; revision={'c' * 40}")
    assert open_bank(tmp_path / "bank").created_by == report.created_by
    assert asked == ["me/set"] and ingest("hf:me/set", None, tmp_path / "bank").reused
    hugging_face.hub_builder.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: hub("another"))
    with pytest.raises(ValueError, match="holds something else .*revision=dddd"):
        ingest("hf:me/set", None, tmp_path / "bank")
    hugging_face.hub_builder.cache_clear()
