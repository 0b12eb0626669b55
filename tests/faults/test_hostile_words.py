"""Words from strangers: no command of a shell, of a terminal, of a browser."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.projects._project_spec import load_project

from entrypoints import ingest as ingest_command
from entrypoints import predict as predict_command
from lvm.bank.bank import write_bank
from lvm.report.evaluation import examples_page
from tests.faults.conftest import Tally
from tests.faults.fuzzing import assert_good_line

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]


def test_escapes_do_not_reach_the_terminal(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tally: Tally
) -> None:
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a\x1b[2J\nerror: x.txt").write_text("This is a sentence of seven words.")
    with tally.injecting("names with escapes"):
        assert ingest_command.main(["--source", "corpus", "--bank", "made"]) == 2
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err
        assert_good_line(told.err.splitlines()[-1], "control characters")
    rows = pd.DataFrame({"sequence": ["a"] * 400, "text": ["x \x1b]0;title\x07 y"] * 400})
    rows["document"] = [f"d{row // 20}" for row in range(400)]
    vectors = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    write_bank("bank", vectors, rows, "e", "test")
    np.save("context.npy", vectors[:5])
    with tally.injecting("names with escapes"):
        words = "--model copy-last --bank bank --ctx 5 --context context.npy"
        assert predict_command.main(words.split()) == 0
        told = capsys.readouterr()
        assert "\\x1b]0;title\\x07" in told.out and "\x1b" not in told.out


def test_texts_are_escaped_in_pages(tally: Tally) -> None:
    attack = "<script>alert(1)</script>"
    examples = pd.DataFrame({"outcome": ["hit"], "context": [attack], "document": [attack]})
    with tally.injecting("markup in texts"):
        page = examples_page(attack, examples, leaky=False)
        assert "<script" not in page and page.count("&lt;script&gt;") == 3


SHELL = [
    "$(touch X)",
    "`touch X`",
    "x; touch X",
    "x && touch X",
    "x | touch X",
    "x\ntouch X",
    "' ; touch X; '",
]


def test_parameters_are_no_shell_commands(tmp_path: Path, tally: Tally) -> None:
    """Every parameter of every entry point, as MLflow builds the command of a run."""
    project = load_project(str(ROOT))
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" > told\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for name in project._entry_points:
        entry = project.get_entry_point(name)
        for parameter, kind in entry.parameters.items():
            if kind.type != "string":
                continue
            for number, attack in enumerate(SHELL):
                attack = attack.replace("X", str(tmp_path / "executed"))
                if number and parameter not in ("source", "text", "reason", "report"):
                    continue
                command = entry.compute_command({parameter: attack}, str(tmp_path))
                with tally.injecting("shell metacharacters"):
                    subprocess.run(
                        ["bash", "-c", command], cwd=tmp_path, env=environment, check=True
                    )
                    assert not (tmp_path / "executed").exists()
                    told = (tmp_path / "told").read_text().split("\0")
                    assert attack in told, told


def test_a_run_of_mlflow_with_shell_metacharacters(
    tmp_path: Path, store: Path, tally: Tally
) -> None:
    attack = f"$(touch {tmp_path / 'executed'}); touch {tmp_path / 'executed'} #"
    words = [
        sys.executable,
        "-m",
        "mlflow",
        "run",
        str(ROOT),
        "-e",
        "predict",
        "--env-manager",
        "local",
    ]
    with tally.injecting("shell metacharacters"):
        ended = subprocess.run([*words, "-P", f"text={attack}"], capture_output=True, text=True)
        assert ended.returncode != 0 and "error: " in ended.stderr
        assert not (tmp_path / "executed").exists()
