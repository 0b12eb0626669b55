"""A training that starts from a model of another bank: refusals, marks, figures without them."""

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from entrypoints import eval as evaluation
from entrypoints import shadow_eval, train
from lvm.bank.bank import write_bank
from lvm.system.seeding import generator
from lvm.tracking.initial import twin_figures, twin_line
from lvm.tracking.logged_models import load
from lvm.windows.origins import from_text
from tests.synthetic import make_bank

SIZES = "--model skip --ctx 20 --epochs 1 --negatives 32"


def test_marked_queries_are_left_out_of_the_figures():
    ranks = {"plain": np.array([1.0, 9.0, 2.0, 7.0])}
    found = twin_figures(np.array([30, 50]), np.array([10, 20, 30, 40]), ranks)
    assert found == {"queries": 1, "hit_at_5_without": {"plain": pytest.approx(1 / 3)}}
    assert twin_line(found, 4).startswith("Twins: 1 of 4 answers") and "33.3 %" in twin_line(
        found, 4
    )
    nothing = twin_figures(np.array([10]), np.array([10]), {"plain": np.array([1.0])})
    assert "no query left" in twin_line(nothing, 1)


@pytest.mark.slow
def test_a_training_starts_from_another_bank(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, drawn = make_bank(tmp_path / "first"), make_bank(tmp_path / "drawn", seed=1)
    vector_ND = np.array(drawn.vectors)
    own_row, first_row = generator(0, "twins").permutation(len(vector_ND))[:400].reshape(2, -1)
    vector_ND[own_row] = first.vectors[first_row]
    rows = pd.read_parquet(drawn.path / "rows.parquet")
    second = write_bank(tmp_path / "second", vector_ND, rows, "synthetic")
    third = make_bank(tmp_path / "third", seed=2)
    foreign = write_bank(tmp_path / "foreign", np.array(drawn.vectors), rows, "another")
    words = SIZES.split()
    assert train.main(["--bank", str(first.path), "--registry", "first", *words]) == 0
    started = [*words, "--init", "models:/first/1"]
    assert train.main(["--bank", str(second.path), "--registry", "second", *started]) == 0
    shown = capsys.readouterr().out
    found = load("models:/second/1")
    assert found.facts.init_twins == len(found.twin_row) > 0
    assert [one.sha256 for one in from_text(found.facts.init_banks)] == [first.sha256]
    run = MlflowClient().get_run(found.run_id)
    counts = [run.data.metrics[f"init/{split}_twins"] for split in ("val", "test")]
    assert sum(counts) == found.facts.init_twins and counts[1] > 0
    assert "have a twin (cosine 0.999 or more)" in shown

    assert evaluation.main(["--model", "1", "--registry", "second"]) == 0
    assert evaluation.main(["--model", "models:/first/1", "--bank", str(second.path)]) == 0
    lines = [one for one in capsys.readouterr().out.splitlines() if one.startswith("Twins: ")]
    assert len(lines) == 2 and lines[0].split(";")[0] == lines[1].split(";")[0]
    assert shadow_eval.main(["--registry", "second", "--candidates", "1,ema"]) == 0
    assert "queries omitted: their answers have a twin" in capsys.readouterr().out

    folder = MlflowClient().get_logged_model(found.model_id).artifact_location
    chain = ["--bank", str(third.path), *words, "--init", folder.removeprefix("file://")]
    assert train.main([*chain, "--registry", "third"]) == 0
    origins = from_text(load("models:/third/1").facts.init_banks)
    assert [one.sha256 for one in origins] == [first.sha256, second.sha256]
    capsys.readouterr()
    assert train.main(["--bank", str(foreign.path), "--registry", "foreign", *started]) == 2
    refusal = capsys.readouterr().err
    assert "init: models:/first/1: its bank" in refusal and "same known encoder" in refusal
