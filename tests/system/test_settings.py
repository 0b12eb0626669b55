"""Files of unknown origin: what is read of them, what is refused."""

import os
from pathlib import Path

import pytest

from lvm.system.settings import MAX_BYTES, file_inside, parse_json, read_small_text, read_yaml


def test_plain_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: {b: [1, 0.5, null, true, 'x']}\n1: é\n", encoding="utf-8")
    assert read_yaml(path, "x") == {"a": {"b": [1, 0.5, None, True, "x"]}, 1: "é"}
    assert parse_json('{"a": [1, {"b": "\\ud83d\\ude00"}]}') == {"a": [1, {"b": "\U0001f600"}]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &x 1\n", "anchors are not read"),
        ("a: *x\n", "anchors are not read"),
        ("a: !!python/name:os.system\n", "tags are not read"),
        ("a: !!int 5\n", "tags are not read"),
        ("a: 1\na: 2\n", "'a' appears twice"),
        ("a: {1: x, 0x1: y}\n", "1 appears twice"),
        ("a: [1\n", "x "),
        ("a: 2026-99-99\n", "month must be in 1..12"),
        ("[" * 5000, "recursion"),
    ],
)
def test_other_yaml_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="not a readable YAML file without tags") as caught:
        read_yaml(path, "x")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"a": {"b": 1, "b": 1}}', "appears twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
    ],
)
def test_other_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_a_file_is_the_folders_own(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x").write_text("x")
    (folder / "inside").symlink_to("x")
    (tmp_path / "link").symlink_to(folder)
    assert file_inside(folder, "x") == folder / "x"
    assert file_inside(tmp_path / "link", "inside").read_text() == "x"
    (tmp_path / "secret").write_text("x")
    (folder / "outside").symlink_to("../secret")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        file_inside(folder, "outside")
    for name in ("nothing", "."):
        with pytest.raises(ValueError, match="missing, or not a regular file"):
            file_inside(folder, name)


def test_settings_are_small_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_small_text(tmp_path / "pipe")
    with (tmp_path / "long").open("wb") as opened:
        opened.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match="is longer than 16 MiB"):
        read_small_text(tmp_path / "long")
    with pytest.raises(OSError):
        read_small_text(tmp_path / "none")
