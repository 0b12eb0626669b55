"""Damaged files: each is refused in one line or made anew, none is read as another than it was."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvm.bank.bank import Bank, open_bank
from lvm.models.facts import facts_of
from lvm.models.table import build_model
from lvm.models.weights import Fit, cached_fit, load_model, optimizer_tensors, save_model
from lvm.retrieval.hubness import fit_hubness
from lvm.retrieval.index import build_index, ensure_index, open_index, write_index
from lvm.retrieval.rerank import Reranker, fit_reranker
from lvm.shadow.replay import (
    Questions,
    measure,
    measurement_path,
    read_measurement,
    write_measurement,
)
from lvm.system.atomic import Entry, read_entry, write_array, write_entry
from lvm.tracking import logged_models, runs
from lvm.training.checkpoint import Progress, StateFile
from lvm.windows.export import open_windows, plan_windows, write_windows
from lvm.windows.planning import Windows
from tests.faults.commands import Command
from tests.synthetic import make_bank

pytestmark = pytest.mark.faults
CTX, FLIPS = 20, 120
SIZES = {"model": "memory_gru", "dim": 16, "hidden": 8, "layers": 2, "chunk": 5, "slots": 2}
Read = Callable[[], Any]


def damaged(path: Path, flips: int = FLIPS) -> Iterator[str]:
    """Damage a file in one way after the other: bytes flipped, cut short, emptied, deleted."""
    whole = path.read_bytes()
    places = np.unique(np.linspace(0, len(whole) - 1, flips).astype(int))
    edges = range(min(16, len(whole)))
    for place in sorted({*places.tolist(), *edges, *(len(whole) - 1 - edge for edge in edges)}):
        for bit in (0x01, 0x80):
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :],
            )
            yield f"{path.name}: bit {bit:#x} of byte {place}"
    for size in sorted({0, 1, 8, len(whole) // 2, len(whole) - 1}):
        path.write_bytes(whole[:size])
        yield f"{path.name}: cut to {size} bytes"
    path.unlink()
    yield f"{path.name}: deleted"
    path.write_bytes(whole)


def survive(tally, kind: str, paths: list[Path], read: Read, flips: int = FLIPS) -> None:
    """Damage each file in each way; `read` must refuse it in one line or give what it gave before.

    None is a cache that is made anew.
    """
    whole = read()
    assert whole is not None
    for path in paths:
        refused = 0
        for what in damaged(path, flips):
            with tally.injecting(f"damaged file: {kind}"):
                refused += is_refused(read, whole, what)
        assert refused > flips, f"{path}: {refused} refused"
    assert read() == whole


def is_refused(read: Read, whole: Any, what: str) -> bool:
    try:
        found = read()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 20, (what, error)
        return True
    assert found is None or found == whole, what
    return found is None


def plain(value: Any) -> Any:
    """Return a value that can be compared whole: arrays and tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return make_bank(tmp_path / "bank")


@pytest.fixture
def windows(bank: Bank, tmp_path: Path) -> Windows:
    return write_windows(plan_windows(bank, CTX), tmp_path / "windows")


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(SIZES).eval()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_bank(tally, bank):
    def read() -> Any:
        found = open_bank(bank.path, verify=True)
        return plain(found) | {"texts": list(found.texts())}

    assert len(files(bank.path)) == 3
    survive(tally, "bank", files(bank.path), read)


def test_windows(tally, bank, windows):
    survive(
        tally, "windows", files(windows.folder), lambda: plain(open_windows(windows.folder, bank))
    )


