"""Files of unknown origin: JSON or YAML without surprises, paths that stay in their folder."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 16 * 2**20  # of a file of settings; lvm writes some thousands


class _Plain(yaml.SafeLoader):
    """Reads YAML of which every value stands where it is read: no tag, alias or repeated key."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors are not read", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "tags are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    place = key_node.start_mark
                    raise yaml.MarkedYAMLError(None, None, f"{key!r} stands there twice", place)
                seen.add(key)
        return super().construct_mapping(node, deep)


def file_inside(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder`; ValueError where it is none, or a link out of it."""
    where = folder / name
    if not where.is_file():
        raise ValueError(f"{where}: missing, or no regular file")
    if not where.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: is a link out of its folder; put the file itself there")
    return where


def read_small_text(path: Path) -> str:
    """Return the text of a small UTF-8 file; raises OSError or ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: is longer than {MAX_BYTES // 2**20} MiB")
    return path.read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text that says everything once.

    Raises ValueError for what is no JSON, is nested beyond reason, names a key twice, holds NaN or
    half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_yaml(path: Path, what: str) -> Any:
    """Return the contents of a YAML file of plain values; `what` begins the refusal.

    Raises ValueError for anchors, tags, repeated keys, for what cannot be read.
    """
    try:
        return yaml.load(read_small_text(path), _Plain)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{what} {path}: not a readable YAML file without tags: {why}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
