"""Bad input at the command line: one line, exit code 2, a FAILED run, nothing left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PROJECT_ENTRY_POINT

from entrypoints import eval as eval_command
from entrypoints import (
    export,
    ingest,
    phases,
    predict,
    promote,
    rollback,
    scaling,
    shadow_eval,
    train,
)
from lvm.bank.bank import write_bank
from lvm.bank.files import file_sha256
from lvm.corpus.ingest import row_names
from lvm.system.atomic import with_checksum
from tests.conftest import copy_store
from tests.synthetic import make_bank


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, empty_store):
    """A working folder with one good bank, many spoilt ones."""
    folder = tmp_path_factory.mktemp("workplace")
    make_bank(folder / "good", num_sequences=4)
    spoil_vectors(folder, "nan", np.nan)
    spoil_vectors(folder, "zero", 0.0)
    spoil_vectors(folder, "changed", 1.0)
    bank = make_bank(folder / "again", num_sequences=4)
    write_bank(folder / "unnamed", bank.vectors, row_names(bank), "unknown", "test")
    bare = pd.DataFrame(row_names(bank))[["sequence", "document"]]
    write_bank(folder / "bare", bank.vectors, bare, "unknown", "test")
    spoil_rows(folder, "short", lambda rows: rows.iloc[:-1])
    spoil_rows(folder, "nameless", lambda rows: rows.drop(columns="sequence"))
    spoil_rows(folder, "scattered", lambda rows: rows.iloc[np.arange(len(rows)) * 7 % len(rows)])
    texts = np.array(["a", None] * 10, dtype=object)
    np.savez(folder / "pickled.npz", vectors=np.ones((20, 4), np.float32), concept_texts=texts)
    (folder / "empty.txt").write_text("")
    (folder / "cycle.csv").write_text("parent,child\na,b\nb,a\n")
    (folder / "tree.csv").write_text("parent,child\na,b\na,c\n")
    (folder / "weights.csv").write_text("source,target,weight\na,b,1\nb,c,-1\n")
    (folder / "broken.obo").write_text("[Term]\nid: X:1\nno tag\n")
    (folder / "good.txt").write_text("This is a sentence of seven words.")
    asked = pd.DataFrame({"target_row": [3, 4], "rank": [9.0, 9.0]})
    asked.to_parquet(folder / "old.parquet")
    asked.assign(split="test").to_parquet(folder / "test.parquet")
    np.save(folder / "nan.npy", np.full((3, 16), np.nan, np.float32))
    np.save(folder / "good.npy", np.ones((3, 16), np.float32))
    np.save(folder / "narrow.npy", np.ones((3, 15), np.float32))
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        copy_store(empty_store, tmp_path_factory.mktemp("stores") / "store", patch)
        patch.chdir(folder)
        yield folder


def spoil_vectors(folder: Path, name: str, value: float) -> None:
    shutil.copytree(folder / "good", folder / name)
    vectors = np.load(folder / name / "vectors.npy", mmap_mode="r+")
    vectors[[5, 9]] = value
    vectors.flush()
    if name != "changed":
        record_hashes(folder / name)


def spoil_rows(folder: Path, name: str, change) -> None:
    shutil.copytree(folder / "good", folder / name)
    path = folder / name / "rows.parquet"
    change(pd.read_parquet(path)).reset_index(drop=True).to_parquet(path)
    record_hashes(folder / name)


def record_hashes(folder: Path) -> None:
    """Make the files of a bank those that bank.json tells of."""
    where = folder / "bank.json"
    contents = json.loads(where.read_text())
    contents["files"] = {name: file_sha256(folder / name) for name in contents["files"]}
    where.write_text(json.dumps(with_checksum(contents)))


CASES = {
    "missing bank": (train, "--bank nowhere", "bank nowhere: no such folder or .npz file"),
    "NaN in the bank": (train, "--bank nan", "nan"),
    "zero rows in the bank": (train, "--bank zero", "zero"),
    "rows missing in the table": (export, "--bank short", "short"),
    "no sequence in the table": (export, "--bank nameless", "sequence"),
    "a sequence in pieces": (export, "--bank scattered", "scattered"),
    "pickled npz": (export, "--bank pickled.npz", "pickled.npz"),
    "pickled npz ingested": (ingest, "--source pickled.npz --bank made", "pickled.npz"),
    "empty text ingested": (ingest, "--source empty.txt --bank made", "empty.txt"),
    "unknown encoder": (
        ingest,
        "--source good.txt --encoder banana --bank made",
        "encoder 'banana'",
    ),
    "a cyclic ontology": (ingest, "--source ontology:cycle.csv --bank made", "cycle a > b > a"),
    "an unknown root": (
        ingest,
        "--source ontology:tree.csv --root z --bank made",
        "root 'z': is no concept of tree.csv",
    ),
    "negative weights": (ingest, "--source graph:weights.csv --bank made", "weight '-1' in edge 1"),
    "missing columns of edges": (ingest, "--source graph:tree.csv --bank made", "no column source"),
    "an unreadable OBO file": (
        ingest,
        "--source ontology:broken.obo --bank made",
        "not a readable OBO file",
    ),
    "no chain after the gates": (
        ingest,
        "--source ontology:tree.csv --bank made",
        "none of 2 of tree is left (dropped: length 2)",
    ),
    "a lane that the bank does not have": (
        ingest,
        "--source graph:good --lanes Art --bank made",
        "lanes: Art is not a lane of the source",
    ),
    "pages near test answers": (
        ingest,
        "--source anchored:good --base good --queries test.parquet --bank made",
        "test.parquet: 2 of 2 queries are of split test",
    ),
    "queries of no known split": (
        ingest,
        "--source anchored:good --base good --queries old.parquet --bank made",
        "no column split; give the per_query.parquet of a run over val",
    ),
    "chain options for text": (
        ingest,
        "--source good.txt --walk bfs --bank made",
        "walk: is read for chains alone",
    ),
    "rows asked for of chains": (
        ingest,
        "--source graph:good --max-rows 9 --bank made",
        "max_rows: is for text or vectors",
    ),
    "ctx beyond every sequence": (export, "--bank good --ctx 5000", "ctx: 5000 is too long"),
    "overlap of a whole window": (export, "--bank good --ctx 20 --overlap 20", "overlap"),
    "negative overlap": (export, "--bank good --ctx 20 --overlap -1", "'--overlap'"),
    "word for a number": (train, "--lr banana", "'--lr': 'banana' is not a valid float"),
    "lr of zero": (train, "--bank good --lr 0", "lr: 0.0 is not"),
    "unknown phase to train": (
        train,
        "--bank good --phase 9",
        "phase: unknown '9'; the table has 1, 2, 2B, 3, 3.5, 4",
    ),
    "unknown model to train": (train, "--model banana", "'--model': 'banana' is not"),
    "nothing to resume": (train, "--bank good --ctx 20 --resume true", "resume: no interrupted"),
    "unknown option": (train, "--banana 1", "No such option"),
    "unknown model to evaluate": (eval_command, "--model banana", "model: unknown 'banana'"),
    "no baseline yet": (eval_command, "--bank good", "models:/lvm@baseline does not exist"),
    "unknown run": (eval_command, "--model runs:/0123/model", "runs:/0123/model cannot be read"),
    "report into a folder": (eval_command, "--model ema --report folder", "folder is a folder"),
    "report below a file": (
        eval_command,
        "--model ema --report good.txt/report.json",
        "good.txt is no folder",
    ),
    "a bank changed since it was made": (
        shadow_eval,
        "--bank changed --ctx 20",
        "vectors.npy: its sha256 differs",
    ),
    "unknown candidate": (shadow_eval, "--bank good --candidates 9", "lvm has no version '9'"),
    "unknown query log": (
        shadow_eval,
        "--bank good --ctx 20 --queries banana",
        "queries: banana is neither",
    ),
    "unknown phase": (
        phases,
        "--phases 1,7",
        "phases: unknown '7'; the table has 1, 2, 2B, 3, 3.5",
    ),
    "no phase": (phases, "--phases ,", "phases: none was given"),
    "unknown recipe of phases": (phases, "--recipe old", "'--recipe': 'old' is not"),
    "a phase longer than every sequence": (
        phases,
        "--bank good --size tiny --phases 1,3.5",
        "ctx: 2000 is too long",
    ),
    "promotion of nothing": (promote, "--reason x", "version: none was given"),
    "promotion without a reason": (promote, "--version 1", "reason: none was given"),
    "promotion of an unknown version": (
        promote,
        "--version 9 --reason x",
        "models:/lvm/9 does not exist",
    ),
    "rollback of nothing": (rollback, "", "no previous baseline"),
    "fractions beyond the data": (
        scaling,
        "--bank good --fractions 0.5,1,2",
        "fractions: 2 is not above 0 and at most 1",
    ),
    "one fraction": (scaling, "--bank good --fractions 1", "fractions: 1 given; a curve needs"),
    "a word among the fractions": (scaling, "--fractions 0.5,half,1", "'0.5,half,1' is not a"),
    "an odd width": (scaling, "--bank good --widths 2,3,4", "widths: 3 is not an even number"),
    "too few documents": (
        scaling,
        "--bank good --ctx 20 --fractions 0.01,0.5,1",
        "queries: 58 val queries are left",
    ),
    "nothing to predict from": (predict, "--model ema --bank good", "exactly one of the three"),
    "a text that is not there": (
        predict,
        "--model copy-last --bank good --ctx 20 --text missing.txt",
        "text: missing.txt cannot be read: No such file or directory",
    ),
    "a text beside vectors of no known encoder": (
        predict,
        "--model copy-last --bank unnamed --ctx 20 --text good.txt",
        "text: bank unnamed does not record what made its vectors; give context=<.npy>, or ingest",
    ),
    "a free predictor re-ranked": (
        predict,
        "--model copy-last --bank good --ctx 20 --context good.npy --rerank lane",
        "rerank: copy-last is fitted here without lanes; name a registered version",
    ),
    "words of a bank without texts": (
        eval_command,
        "--model copy-last --bank bare --ctx 20 --rerank lexical",
        "rerank: bank bare: has no texts; add a column 'text' to its row table, or use rerank=",
    ),
    "lanes of a bank without labels": (
        eval_command,
        "--model copy-last --bank bare --ctx 20 --rerank hybrid",
        "bank bare: has no lanes; add a column 'lane' to its row table",
    ),
    "NaN in a context": (
        predict,
        "--model copy-last --bank good --ctx 20 --context nan.npy",
        "NaN",
    ),
    "narrow context": (
        predict,
        "--model copy-last --bank good --ctx 20 --context narrow.npy",
        "(1, 3, 15) is not",
    ),
}


def contents(folder: Path) -> set[str]:
    """Return every file, the windows (a whole, valid plan) left aside."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name for name in files if not name.startswith("data")}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, workplace, capsys, monkeypatch):
    command, arguments, reason = CASES[case]
    run = MlflowClient().create_run("0", tags={MLFLOW_PROJECT_ENTRY_POINT: "main"})
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    before = contents(workplace)
    assert command.main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and reason in line
    ended = MlflowClient().get_run(run.info.run_id)
    assert ended.info.status == "FAILED"
    assert f"error: {ended.data.tags['error']}" == line
    assert contents(workplace) == before


@pytest.mark.parametrize(
    "case", ["missing bank", "unknown phase to train", "lr of zero", "no baseline yet"]
)
def test_a_wrong_option_opens_no_run(case, workplace, capsys):
    command, arguments, reason = CASES[case]
    before = {run.info.run_id for run in MlflowClient().search_runs(["0"])}
    assert command.main(arguments.split()) == 2
    assert reason in capsys.readouterr().err
    assert {run.info.run_id for run in MlflowClient().search_runs(["0"])} == before