def test_training_state(tally, model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = StateFile(tmp_path / "state", "identity")
    parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    state.write(parts, Progress(step=7, history=[{"epoch": 1.0, "loss": 2.5}], losses=[0.1]))
    survive(tally, "training state", [tmp_path / "state"], lambda: plain(state.read()))


def test_scaling_cell(tally, tmp_path):
    path, facts = tmp_path / "cell.safetensors", {"parameters": 10, "loss": 0.5}
    write_entry(path, "ab" * 32, Entry({"rank_Q": np.arange(50, dtype=np.float64)}, facts))

    def read() -> Any:
        found = read_entry(path, "ab" * 32)
        return None if found is None else plain(found)

    survive(tally, "scaling cell", files(tmp_path), read)


def test_fits(tally, windows):
    values = {"decay": 0.75}
    cached_fit(windows, "mean", {}, lambda: Fit({"a": torch.arange(99.0)}, values))
    (path,) = files(windows.folder / "fits")
    whole = path.read_bytes()

    def read() -> Any:
        found = cached_fit(windows, "mean", {}, lambda: Fit(values={"made": "anew"}))
        if found.values == {"made": "anew"}:
            path.write_bytes(whole)
            return None
        return plain(found)

    survive(tally, "fit", [path], read)


def test_replay_store(tally, bank, windows, model, tmp_path):
    queries = windows.queries["test"].head(40)
    found = measure(model, Questions(bank, windows.representative_N, queries, queries))
    path = measurement_path(tmp_path / "replays", "ab" * 32)
    write_measurement(path, "ab" * 32, found)

    def read() -> Any:
        stored = read_measurement(path, "ab" * 32)
        if stored is None:
            return None
        return plain(vars(stored) | {"ranks": stored.ranks.to_numpy()})

    survive(tally, "replay store", [path], read)


def test_index_cache(tally, bank, windows, model, tmp_path, monkeypatch):
    path = tmp_path / "index"

    def predictions() -> np.ndarray:
        return bank.unit(windows.queries["val"].target_row_Q)

    write_index(build_index(bank, predictions, sizes=(10, 20)), path)

    def read() -> Any:
        found = open_index(path, bank)
        return plain(found.facts), plain(list(found.search(bank.unit(slice(0, 5)), 3)))

    survive(tally, "index cache", files(path), read, flips=60)
    monkeypatch.chdir(tmp_path)
    write_windows(windows, tmp_path / "data/windows/ctx20")
    facts = facts_of("memory_gru", "none", bank, windows)
    first = ensure_index(bank, model, facts).search(bank.unit(slice(0, 5)), 3)
    (contents,) = Path("data/index").glob("*/index.json")
    with tally.injecting("damaged file: index cache"):
        contents.write_text("{}")
        assert plain(list(ensure_index(bank, model, facts).search(bank.unit(slice(0, 5)), 3))) == (
            plain(list(first))
        )


def test_model_folder(tally, bank, windows, model, tmp_path):
    correction = fit_hubness(model, bank, windows).row_correction
    reranker = fit_reranker(model, bank, windows, correction)
    beside = {"row_correction.npy": lambda path: write_array(path, correction)}
    folder = save_model(model, tmp_path / "model", beside | {"lanes.safetensors": reranker.save})

    def read() -> Any:
        found = load_model(folder)
        own = plain(dict(found.state_dict())), found.config
        lanes = plain(Reranker.load(folder / "lanes.safetensors"))
        return own, plain(np.load(folder / "row_correction.npy")), lanes

    assert len(files(folder)) == 4
    survive(tally, "model", files(folder), read)


def test_logged_model(tally, store, bank, windows, model):
    """As MLflow keeps it; a free predictor is all configuration, so that no weight would tell."""
    correction = fit_hubness(model, bank, windows).row_correction
    reranker = fit_reranker(model, bank, windows, correction)
    facts = facts_of("memory_gru", "none", bank, windows)
    with runs.run("train", {}):
        trained = logged_models.log_predictor(model, facts, correction, 1, reranker)
        ema = build_model({"model": "ema", "dim": 16, "decay": 0.5})
        free = logged_models.log_predictor(ema, facts_of("ema", "none", bank, windows))
    for model_id, num_files in ((trained, 4), (free, 2)):
        (weights,) = store.rglob(f"{model_id}/artifacts/artifacts/model.safetensors")

        def read(model_id: str = model_id) -> Any:
            found = logged_models.load(f"models:/{model_id}")
            own = plain(dict(found.model.state_dict())), found.model.config
            return own, plain(found.row_correction), plain(found.reranker)

        assert len(files(weights.parent)) == num_files
        for path in files(weights.parent):
            whole, before, refused = path.read_bytes(), read(), 0
            places = [0, len(whole) // 3, len(whole) // 2, len(whole) - 2]
            wrong = [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in places]
            for contents in (*wrong, whole[:-3], b""):
                path.write_bytes(contents)
                with tally.injecting("damaged file: logged model"):
                    refused += is_refused(read, before, path.name)
            assert refused >= 5, path
            path.unlink()
            with tally.injecting("damaged file: logged model"):
                assert is_refused(read, before, path.name)
            path.write_bytes(whole)


def test_commands_refuse_a_damaged_bank(tally, bank, empty_store, tmp_path):
    """One flipped bit in a vector that stays finite, of the right length, of the right type."""
    (tmp_path / "store").mkdir()
    shutil.copy(empty_store, tmp_path / "store/mlflow.db")
    where = (tmp_path, f"sqlite:///{tmp_path}/store/mlflow.db", tmp_path / "logs")
    train = ("train", "--epochs", "1", "--max-steps", "2", "--hidden", "8", "--layers", "2")
    train += (
        "--model",
        "memory_gru",
        "--slots",
        "2",
        "--chunk",
        "5",
        "--bank",
        "bank",
        "--ctx",
        "20",
    )
    assert Command(*where, *train).ended().code == 0
    vectors = bank.path / "vectors.npy"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-32] + bytes([whole[-32] ^ 1]) + whole[-31:])
    asked = [train, ("export", "--bank", "bank", "--ctx", "20"), ("shadow_eval",)]
    asked += [("eval", "--model", "models:/lvm/1"), ("ingest", "--source", "bank", "--bank", "two")]
    for words in asked:
        with tally.injecting("damaged file: bank"):
            assert "vectors.npy: its sha256 differs" in Command(*where, *words).ended().line()
    vectors.write_bytes(whole)
    assert Command(*where, "export", "--bank", "bank", "--ctx", "20").ended().code == 0
