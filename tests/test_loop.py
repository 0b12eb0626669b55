"""The closed loop's own steps: what is held back, which run's answers are read."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from benchmarks import loop
from benchmarks.loop import LATE, hold_back, run_of
from lvm.bank.bank import Bank, open_bank
from lvm.tracking import runs


def early_documents(bank: Bank, lane: str) -> int:
    """Count the lane's documents that begin in the first four fifths of their sequence."""
    table = bank.document_table()
    first = table["first_row"].to_numpy()
    place = (first - bank.sequence_start_N()[first]) / np.bincount(bank.sequence_N)[0]
    assert bank.lane_N is not None
    return int(((bank.lane_N[first] == bank.lanes.index(lane)) & (place < LATE)).sum())


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.4, 0.5, 0.7, 0.95])
def test_exactly_the_share_is_held_back(tiny_bank: Bank, tmp_path: Path, keep: float) -> None:
    hold_back(tiny_bank, "lane-1", keep, tmp_path)
    base, pool = (open_bank(tmp_path / name, verify=True) for name in ("base", "pool"))
    early = early_documents(tiny_bank, "lane-1")
    assert early == 20 and pool.lanes == ("lane-1",)
    assert len(pool.document_table()) == early - round(keep * early)
    assert base.num_rows + pool.num_rows == tiny_bank.num_rows
    texts = tiny_bank.texts()
    assert texts is not None
    assert set(base.texts()) | set(pool.texts()) == set(texts)
    order = {text: row for row, text in enumerate(texts)}
    assert [order[text] for text in base.texts()] == sorted(order[text] for text in base.texts())


@pytest.mark.parametrize("lost", ["base", "pool"])
def test_a_stop_between_the_two_banks_is_repaired(
    tiny_bank: Bank, tmp_path: Path, lost: str
) -> None:
    hold_back(tiny_bank, "lane-1", 0.4, tmp_path)
    before = {name: open_bank(tmp_path / name).sha256 for name in ("base", "pool")}
    (tmp_path / lost).rename(tmp_path / "moved")
    hold_back(tiny_bank, "lane-1", 0.4, tmp_path)
    assert {name: open_bank(tmp_path / name).sha256 for name in before} == before
    with pytest.raises(ValueError, match="pool: holds something else .not keep=0.5"):
        hold_back(tiny_bank, "lane-1", 0.5, tmp_path)


@pytest.mark.parametrize("keep", [-0.1, 1.0, 7.0, float("nan")])
def test_a_share_out_of_range_is_refused_in_one_line(
    tiny_bank: Bank, tmp_path: Path, keep: float
) -> None:
    words = ["--bank", str(tiny_bank.path), "--lane", "lane-1", "--folder", str(tmp_path / "out")]
    done = CliRunner().invoke(loop.main, [*words, "--keep", str(keep)])
    assert done.exit_code != 0
    assert done.output == f"Error: keep: {keep:g} must be a share from 0 to below 1\n"
    assert not list((tmp_path / "out").iterdir())


def test_a_lane_that_loses_nothing_is_refused(tiny_bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: 0.99 of 20 documents of lane-1 leaves none"):
        hold_back(tiny_bank, "lane-1", 0.99, tmp_path)
    with pytest.raises(ValueError, match="lane: 'Art' is not one of lane-0, lane-1, lane-2"):
        hold_back(tiny_bank, "Art", 0.2, tmp_path)


def evaluated(report: Path, hit: float, model: str = "models:/lvm/1", split: str = "val") -> str:
    """Log what an eval logs, in a run of its own; return the run's id."""
    parameters = {"report": str(report), "model": model, "split": split}
    with runs.run("eval", parameters) as run_id:
        contents = {"hit_at_5": hit, "split": split, "bank_sha256": "cafe"}
        runs.log_artifact(contents, "report.json")
        report.write_text(json.dumps(contents))
        table = pd.DataFrame({"target_row": [1], "rank": [hit]})
        runs.log_artifact(table, "per_query.parquet")
    return run_id


def test_the_answers_are_those_of_the_run_that_wrote_the_report(store, tmp_path: Path) -> None:
    report, other = tmp_path / "val.json", tmp_path / "other.json"
    evaluated(report, 0.1)  # its report was deleted since
    own = evaluated(report, 0.2)
    evaluated(other, 0.3)
    with (
        pytest.raises(ZeroDivisionError),
        runs.run("eval", {"report": str(report), "model": "models:/lvm/1", "split": "val"}),
    ):
        raise ZeroDivisionError  # ended before its report
    assert run_of(report, "models:/lvm/1", "cafe") == own
    assert mlflow.get_run(own).info.run_name == "eval"


def test_a_report_of_something_else_is_refused(store, tmp_path: Path) -> None:
    report = tmp_path / "val.json"
    evaluated(report, 0.1)
    with pytest.raises(ValueError, match="val.json: its bank_sha256 is cafe, not beef; delete it"):
        run_of(report, "models:/lvm/1", "beef")
    with pytest.raises(ValueError, match="val.json: no eval of models:/lvm/2 in .* wrote it"):
        run_of(report, "models:/lvm/2", "cafe")
    evaluated(report, 0.1, split="test")
    with pytest.raises(ValueError, match="val.json: its split is test, not val"):
        run_of(report, "models:/lvm/1", "cafe")
