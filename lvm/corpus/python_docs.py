"""Docstrings of the libraries that lvm itself depends on: parsed, never imported.

A docstring mixes numpydoc, Google's style, Sphinx's fields and Markdown, which no parser reads
together; `paragraphs` goes through its lines. Its rules decide the embedded corpus: keep them
stable.
"""

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lvm.corpus.sentences import Tally

SKIPPED_FOLDERS = frozenset(
    "test tests testing _testing _tests _vendor _vendored vendored externals".split()
)


class Package(NamedTuple):
    """An importable package, its distribution, and the lane of its subject."""

    name: str
    distribution: str
    lane: str


LANGUAGE = "en"
PACKAGES = (
    Package("numpy", "numpy", "Mathematics"),
    Package("matplotlib", "matplotlib", "Art"),
    Package("huggingface_hub", "huggingface-hub", "Technology"),
    Package("sqlalchemy", "sqlalchemy", "Software"),
    Package("sklearn", "scikit-learn", "Science"),
    Package("mlflow", "mlflow", "Engineering"),
    Package("networkx", "networkx", "Mathematics"),
    Package("pandas", "pandas", "Science"),
    Package("torch", "torch", "Technology"),
    Package("scipy", "scipy", "Science"),
    Package("sympy", "sympy", "Mathematics"),
    Package("databricks", "databricks-sdk", "Technology"),
    Package("fontTools", "fonttools", "Art"),
    Package("narwhals", "narwhals", "Science"),
    Package("mpmath", "mpmath", "Mathematics"),
    Package("pydantic", "pydantic", "Software"),
    Package("PIL", "pillow", "Art"),
    Package("docker", "docker", "Engineering"),
    Package("alembic", "alembic", "Software"),
    Package("werkzeug", "werkzeug", "Engineering"),
    Package("graphql", "graphql-core", "Software"),
    Package("git", "gitpython", "Software"),
    Package("fsspec", "fsspec", "Technology"),
    Package("flask", "flask", "Engineering"),
    Package("jinja2", "jinja2", "Software"),
    Package("click", "click", "Software"),
    Package("joblib", "joblib", "Technology"),
    Package("pyparsing", "pyparsing", "Software"),
)
TEXT_DIRECTIVES = frozenset(
    "admonition attention caution danger deprecated hint important note seealso tip todo topic "
    "versionadded versionchanged warning".split()
)
DROPPED_FIELDS = frozenset("rtype type vartype cvar meta".split())
GOOGLE_SECTION = re.compile(
    r"^(?:Args?|Arguments|Attributes|Examples?|Keyword Args|Keyword Arguments|Notes?|Other "
    r"Parameters|Parameters|Params|Raises|References|Returns?|See Also|Shape|Usage|Warnings?|"
    r"Yields?):$"
)
NUMPY_SECTIONS = frozenset(
    ("parameters", "other parameters", "returns", "yields", "attributes", "raises")
)
_FENCE = re.compile(r"^(```|~~~)")
_PROMPT = re.compile(r"^(>>>|\.\.\. |In \[\d+\]:|Out\[\d+\]:|\$ )")
_DIRECTIVE = re.compile(r"^\.\. +([\w:-]+):: *(.*)$")
_UNDERLINE = re.compile(r"^([^\w\s])\1{2,}$")
_TABLE_BORDER = re.compile(r"^[=-]{2,}( +[=-]{2,})+$")
_GRID = re.compile(r"^(\+[-=]|\|)")
_QUOTE = re.compile(r"^(?:> ?)(?!>)(?:\[!\w+\])?")  # Markdown's quotes, "> [!TIP]"
_FIELD = re.compile(r"^:(\w+)(?: +([^ :][^:]*))?:(?: +(.*))?$")
_BULLET = re.compile(r"^(?:[-*+•]|\d+[.)]|\(\w\)|#\.) +(?=\S)")
_NAMES = r"\*{0,2}`{0,2}[A-Za-z_][\w.]*`{0,2}(?:, ?\*{0,2}[A-Za-z_][\w.]*)*"
_NUMPY_ITEM = re.compile(rf"^({_NAMES}) ?: (.*)$")
_GOOGLE_ITEM = re.compile(r"^(\*{0,2}`{0,2}[A-Za-z_][\w.]*`{0,2})(?: \(.*?\))?: *(.*)$")
_TYPE = re.compile(r"^[\w.]+(?:\[.*\])?(?: \(optional\))?$")
_TERM = re.compile(r"^[A-Za-z_][\w.]*$")


