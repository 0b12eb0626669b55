"""The command ingest: what is printed and logged, one refusal for each wrong word."""

import json
import re
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from entrypoints import ingest
from lvm.bank.bank import open_bank


def run_artifact(name: str) -> str:
    """Return a text artifact of the newest run."""
    found = mlflow.search_runs(search_all_experiments=True, max_results=1, output_format="list")
    return mlflow.artifacts.load_text(f"{found[0].info.artifact_uri}/{name}")


def test_drops_are_printed_and_logged_by_file(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "A.TXT").write_text("The whole of this file is kept.")
    (folder / "b.md").write_text("# One\n\nYes. This sentence is long enough to stay.\n")
    (folder / "c.html").write_text("<p>No.</p>")
    (folder / "d.pdf").write_bytes(b"%PDF")
    assert ingest.main(["--source", str(folder), "--bank", str(tmp_path / "bank")]) == 0
    printed = capsys.readouterr().out
    assert "dropped 2 rows: fewer than 3 words" in printed
    assert "left out, as ingest does not read them: 1 .pdf" in printed
    table = [line.split() for line in printed.splitlines()]
    assert ["b.md", "1", "1"] in table and ["c.html", "0", "1"] in table
    logged = run_artifact("dropped.md")
    assert "| b.md" in logged and "| c.html" in logged and "A.TXT" not in logged


def test_a_table_of_vectors_is_a_bank_in_one_command(store: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"{doc}-{part}", "document": doc, "chunk_index": part, "vector": [doc + 1, part]}
        for part in (1, 0, 2)
        for doc in (7, 8)
    ]
    for name in ("a.parquet", "a.jsonl"):
        if name.endswith("l"):
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        else:
            pd.DataFrame(rows).to_parquet(tmp_path / name)
        path = tmp_path / f"bank-{name}"
        assert ingest.main(["--source", str(tmp_path / name), "--bank", str(path)]) == 0
        bank = open_bank(path, verify=True)
        assert bank.sequences == ("7", "8")
        assert bank.vectors.tolist() == [[8, 0], [8, 1], [8, 2], [9, 0], [9, 1], [9, 2]]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--language", "de"], "language: is for text, but .*a.parquet holds vectors"),
        (["--lanes", "folder"], "lanes: is for text, but .*a.parquet holds vectors"),
        (["--lanes", "Law"], "lanes 'Law': of text, lanes are none or folder"),
        (["--order", "page"], "a.parquet: no column 'page' to order the rows by"),
        (["--language", "german"], "language 'german': must be auto or a code such as de"),
        (["--walk", "bfs"], "walk: is read for chains alone"),
    ],
)
def test_options_that_do_not_fit_the_source_are_refused(
    words: list[str],
    reason: str,
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pd.DataFrame({"vector": [[1.0, 2.0]]}).to_parquet(tmp_path / "a.parquet")
    path = tmp_path / "bank"
    command = ["--source", str(tmp_path / "a.parquet"), "--bank", str(path), *words]
    assert ingest.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error) and error.count("\n") == 1
    assert not path.exists()
