"""House rules that an ast walk can check: import order, where MLflow lives, sizes of files.

ORDER is the map of lvm/: packages from first to last, inside each its files from first to last.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file imports only from files before it: from earlier packages, from earlier files of its own.
ORDER = {
    "seeding": "",
    "stopping": "",
    "processes": "",
    "scratch": "",
    "checkout": "",
    "one_line": "",
    "reasons": "",
    "untrusted": "",
    "rules": "",
    "writing": "",
    "bank": "row_table archive files store duplicates",
    "encoders": "",
    "corpus": "documents sentences markup files python_docs reading ingest",
    "chains": (
        "concepts edges wordnet ontologies walks graphs anchored gates gating cpesh plan sources "
        "writing ingest"
    ),
    "windows": "splits planning audit export context_rows",
    "models": (
        "norm dropout gru scan skip recurrent residual baselines memory_gru tmd_experts "
        "transformer res_mlp table"
    ),
    "objectives": "",
    "routing": "lanes losses figures",
    "checkpoint": "weights fits facts",
    "prediction": "contexts predict streaming",
    "training": (
        "averaging recipes distributed batches hard_negatives guidance initial optimisation "
        "supervision gradients plan symptoms identity state spikes loop"
    ),
    "metrics": "",
    "retrieval": "search competition exact shortlist hubness structures index building",
    "statistics": "",
    "lanes": "assignment agreement figures ceilings diagnosis classifier reranking",
    "evaluation": (
        "answers cold_latency free_predictors evaluate examples reranked controls served_latency"
    ),
    "scaling": "fractions store cells optimised noise fit verdict grid",
    "shadow": (
        "log_files query_log measuring host store comparison reranked replay child forking process"
    ),
    "promotion": "gates decision",
    "phases": "table published compared measured old_gates",
    "report": (
        "canvas tables warnings figures expert_figures lane_figures shadow_figures phase_figure "
        "scaling_figures evaluation lanes controls reranking decision shadow phases scaling notes "
        "examples"
    ),
    "run_list": "",
    "abandoned": "",
    "tracking": "",
    "datasets": "",
    "past_runs": "",
    "registry": "page alias registered settling",
    "serving": "refusal packed passages predictor logged",
}
PLACES = [
    f"lvm.{name}.{file}" if file else f"lvm.{name}"
    for name, files in ORDER.items()
    for file in files.split() or [""]
]
PACKAGES = {"lvm", "entrypoints", *(f"lvm.{name}" for name, files in ORDER.items() if files)}
MLFLOW_FILES = {
    "lvm/abandoned.py",
    "lvm/tracking.py",
    "lvm/datasets.py",
    "lvm/past_runs.py",
    "lvm/registry/alias.py",
    "lvm/registry/registered.py",
    "lvm/serving/refusal.py",
    "lvm/serving/predictor.py",
    "lvm/serving/logged.py",
}
MAX_LINES = 320
MAX_FUNCTION_LINES = 55
FILES = sorted([*(ROOT / "lvm").rglob("*.py"), *(ROOT / "entrypoints").glob("*.py")])


def source(path: Path) -> tuple[str, str]:
    return str(path.relative_to(ROOT)), path.read_text()


def imports(text: str) -> list[str]:
    """Return the dotted names that are imported, `from lvm.bank import files` as its file."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the order"
            module = node.module or ""
            inside = module in PACKAGES
            names += [f"{module}.{a.name}" for a in node.names] if inside else [module]
    return names


def dotted(name: str) -> str:
    """Return the import name of lvm/bank/store.py: lvm.bank.store."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def misplaced(name: str, imported: str) -> str | None:
    """Return what is wrong with an import of lvm's own in one of its files."""
    if imported not in PLACES:
        return f"{name} imports {imported}, which is no file of lvm"
    if PLACES.index(imported) >= PLACES.index(dotted(name)):
        return f"{name} imports {imported}, which comes after it"
    return None


