"""Hugging Face datasets as a source: hf:<name or folder>[:split], streamed (extra `datasets`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa

from lvm.bank.vector_tables import BATCH_ROWS, VectorTable, arrow_table
from lvm.system.settings import parse_json, read_small_text

PREFIX = "hf:"
DEFAULT_SPLIT = "train"
SPLITS, STATE = "dataset_dict.json", "state.json"  # of save_to_disk
# Raised by the hub's client, file systems and parsers, beyond the errors that `datasets` declares.
LIBRARY_ERRORS = (
    pa.ArrowException,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@cache
def hub_builder(datasets: ModuleType, name: str) -> Any:
    """Return the reader of a hub dataset, at one commit for the whole command."""
    return datasets.load_dataset_builder(name)


class HuggingFaceSource:
    """One split of a dataset: on the hub, a folder of files, or a folder of save_to_disk.

    Raises ValueError if the library is missing or the dataset cannot be opened.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        name, _, split = source.removeprefix(PREFIX).rpartition(":")
        if not name or "/" in split:
            name, split = source.removeprefix(PREFIX), ""
        self.name, self.split = name, split
        self.folder = Path(name) if Path(name).is_dir() else None

    @property
    def stem(self) -> str:
        """Return the name of the sequence of rows that name none."""
        return Path(self.name).name

    def revision(self) -> str:
        """Return the commit of a dataset on the hub; "" for a folder."""
        if self.folder is not None:
            return ""
        with self._refusing() as datasets:
            return str(hub_builder(datasets, self.name).hash or "")

    def vectors(self) -> VectorTable | None:
        """Return the dataset as a table of vectors; None if it has no column of vectors."""
        dataset = self._open()
        if dataset.features is None:
            schema = next(iter(dataset.with_format("arrow").iter(1))).schema
        else:
            schema = dataset.features.arrow_schema
        return arrow_table(self.source, schema, lambda names: self._batches(names))

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place, row) of each row."""
        for number, row in enumerate(self._open()):
            yield f"{self.source} row {number}", row

    def _batches(self, names: list[str]) -> Iterator[pa.Table]:
        dataset = self._open().select_columns(names).with_format("arrow")
        yield from dataset.iter(BATCH_ROWS)

    def _open(self) -> Any:
        with self._refusing() as datasets:
            if saved := self._saved_files():
                # Streamed: the pages that load_from_disk maps would count as memory.
                found = datasets.load_dataset("arrow", data_files=saved, streaming=True)
            elif self.folder is not None:
                found = datasets.load_dataset(self.name, streaming=True)
            else:
                found = hub_builder(datasets, self.name).as_streaming_dataset()
        if not isinstance(found, dict):
            return found
        split = self.split or (DEFAULT_SPLIT if DEFAULT_SPLIT in found else "")
        if not split and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise ValueError(
                f"source {self.source}: has the splits {', '.join(map(str, found))}; give one as "
                f"{PREFIX}{self.name}:<split>"
            )
        return found[split]

    @contextmanager
    def _refusing(self) -> Iterator[Any]:
        """Yield the library; errors while a dataset is opened become ValueError."""
        try:
            import datasets
            from datasets.exceptions import DatasetsError
            from huggingface_hub.errors import HTTPError
        except ImportError as error:
            raise ValueError(
                f"source {self.source}: needs the library datasets; install it with "
                "`pip install -e .[datasets]`"
            ) from error
        try:
            yield datasets
        except (DatasetsError, HTTPError, *LIBRARY_ERRORS) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"source {self.source}: cannot be opened ({reason}); give a dataset's name or "
                "folder, then :<split> if it has several"
            ) from error

    def _saved_files(self) -> dict[str, list[str]]:
        """Return the Arrow files of each split written by save_to_disk; empty for other sources."""
        if self.folder is None:
            return {}
        if (self.folder / SPLITS).is_file():
            names = parse_json(read_small_text(self.folder / SPLITS))["splits"]
            folders = {name: self.folder / name for name in names}
        elif (self.folder / STATE).is_file():
            folders = {DEFAULT_SPLIT: self.folder}
        else:
            return {}
        states = {name: parse_json(read_small_text(at / STATE)) for name, at in folders.items()}
        return {
            name: [str(folders[name] / one["filename"]) for one in state["_data_files"]]
            for name, state in states.items()
        }
