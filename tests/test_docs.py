"""README and docs/: every path, link, module, command and parameter that they name exists."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RESULTS = {ROOT / "docs" / "results" / name for name in ("phases.md", "scaling.md")}  # as printed
LOG = ROOT / "docs" / "LOG.md"  # speaks of the tree of its day
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md")} - RESULTS - {LOG})
ENTRIES = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
TARGETS = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
FOLDERS = "lvm|entrypoints|tests|benchmarks|docs|requirements"
README_WORDS = 1300
LINE_WIDTH = 120


def lost_links(page: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def lost_paths(text: str) -> list[str]:
    """Return the paths of the repository that a text names and that do not exist."""
    paths = re.findall(rf"(?<![\w/.<-])((?:{FOLDERS})/[\w./-]*\w)", text)
    return [path for path in paths if not (ROOT / path).exists()]


def lost_modules(text: str) -> list[str]:
    """Return the dotted modules of lvm, entrypoints and benchmarks that do not exist."""
    names = re.findall(r"(?<![\w./])((?:lvm|entrypoints|benchmarks)(?:\.[a-z_]+)+)\b", text)
    return [name for name in names if not is_defined(name)]


def is_defined(name: str) -> bool:
    """Tell whether a dotted name is a module, or is defined in the one that it is said to be in."""
    path = ROOT / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    homes = [path.parent.with_suffix(".py"), path.parent / "__init__.py"]
    return any(re.search(rf"\b{path.name}\b", home.read_text()) for home in homes if home.exists())


def wrong_commands(text: str) -> list[str]:
    """Return the commands whose entry, parameter or make target does not exist."""
    joined = re.sub(r"\\\n\s*", " ", text)
    wrong = []
    runs = re.findall(r"mlflow run \.([^\n`#|]*)", joined)
    runs += [f" -e {words}" for words in re.findall(r"`([\w-]+ -P [^`]*)`", joined)]
    for words in runs:
        entry = re.search(r"-e ([\w-]+)", words)
        name = "main" if entry is None else entry[1]
        given = re.findall(r"-P ([\w]+)=", words)
        known = ENTRIES.get(name, {}).get("parameters", {})
        if name not in ENTRIES or set(given) - set(known):
            wrong.append(words.strip())
    targets = re.findall(r"`make ([\w.-]+)`|^\$ make ([\w.-]+)", joined, re.M)
    return wrong + [f"make {a or b}" for a, b in targets if (a or b) not in TARGETS]


def long_lines(text: str) -> list[str]:
    """Return the lines of prose that are wider than LINE_WIDTH; tables and code are exempt."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines()
    return [line for line in prose if len(line) > LINE_WIDTH and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = page.read_text()
    assert lost_links(page, text) == []
    assert lost_paths(text) == []
    assert lost_modules(text) == []
    assert wrong_commands(text) == []
    assert long_lines(text) == []


def test_readme_is_one_page_and_the_index_names_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= README_WORDS
    named = set(re.findall(r"^\| `([\w-]+)`(?:, `([\w-]+)`)? \| ", readme, re.M))
    assert {name for pair in named for name in pair if name} == set(ENTRIES)
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / link) for link in re.findall(r"\]\(([^)]+)\)", index)}
    pages = {path.parent if path.name == "README.md" else path for path in PAGES if path != LOG}
    top = {p for p in pages if p.parent == ROOT / "docs"} | {LOG}
    linked = {path.parent if path.name == "README.md" else path for path in linked}
    assert linked == top


def test_planted_errors_are_found() -> None:
    page = ROOT / "README.md"
    assert lost_links(page, "[x](docs/none.md) [y](docs/team.md#clients) [z](https://x.y)") == [
        "docs/none.md"
    ]
    assert lost_paths("`lvm/none.py`, `lvm/gates.yaml`, data/lvm/none") == ["lvm/none.py"]
    assert lost_modules("`lvm.none.py`, `lvm.bank`, `benchmarks.ranking`") == ["lvm.none.py"]
    assert wrong_commands("$ mlflow run . -e trian -P ctx=1\n$ mlflow run . -P size=quick") == [
        "-e trian -P ctx=1"
    ]
    assert wrong_commands("`train -P ctxs=1`; `train -P ctx=1`, `make nothing`") == [
        "-e train -P ctxs=1",
        "make nothing",
    ]
    assert wrong_commands("$ mlflow run . -e eval -P model=x \\\n    -P controls=false") == []
    assert long_lines("x" * 121 + "\n| " + "x" * 121) == ["x" * 121]


def test_shell_commands_can_be_parsed() -> None:
    for page in PAGES:
        joined = re.sub(r"\\\n\s*", " ", page.read_text())
        for line in re.findall(r"^\$ (.*)$", joined, re.M):
            shlex.split(line, comments=True)
