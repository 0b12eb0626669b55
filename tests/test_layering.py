"""House rules that an ast walk can check: import order, where MLflow lives, sizes of files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file imports only from files (or packages) to its left.
ORDER = (
    "stopping seeding row_table bank_files bank duplicates encoders corpus splits planning audit "
    "windows context_rows models objectives checkpoint fits facts contexts prediction streaming "
    "batches distributed hard_negatives averaging recipes optimisation supervision gradients "
    "symptoms training_state training search retrieval index metrics hubness statistics lanes "
    "answers baselines cold_latency latency evaluation controls rules diagnosis query_log "
    "measuring replay_store replay_child comparison shadow replay_process gates promotion canvas "
    "figures shadow_figures tables decision_report controls_report report shadow_report checkout "
    "tracking alias registry settling serving"
).split()
MLFLOW_FILES = {"lvm/tracking.py", "lvm/alias.py", "lvm/registry.py", "lvm/serving.py"}
MAX_LINES = 320
MAX_FUNCTION_LINES = 55
FILES = sorted([*(ROOT / "lvm").rglob("*.py"), *(ROOT / "entrypoints").glob("*.py")])


def source(path: Path) -> tuple[str, str]:
    return str(path.relative_to(ROOT)), path.read_text()


def imports(text: str) -> list[str]:
    """Return the dotted names that are imported, `from lvm import x` as lvm.x."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the order"
            module = node.module or ""
            plain = module in ("lvm", "entrypoints")
            names += [f"{module}.{a.name}" for a in node.names] if plain else [module]
    return names


def part(name: str) -> str:
    """Return the place in ORDER of lvm.corpus.files or lvm/corpus/files.py: corpus."""
    return name.removesuffix(".py").replace("/", ".").split(".")[1]


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
        if top == "lvm" and name.startswith("lvm/") and name != "lvm/__init__.py":
            here, there = part(name), part(imported)
            if ORDER.index(there) > ORDER.index(here):
                found.append(f"{name} imports {imported}, which lies to its right")
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
    there = {part(source(path)[0]) for path in FILES if path.is_relative_to(ROOT / "lvm")}
    assert there - {"__init__"} == set(ORDER)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lvm/bank.py", "from lvm.windows import Windows"),
        ("lvm/bank.py", "from lvm import windows"),
        ("lvm/training.py", "def f():\n    import mlflow.pyfunc"),
        ("lvm/models/memory_gru.py", "import lvm.training"),
        ("lvm/bank.py", "import click"),
        ("lvm/report.py", "from entrypoints.train import main"),
        ("entrypoints/train.py", "from mlflow import log_metric"),
    ],
)
def test_a_planted_fault_is_found(name, text):
    assert len(faults(name, text)) == 1


def test_a_planted_broad_handler_is_found():
    assert catches_everything("try:\n    x\nexcept Exception:\n    pass")
    assert catches_everything("try:\n    x\nexcept:\n    raise")
    assert catches_everything("try:\n    x\nexcept BaseException:\n    pass")
    assert not catches_everything("try:\n    x\nexcept BaseException:\n    y()\n    raise")
    assert not catches_everything("try:\n    x\nexcept ValueError:\n    pass")
