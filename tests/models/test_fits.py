"""A fit is run once, what is kept of it is trusted only where it is whole."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lvm.bank.bank import Bank
from lvm.evaluation.free_predictors import fit_ridge, tuned_decay
from lvm.models.baselines import MovingAverage
from lvm.models.weights import Fit, cached_fit, model_digest
from lvm.retrieval.hubness import fit_hubness
from lvm.windows.export import open_windows, plan_windows, write_windows
from lvm.windows.planning import Windows


@pytest.fixture
def windows(tiny_bank: Bank, tmp_path: Path) -> Windows:
    return write_windows(plan_windows(tiny_bank, 30), tmp_path / "windows")


class Fitting:
    """A fit that counts how often it is run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> Fit:
        self.runs += 1
        return Fit({"a": torch.arange(1000, dtype=torch.float16), "b": torch.eye(2)}, {"c": 0.25})


def kept_files(windows: Windows) -> list[Path]:
    assert windows.folder is not None
    return sorted((windows.folder / "fits").iterdir())


def test_a_fit_is_run_once_for_the_same_inputs(windows: Windows, tiny_bank: Bank):
    fit = Fitting()
    first = cached_fit(windows, "mean", {"seed": 0}, fit)
    assert windows.folder is not None
    again = cached_fit(open_windows(windows.folder, tiny_bank), "mean", {"seed": 0}, fit)
    assert fit.runs == 1
    assert again.values == first.values == {"c": 0.25}
    for name, tensor in first.tensors.items():
        assert torch.equal(again.tensors[name], tensor)
        assert again.tensors[name].dtype == tensor.dtype
    assert len(kept_files(windows)) == 1


def test_every_input_makes_another_fit(windows: Windows):
    fit = Fitting()
    other_plan = dataclasses.replace(windows, sha256="other")
    other_bank = dataclasses.replace(windows, bank_sha256="other")
    cached_fit(windows, "mean", {"seed": 0}, fit)
    cached_fit(windows, "mean", {"seed": 1}, fit)
    cached_fit(windows, "median", {"seed": 0}, fit)
    cached_fit(other_plan, "mean", {"seed": 0}, fit)
    cached_fit(other_bank, "mean", {"seed": 0}, fit)
    assert fit.runs == len(kept_files(windows)) == 5


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "bare", "empty"])
def test_a_file_that_is_not_whole_is_never_trusted(windows: Windows, damage: str):
    fit = Fitting()
    cached_fit(windows, "mean", {"seed": 0}, fit)
    (path,) = kept_files(windows)
    whole = path.read_bytes()
    if damage == "foreign":
        cached_fit(windows, "mean", {"seed": 1}, Fitting())
        (other,) = set(kept_files(windows)) - {path}
        path.write_bytes(other.read_bytes())
    elif damage == "bare":
        save_file({"a": torch.ones(3)}, path)
    else:
        flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
        path.write_bytes({"cut": whole[:-9], "flipped": flipped, "empty": b""}[damage])
    assert path.read_bytes() != whole
    assert cached_fit(windows, "mean", {"seed": 0}, fit).values == {"c": 0.25}
    assert fit.runs == 2
    cached_fit(windows, "mean", {"seed": 0}, fit)
    assert fit.runs == 2, "the damaged file was replaced"


def test_nothing_is_kept_without_a_folder_that_can_be_written(windows: Windows):
    fit = Fitting()
    homeless = dataclasses.replace(windows, folder=None)
    for _ in range(2):
        cached_fit(homeless, "mean", {}, fit)
    assert fit.runs == 2
    assert windows.folder is not None
    (windows.folder / "fits").write_text("in the way of the folder")
    assert cached_fit(windows, "mean", {}, fit).values == {"c": 0.25}


def test_kept_predictors_equal_fitted_ones(windows: Windows, tiny_bank: Bank):
    fresh = dataclasses.replace(windows, folder=None)
    for one in (windows, windows):
        ridge, expected = fit_ridge(tiny_bank, one), fit_ridge(tiny_bank, fresh)
        assert ridge.config == expected.config
        assert torch.equal(ridge.weight, expected.weight)
        assert torch.equal(ridge.bias, expected.bias)
        assert tuned_decay(tiny_bank, one) == tuned_decay(tiny_bank, fresh)
        found, wanted = (fit_hubness(ridge, tiny_bank, plan) for plan in (one, fresh))
        assert found.beta == wanted.beta
        assert np.array_equal(found.row_correction, wanted.row_correction)
    assert [path.name.rpartition("-")[0] for path in kept_files(windows)] == [
        "ema",
        "hubness",
        "ridge",
    ]


def test_the_digest_tells_predictors_apart():
    assert model_digest(MovingAverage(4, 0.5)) == model_digest(MovingAverage(4, 0.5))
    assert model_digest(MovingAverage(4, 0.5)) != model_digest(MovingAverage(4, 0.6))
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    assert model_digest(first) == model_digest(second)
    with torch.no_grad():
        second.bias[1] += 1e-6
    assert model_digest(first) != model_digest(second)