def faults(name: str, text: str) -> list[str]:
    """Return what breaks the order of imports or their homes in one file."""
    found = []
    for imported in imports(text):
        top = imported.partition(".")[0]
        if top == "mlflow" and name not in MLFLOW_FILES:
            found.append(f"{name} imports {imported}: MLflow lives in {sorted(MLFLOW_FILES)}")
        if top == "click" and not name.startswith("entrypoints/"):
            found.append(f"{name} imports click, which lives in entrypoints/")
        if top == "entrypoints" and not name.startswith("entrypoints/"):
            found.append(f"{name} imports {imported} from the command line")
        if top == "lvm" and name.startswith("lvm/"):
            found += [wrong for wrong in [misplaced(name, imported)] if wrong]
    return found


def catches_everything(text: str) -> bool:
    """Tell whether a handler would hide a programming error."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            ends_in_raise = isinstance(node.body[-1], ast.Raise)
            broad = node.type is None or "Exception" in ast.unparse(node.type).split(".")
            broad = broad or (ast.unparse(node.type) == "BaseException" and not ends_in_raise)
            if broad:
                return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_house_rules(path):
    name, text = source(path)
    tree = ast.parse(text)
    assert faults(name, text) == []
    assert not catches_everything(text)
    assert len(text.splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(tree)
    assert docstring, "every file says in one sentence what it is"
    assert " and " not in docstring.splitlines()[0], "a file does one thing"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} does not fit a screen"


def test_every_file_has_its_place_in_the_order():
    there = {dotted(source(path)[0]) for path in FILES if path.is_relative_to(ROOT / "lvm")}
    assert there - PACKAGES == set(PLACES)
    assert len(set(PLACES)) == len(PLACES)


@pytest.mark.parametrize("package", sorted(PACKAGES - {"lvm", "entrypoints"}))
def test_a_package_says_what_it_is_and_nothing_else(package):
    assert only_docstring((ROOT / package.replace(".", "/") / "__init__.py").read_text())


def only_docstring(text: str) -> bool:
    """Tell whether a file holds nothing but its docstring: names are imported from their files."""
    tree = ast.parse(text)
    return ast.get_docstring(tree) is not None and len(tree.body) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lvm/bank/store.py", "from lvm.windows.planning import Windows"),
        ("lvm/bank/store.py", "from lvm.windows import planning"),
        ("lvm/bank/store.py", "from lvm import encoders"),
        ("lvm/bank/store.py", "from lvm.bank.duplicates import duplicate_groups"),
        ("lvm/bank/store.py", "from lvm.bank import duplicates"),
        ("lvm/bank/duplicates.py", "from lvm.bank import open_bank"),
        ("lvm/bank/store.py", "from lvm.bank.store import Bank"),
        ("lvm/training/loop.py", "def f():\n    import mlflow.pyfunc"),
        ("lvm/models/memory_gru.py", "import lvm.training"),
        ("lvm/models/memory_gru.py", "import lvm.training.loop"),
        ("lvm/bank/store.py", "import click"),
        ("lvm/report/tables.py", "from entrypoints.train import main"),
        ("entrypoints/train.py", "from mlflow import log_metric"),
    ],
)
def test_a_planted_fault_is_found(name, text):
    assert len(faults(name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lvm/bank/duplicates.py", "from lvm.bank.store import Bank"),
        ("lvm/windows/splits.py", "from lvm.bank import files"),
        ("lvm/registry/alias.py", "import mlflow"),
        ("entrypoints/train.py", "from lvm.training.loop import train"),
    ],
)
def test_an_import_from_before_is_allowed(name, text):
    assert faults(name, text) == []


def test_a_planted_name_in_a_package_is_found():
    assert not only_docstring('"""A bank."""\n\nfrom lvm.bank.store import Bank')
    assert not only_docstring("")


def test_a_planted_broad_handler_is_found():
    assert catches_everything("try:\n    x\nexcept Exception:\n    pass")
    assert catches_everything("try:\n    x\nexcept:\n    raise")
    assert catches_everything("try:\n    x\nexcept BaseException:\n    pass")
    assert not catches_everything("try:\n    x\nexcept BaseException:\n    y()\n    raise")
    assert not catches_everything("try:\n    x\nexcept ValueError:\n    pass")
