"""The contract of the command line: MLproject, commands, click options, dataclasses agree."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.shell_completion import ShellComplete

from entrypoints import cli, main
from entrypoints import options as declared
from entrypoints.cli import EntryPoint, click_options, typed_text
from entrypoints.options import OPTIONS, TrainOptions, option
from entrypoints.train import config_of
from lvm.chains.walks import WALKS
from lvm.corpus.python_docs import PACKAGES
from lvm.evaluation.lane_assignment import METHODS
from lvm.models.recurrent import CELLS
from lvm.models.table import FREE_MODELS, TRAINED_MODELS
from lvm.retrieval.rerank import RERANKS
from lvm.serving.predictor import MAX_PASSAGES
from lvm.studies.phases import SIZES
from lvm.tracking.datasets import DEFAULT_BANK, DEFAULT_CTX, DEFAULT_SOURCE
from lvm.tracking.registry import BASELINE_URI, NAME
from lvm.training.config import (
    AVERAGES,
    DEVICES,
    EXPERTS_CONTROLS,
    PRECISIONS,
    RECIPES,
    TRUNKS,
    TrainConfig,
)
from lvm.windows.planning import SPLIT_KINDS

ROOT = Path(__file__).parents[2]
PROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRIES: dict[str, dict[str, Any]] = PROJECT["entry_points"]
CONTRACT = {
    "main": {"size": "quick", "report": "none"},
    "ingest": {
        "source": "python-docs",
        "encoder": "auto",
        "bank": "data/bank",
        "max_rows": "auto",
        "language": "auto",
        "order": "auto",
        "base": "none",
        "lanes": "none",
        "root": "auto",
        "walk": "both",
        "queries": "none",
        "coherence": "auto",
        "max_chains": "auto",
        "seed": "0",
    },
    "export": {
        "bank": "data/bank",
        "ctx": "1000",
        "overlap": "auto",
        "split": "document",
        "windows": "auto",
        "seed": "0",
        "report": "none",
    },
    "train": {
        "bank": "data/bank",
        "ctx": "auto",
        "phase": "none",
        "model": "auto",
        "recipe": "dense",
        "epochs": "auto",
        "batch_size": "auto",
        "accumulation": "auto",
        "lr": "auto",
        "weight_decay": "auto",
        "alpha": "auto",
        "temperature": "auto",
        "focus": "auto",
        "negatives": "auto",
        "patience": "auto",
        "chunk": "auto",
        "hidden": "auto",
        "layers": "auto",
        "slots": "16",
        "cell": "gru",
        "device": "auto",
        "precision": "auto",
        "seed": "0",
        "resume": "auto",
        "register": "true",
        "log_bank": "false",
        "report": "none",
    },
    "eval": {
        "model": "models:/lvm@baseline",
        "split": "test",
        "max_queries": "auto",
        "controls": "true",
    },
    "lane-diagnostics": {
        "model": "models:/lvm@baseline",
        "split": "test",
        "max_queries": "auto",
        "lanes": "bank",
        "encoder": "auto",
    },
    "shadow-eval": {"candidates": "all", "queries": "test", "promote": "dry_run"},
    "tune": {
        "bank": "data/bank",
        "ctx": "auto",
        "space": "auto",
        "trials": "20",
        "study": "auto",
        "epochs": "auto",
        "report": "none",
    },
    "scaling": {
        "bank": "data/bank",
        "ctx": "1000",
        "fractions": "0.125,0.25,0.5,1",
        "widths": "128,256,512",
        "seeds": "0,1,2",
        "model": "delta_memory",
        "layers": "auto",
        "report": "none",
    },
    "phases": {
        "phases": "1,2,2B,3,3.5,4",
        "recipe": "dense",
        "size": "quick",
        "bank": "data/bank",
        "gates": "none",
        "report": "none",
    },
    "promote": {"version": "none", "reason": "none"},
    "rollback": {},
    "predict": {
        "model": "models:/lvm@baseline",
        "text": "none",
        "context": "none",
        "k": "5",
        "rerank": "none",
    },
}


def entry_point(name: str) -> EntryPoint[Any]:
    found = importlib.import_module(f"entrypoints.{name.replace('-', '_')}").main
    assert found.name == name
    return found


def test_every_entry_point_of_the_contract_is_there():
    assert set(ENTRIES) == set(CONTRACT)
    files = {path.stem for path in (ROOT / "entrypoints").glob("[!_]*.py")}
    assert files - {"cli", "options"} == {name.replace("-", "_") for name in ENTRIES}


@pytest.mark.parametrize("name", CONTRACT)
def test_parameters_command_options_and_dataclass_agree(name):
    declared = {k: str(v["default"]) for k, v in ENTRIES[name].get("parameters", {}).items()}
    entry = entry_point(name)
    fields = {f.name: typed_text(f, f.default) for f in dataclasses.fields(entry.options_class)}
    options = {p.name: p.default for p in entry.command().params}
    flags = {p.name: p.opts for p in entry.command().params}
    assert declared == fields == options
    assert CONTRACT[name].items() <= declared.items()
    module = name.replace("-", "_")
    arguments = "".join(f" {flags[key][0]} {{{key}}}" for key in declared)
    assert ENTRIES[name]["command"] == f"python -m entrypoints.{module}{arguments}"


@pytest.mark.parametrize("name", CONTRACT)
def test_defaults_survive_the_way_through_mlflow_and_click(name):
    entry = entry_point(name)
    arguments = []
    for key, parameter in ENTRIES[name].get("parameters", {}).items():
        default = parameter["default"]
        assert default not in ("", None), f"MLflow cannot pass {key}={default!r}"
        arguments += [f"--{key.replace('_', '-')}", str(default)]
    with entry.command().make_context(name, arguments) as context:
        given = context.params
    assert given == {f.name: f.default for f in dataclasses.fields(entry.options_class)}


def test_train_takes_its_defaults_from_the_library():
    # decay is not an option: training starts from the moving average tuned on val.
    options = {f.name: f.default for f in dataclasses.fields(TrainOptions)}
    config = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    shared = options.keys() & config.keys()
    assert shared == config.keys() - {"decay"}
    phase_decides = {"model", "chunk"}  # auto on the command line, so that what is typed wins
    assert {options[k] for k in phase_decides} == {None}
    assert config_of(TrainOptions()) == TrainConfig()
    shared -= phase_decides
    assert {k: options[k] for k in shared} == {k: config[k] for k in shared}


def test_the_options_have_the_names_of_the_library():
    """They are written out: importing them would load torch for a help text."""
    chosen = {
        (command, field.name): tuple(field.metadata["choices"])
        for command, options_class in OPTIONS.items()
        for field in dataclasses.fields(options_class)
    }
    known = {
        "model": tuple(TRAINED_MODELS),
        "recipe": RECIPES,
        "averaging": AVERAGES,
        "cell": CELLS,
        "trunk": TRUNKS,
        "experts_control": EXPERTS_CONTROLS,
        "device": DEVICES,
        "precision": PRECISIONS,
    }
    assert {name: chosen["train", name] for name in known} == known
    assert set(chosen["scaling", "model"]) <= set(TRAINED_MODELS)
    assert {name: chosen["scaling", name] for name in ("cell", "device", "precision")} == {
        name: known[name] for name in ("cell", "device", "precision")
    }
    assert chosen["tune", "model"] == known["model"]
    assert chosen["phases", "recipe"] == (*RECIPES, "both")
    assert chosen["phases", "size"] == tuple(SIZES)
    assert chosen["main", "size"] == tuple(main.PLANS)
    assert chosen["ingest", "walk"] == tuple(WALKS)
    assert chosen["export", "split"] == SPLIT_KINDS
    assert chosen["lane-diagnostics", "lanes"] == METHODS
    for command in ("eval", "shadow-eval", "predict"):
        assert chosen[command, "rerank"] == RERANKS
    (k,) = (one for one in dataclasses.fields(OPTIONS["predict"]) if one.name == "k")
    assert k.metadata["high"] == MAX_PASSAGES
    assert (declared.DEFAULT_BANK, declared.DEFAULT_CTX) == (DEFAULT_BANK, DEFAULT_CTX)
    assert OPTIONS["ingest"]().source == DEFAULT_SOURCE
    assert (declared.REGISTRY, declared.BASELINE_URI) == (NAME, BASELINE_URI)
    assert ", ".join(FREE_MODELS) in declared.MODEL_HELP


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--ctx", "no"]])
def test_help_and_a_wrong_value_load_neither_torch_nor_mlflow(words):
    check = "import sys; from entrypoints import cli; cli.call(cli.group(), 'lvm', sys.argv[1:])"
    check += "; print(*sys.modules.keys() & {'torch', 'mlflow', 'numpy', 'pandas'}, sep='')"
    command = [sys.executable, "-c", check, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_the_command_lists_every_entry_point_and_runs_the_one_that_is_named(capsys):
    assert list(cli.group().commands) == list(ENTRIES)
    for name, options_class in OPTIONS.items():
        assert entry_point(name).options_class is options_class
    assert cli.call(cli.group(), "lvm", ["promote", "--reason", "x"]) == 2
    assert "error: version: none was given" in capsys.readouterr().err
    assert cli.call(cli.group(), "lvm", ["banana"]) == 2
    assert "error: No such command 'banana'" in capsys.readouterr().err


def test_a_shell_completes_commands_options_and_words():
    def completed(*words: str) -> list[str]:
        found = ShellComplete(cli.group(), {}, "lvm", "_LVM_COMPLETE")
        return [one.value for one in found.get_completions(list(words[:-1]), words[-1])]

    assert completed("tr") == ["train"]
    assert completed("train", "--gate-b") == ["--gate-balance"]
    assert completed("train", "--averaging", "") == ["ema", "swa", "none", "auto"]


@dataclasses.dataclass(frozen=True)
class Example:
    """Options of every kind."""

    count: int | None = option(None, "", low=1)
    rate: float = option(0.5, "", low=0)
    kind: str = option("a", "", choices=("a", "b"))
    flag: bool = option(True, "")
    place: str | None = option(None, "", unset="none")
    choice: str | None = option(None, "", choices=("x", "y"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rate", "banana"], "'--rate': 'banana' is not a valid float"),
        (["--rate", "nan"], "'--rate': 'nan' is not a finite number"),
        (["--rate", "inf"], "'--rate': 'inf' is not a finite number"),
        (["--rate", "-1"], "'--rate': -1.0 is not in the range x>=0"),
        (["--count", "0"], "'--count': 0 is not in the range x>=1, nor the word 'auto'"),
        (["--count", "1.5"], "'--count': '1.5' is not a valid integer"),
        (["--kind", "c"], "'--kind': 'c' is not one of 'a', 'b'"),
        (["--flag", "maybe"], "'--flag': 'maybe' is not a valid boolean"),
        (["--flag", " "], "'--flag': ' ' is not a valid boolean; use true or false"),
        (["--unknown", "1"], "No such option"),
    ],
)
def test_click_checks_every_type(arguments, reason):
    command = click.Command("example", params=click_options(Example))
    with pytest.raises(click.ClickException) as refused:
        command.make_context("example", arguments)
    assert reason in refused.value.format_message()


def test_click_reads_values_and_the_words_for_none():
    command = click.Command("example", params=click_options(Example))
    words = ["--count", "3", "--rate", "1e-3", "--flag", "False", "--place", "none"]
    with command.make_context("example", words) as context:
        assert context.params == {
            "count": 3,
            "rate": 0.001,
            "kind": "a",
            "flag": False,
            "place": None,
            "choice": None,
        }


def test_a_runs_name_has_the_options_that_are_not_default():
    options = TrainOptions(ctx=20, model="skip", seed=1, lr=0.01, negatives=64, register=False)
    named = ("ctx", "model", "register")
    assert cli.changed(options, named) == "lr 0.01 seed 1 negatives 64"
    assert cli.changed(TrainOptions(), named) == ""


def test_help_shows_choices_ranges_and_the_word_for_none_as_they_are_typed():
    command = click.Command("example", params=click_options(Example))
    with command.make_context("example", []) as context:
        text = " ".join(command.get_help(context).split())
    assert "--count INTEGER|auto [default: auto; x>=1]" in text
    assert "--rate FLOAT [default: 0.5; x>=0]" in text
    assert "--choice [x|y|auto]" in text and "--place TEXT|none" in text


def test_conda_yaml_lists_the_pins_of_pyproject():
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    assert conda[0] == "python=3.11.7", "virtualenv takes the latest patch unless it is named"
    (pip,) = (entry["pip"] for entry in conda if isinstance(entry, dict))
    assert pip == [*pinned, "-e ."]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pinned)


@pytest.mark.slow
def test_dependencies_are_what_is_imported_or_read_as_corpus():
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {pin.partition("==")[0].replace("-", "_") for pin in pinned}
    corpus = {package.distribution.replace("-", "_") for package in PACKAGES}
    optional = {"datasets", "sentence_transformers"}
    known = set(importlib.import_module("sys").stdlib_module_names) | {"lvm", "entrypoints"}
    files = [*(ROOT / "lvm").rglob("*.py"), *(ROOT / "entrypoints").glob("*.py")]
    imported = {top for path in files for top in top_level_imports(path)} - known - optional
    packages = {
        "yaml": "pyyaml",
        "faiss": "faiss_cpu",
        "markdown_it": "markdown_it_py",
        "sklearn": "scikit_learn",
    }  # where the names differ
    assert names == corpus | {packages.get(name, name) for name in imported}


def top_level_imports(path: Path) -> set[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.append(node.module)
    return {module.partition(".")[0] for module in modules}
