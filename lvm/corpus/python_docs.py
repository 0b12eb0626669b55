"""Docstrings of the installed libraries that lvm itself depends on, parsed without importing."""

import ast
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lvm.corpus.documents import Document
from lvm.corpus.markup import paragraphs
from lvm.corpus.sentences import split_sentences

SKIPPED_FOLDERS = frozenset(
    "test tests testing _testing _tests _vendor _vendored vendored externals".split()
)


class Package(NamedTuple):
    """One importable package, the distribution it comes in, the lane of its subject."""

    name: str
    distribution: str
    lane: str


# In this order a bank of 40,000 rows holds three whole packages, part of a fourth: four lanes.
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


def installed_versions() -> dict[str, str]:
    """Version of each distribution of PACKAGES that is installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package.distribution] = importlib.metadata.version(package.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def missing_packages() -> list[str]:
    """Names of PACKAGES that cannot be found in this environment."""
    return [package.name for package in PACKAGES if _folder(package) is None]


def read_python_docs() -> Iterator[Document]:
    """Yield a document for each module that has sentences, package by package."""
    for package in PACKAGES:
        folder = _folder(package)
        if folder is None:
            continue
        for module, path in _modules(package.name, folder):
            sentences = module_sentences(path.read_bytes())
            if sentences:
                yield Document(package.name, module, sentences, package.lane)


def module_sentences(source: bytes) -> list[str]:
    """Sentences of all docstrings of a module in source order; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [
        sentence
        for docstring in _docstrings(tree)
        for paragraph in paragraphs(docstring)
        for sentence in split_sentences(paragraph)
    ]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a node, then of all it contains, in source order."""
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
    """Dotted names and files of the modules below `folder`, a package before its modules."""
    modules = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        is_test = path.name.startswith("test_") or path.stem == "conftest"
        if not is_test and SKIPPED_FOLDERS.isdisjoint(parts):
            dotted = (name, *(parts[:-1] if parts[-1] == "__init__" else parts))
            modules.append((dotted, path))
    return [(".".join(dotted), path) for dotted, path in sorted(modules)]