def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution of PACKAGES."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package.distribution] = importlib.metadata.version(package.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def missing_packages() -> list[str]:
    """Return the names of PACKAGES that are not installed."""
    return [package.name for package in PACKAGES if _folder(package) is None]


def python_modules() -> Iterator[tuple[Package, str, Path]]:
    """Yield (package, dotted name, file) of each module of the installed packages, in order."""
    for package in PACKAGES:
        folder = _folder(package)
        if folder is not None:
            for module, path in _modules(package.name, folder):
                yield package, module, path


def module_sentences(source: bytes, tally: Tally | None = None) -> list[str]:
    """Return the sentences of all docstrings of a module; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    tally = tally or Tally()
    return [
        sentence
        for docstring in _docstrings(tree)
        for paragraph in paragraphs(docstring)
        for sentence in tally.split(paragraph, LANGUAGE)
    ]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstring of a node, then those of its contents, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child)


def _folder(package: Package) -> Path | None:
    spec = importlib.util.find_spec(package.name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


def _modules(name: str, folder: Path) -> list[tuple[str, Path]]:
    """Yield dotted names and files of the modules below `folder`, a package before its modules."""
    modules = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        is_test = path.name.startswith("test_") or path.stem == "conftest"
        if not is_test and SKIPPED_FOLDERS.isdisjoint(parts):
            dotted = (name, *(parts[:-1] if parts[-1] == "__init__" else parts))
            modules.append((dotted, path))
    return [(".".join(dotted), path) for dotted, path in sorted(modules)]


@dataclass
class _Reader:
    """Reads the lines of one text and collects its paragraphs."""

    lines: list[str]
    position: int = 0
    heading: str = ""
    section_indent: int | None = None  # indent of the Google section ("Args:") that the line is in
    item_indent: int | None = None
    words: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)

    def flush(self) -> None:
        """End the paragraph."""
        if self.words:
            self.paragraphs.append(plain(" ".join(self.words)))
        self.words = []

    def skip_deeper(self, indent: int) -> None:
        """Skip lines that are blank or indented deeper than `indent`."""
        while self.position < len(self.lines):
            line = self.lines[self.position]
            if line.strip() and _indent(line) <= indent:
                return
            self.position += 1

    def skip_until_blank(self) -> None:
        """Skip the lines up to the next blank one."""
        while self.position < len(self.lines) and self.lines[self.position].strip():
            self.position += 1

    def next_is_deeper(self, indent: int) -> bool:
        """Return whether the next line is indented deeper than this one."""
        if self.position >= len(self.lines):
            return False
        line = self.lines[self.position]
        return bool(line.strip()) and _indent(line) > indent


def paragraphs(text: str) -> list[str]:
    """Return the prose paragraphs of `text`, one line each, without markup.

    Doctests, literal and code blocks, formulas, tables, headings, citations and types are dropped.
    An item of a parameter list becomes "name: description".
    """
    reader = _Reader(inspect.cleandoc(text).expandtabs().splitlines())
    while reader.position < len(reader.lines):
        line = _QUOTE.sub("", reader.lines[reader.position])
        reader.position += 1
        if not line.strip():
            reader.flush()
        elif not _skip_block(reader, line.strip(), _indent(line)):
            _read_line(reader, line.strip(), _indent(line))
    reader.flush()
    return [paragraph for paragraph in reader.paragraphs if paragraph]


def _skip_block(reader: _Reader, line: str, indent: int) -> bool:
    """Skip a block that is not prose; return whether `line` began one."""
    directive = _DIRECTIVE.match(line)
    if _FENCE.match(line):
        reader.flush()
        fence = line[:3]
        while reader.position < len(reader.lines):
            reader.position += 1
            if reader.lines[reader.position - 1].strip().startswith(fence):
                break
    elif _PROMPT.match(line) or _TABLE_BORDER.match(line):
        reader.flush()
        reader.skip_until_blank()
    elif directive and directive[1] in TEXT_DIRECTIVES:
        reader.flush()
        if not directive[1].startswith(("version", "deprecated")):
            reader.words = [directive[2]] if directive[2] else []
    elif line.startswith(".. ") or line == "..":
        reader.flush()
        reader.skip_deeper(indent)
    elif _UNDERLINE.match(line):
        if len(reader.words) == 1:  # the line above was a heading
            reader.heading = reader.words.pop().lower()
        reader.flush()
    elif _GRID.match(line):
        reader.flush()
    else:
        return False
    return True


def _read_line(reader: _Reader, line: str, indent: int) -> None:
    """Add `line` to the paragraph, or begin a new one where a list item begins."""
    if reader.section_indent is not None and indent <= reader.section_indent:
        reader.section_indent = reader.item_indent = None
    if GOOGLE_SECTION.match(line.removesuffix(":") if line.endswith("::") else line):
        reader.flush()
        if line.endswith("::"):
            reader.skip_deeper(indent)
        else:
            reader.section_indent, reader.item_indent = indent, None
        return
    literal = line.endswith("::")
    if literal:
        line = line.rstrip(": ") + ":"
    item = _item(reader, line, indent)
    if item is None:
        reader.words.append(line)
    else:
        reader.flush()
        reader.words = [item] if item else []
    if literal:
        reader.flush()
        reader.skip_deeper(indent)


def _item(reader: _Reader, line: str, indent: int) -> str | None:
    """Return the first words of the list item at `line` ("" for none); None if it is no item."""
    bullet = _BULLET.match(line)
    if bullet:
        line = line[bullet.end() :]
    sphinx = _FIELD.match(line)
    if sphinx:
        if sphinx[1] in DROPPED_FIELDS:
            reader.skip_deeper(indent)
            return ""
        name = sphinx[2].split()[-1] + ":" if sphinx[2] else ""
        rest = plain(sphinx[3] or "")
        return name if _TYPE.match(rest) else f"{name} {rest}".strip()
    google = _GOOGLE_ITEM.match(line)
    in_section = reader.section_indent is not None
    if google and in_section and reader.item_indent in (None, indent):
        reader.item_indent = indent
        return f"{google[1]}: {google[2]}"
    numpy = _NUMPY_ITEM.match(line)
    if numpy and (" : " in line or reader.heading in NUMPY_SECTIONS):
        return _numpy_item(reader, numpy[1], numpy[2], indent)
    if not reader.words and _TERM.match(line) and reader.next_is_deeper(indent):
        return f"{line}:"
    if not reader.words and len(line.split()) <= 6 and reader.next_is_deeper(indent):
        return "" if line[-1] not in ".:,;" else None
    return line if bullet else None


def _numpy_item(reader: _Reader, name: str, rest: str, indent: int) -> str:
    """Return "x:" for `x : int` with a description below; `f : Adds two.` describes itself."""
    if reader.heading == "see also":
        return f"{name}: {rest}"
    if reader.next_is_deeper(indent):
        return f"{name}:"
    return f"{name}: {rest}" if rest[:1].isupper() and len(rest.split()) > 2 else ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


_INLINE = (
    (re.compile(r":[\w+.:-]{1,60}:`[~!]?([^`<]*?)\s*<[^`>]*>`"), r"\1"),  # :role:`title <target>`
    (re.compile(r"(?::[\w+.:-]{1,60}:)?`~[^`]*?([^`.]+)`"), r"\1"),  # :role:`~package.name`
    (re.compile(r":[\w+.:-]{1,60}:`[!.]?(?:_\w+\.)?([^`]*)`"), r"\1"),  # :role:`name`
    (re.compile(r"``+([^`]+?)``+"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `title <target>`_
    (re.compile(r"!\[[^\]]{0,1000}\]\([^)]{0,1000}\)"), ""),
    (re.compile(r"\[([^\]]{1,1000})\]\([^)\s]{0,1000}\)"), r"\1"),  # [title](target)
    (re.compile(r"\[`([^`]+)`\]"), r"\1"),  # [`name`], huggingface_hub's reference
    (re.compile(r"`\.?([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"\s?\[[\w#*.-]+\]_"), ""),  # a citation
    (re.compile(r"</?(?:a|b|br|code|div|em|hr|i|img|li|p|pre|span|strong|sub|sup)\b[^<>]*>"), ""),
    (re.compile(r"(?<![\w*])\*\*?(?=[^\s*])([^*]+?)(?<=\S)\*\*?(?![\w*])"), r"\1"),
    (re.compile(r"\\ "), ""),
    (re.compile(r"\\([*_`|])"), r"\1"),
    (re.compile(r"\s+"), " "),
)


def plain(text: str) -> str:
    """Remove inline markup: roles, literals, links, emphasis, citations, escapes."""
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip()
