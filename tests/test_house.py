"""House rules that are checked by reading the source; import-linter checks the layers."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAX_LINES = 500
MAX_FUNCTION_LINES = 55
FILES = sorted([*(ROOT / "lvm").rglob("*.py"), *(ROOT / "entrypoints").glob("*.py")])


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
    text = path.read_text()
    tree = ast.parse(text)
    assert not catches_everything(text)
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(tree), "every file says in one sentence what it is"
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are absolute"
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} does not fit a screen"


def test_a_planted_broad_handler_is_found():
    assert catches_everything("try:\n    x\nexcept Exception:\n    pass")
    assert catches_everything("try:\n    x\nexcept:\n    raise")
    assert catches_everything("try:\n    x\nexcept BaseException:\n    pass")
    assert not catches_everything("try:\n    x\nexcept BaseException:\n    y()\n    raise")
    assert not catches_everything("try:\n    x\nexcept ValueError:\n    pass")


def test_the_workflow_runs_targets_of_the_makefile_with_pinned_actions():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    (job,) = workflow["jobs"].values()
    made = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(job["strategy"]["matrix"]["target"]) == {"check", "test"} <= set(made)
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one) for one in used)
