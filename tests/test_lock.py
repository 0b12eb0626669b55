"""The lock of the test environment: the pins of pyproject.toml, with hashes and licences."""

import re
import tomllib
from pathlib import Path

import pytest

from requirements.licences import APART, LOCK, PAGE, copyleft, locked, normalised

ROOT = Path(__file__).parents[1]


def pinned() -> dict[str, str]:
    """Return the pins of the package with its extra `test`, by normalised name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["test"]
    split = (pin.split(";")[0].strip().split("==") for pin in pins)
    return {normalised(name.split("[")[0]): version for name, version in split}


def disagreements(pins: dict[str, str], lock: dict[str, str]) -> list[str]:
    return sorted(name for name, version in pins.items() if lock.get(name) != version)


def test_the_lock_has_every_pin_but_torch() -> None:
    assert disagreements(pinned(), locked(LOCK.read_text())) == sorted(APART)


def test_a_pin_that_moved_is_found() -> None:
    lock = locked(LOCK.read_text())
    assert disagreements(pinned() | {"numpy": "0.0.1"}, lock) == ["numpy", "torch"]


def without_hash(text: str) -> list[str]:
    """Return the locked packages that have no sha256 of a file."""
    parts = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.M)[1:]
    return [part.split("==")[0] for part in parts if "--hash=sha256:" not in part]


def test_every_locked_package_has_hashes() -> None:
    text = LOCK.read_text()
    assert len(locked(text)) > 100 and without_hash(text) == []
    assert without_hash("a==1 \\\n    --hash=sha256:00\nb==2\n    # via a\n") == ["b"]


def listed() -> dict[str, tuple[str, str, str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: (version, licence, mark) for name, version, licence, mark in cells}


def test_every_locked_package_has_its_licence_on_the_page() -> None:
    page = listed()
    assert {name: version for name, (version, _, _) in page.items() if name not in APART} == locked(
        LOCK.read_text()
    )
    for name, (_, licence, mark) in page.items():
        assert licence and "UNKNOWN" not in licence, name
        assert mark == ("yes" if copyleft(licence) else ""), name


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("MIT", False), ("Apache-2.0", False), ("MPL-2.0 AND MIT", True), ("LGPL-3.0", True)],
)
def test_copyleft_is_told_from_the_licence(licence: str, expected: bool) -> None:
    assert copyleft(licence) == expected
