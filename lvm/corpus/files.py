"""A folder of .md, .rst, .txt or .jsonl files as a corpus: one sequence a file."""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lvm.corpus.documents import Document, block_documents
from lvm.corpus.markup import paragraphs
from lvm.corpus.sentences import split_sentences
from lvm.system.errors import CONTROL, printable
from lvm.system.untrusted import file_inside, parse_json

SUFFIXES = (".md", ".rst", ".txt", ".jsonl")
_MARKDOWN_HEADING = re.compile(r"^#{1,6}\s+(\S.*)$")
_UNDERLINE = re.compile(r"^([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_FENCE = re.compile(r"^\s*(```|~~~)")


class Line(NamedTuple):
    """One checked line of a .jsonl file; `document` is None where it names none."""

    sequence: str
    document: str | None
    lane: str
    text: str


def corpus_files(source: Path) -> list[Path]:
    """Files of the corpus in a fixed order; ValueError where there are none."""
    paths = [source] if source.is_file() else sorted(source.rglob("*"))
    found = [path for path in paths if path.is_file() and path.suffix in SUFFIXES]
    if not found:
        raise ValueError(f"source {source}: holds no {', '.join(SUFFIXES)} file; give a folder")
    for path in found:
        if CONTROL.search(str(path)):
            raise ValueError(f"source {source}: {str(path)!r} holds control characters; rename it")
        if path != source:
            file_inside(source, str(path.relative_to(source)))
    return found


def read_files(source: Path) -> Iterator[Document]:
    """Yield the documents of all files: heading sections, or blocks of 100 rows without headings.

    A .jsonl line {"text": ..., "sequence"?, "document"?, "lane"?} is one row, its text as it is.
    """
    for path in corpus_files(source):
        name = path.name if path == source else path.relative_to(source).as_posix()
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text; convert it or take it away") from error
        if path.suffix == ".jsonl":
            yield from _jsonl_documents(path, name, text)
        elif path.suffix == ".txt":
            yield from block_documents(name, split_sentences(text))
        else:
            yield from _section_documents(name, text)


def _section_documents(sequence: str, text: str) -> Iterator[Document]:
    """One document a heading; a title that comes again is numbered."""
    seen: Counter[str] = Counter()
    parts = sections(text)
    for title, body in parts:
        texts = [s for paragraph in paragraphs(body) for s in split_sentences(paragraph)]
        if len(parts) == 1 and not title:
            yield from block_documents(sequence, texts)
        elif texts:
            name = printable(" ".join(title.split())) or "(top)"
            seen[name] += 1
            yield Document(sequence, name if seen[name] == 1 else f"{name} ({seen[name]})", texts)


def sections(text: str) -> list[tuple[str, str]]:
    """Cut Markdown or reStructuredText at its headings; return (title, body), first title "" ."""
    lines = text.splitlines()
    parts: list[tuple[str, list[str]]] = [("", [])]
    fenced = False
    for position, line in enumerate(lines):
        fenced ^= bool(_FENCE.match(line))
        heading = None if fenced else _MARKDOWN_HEADING.match(line)
        body = parts[-1][1]
        if heading:
            parts.append((heading[1].rstrip(" \t#") or heading[1][0], []))
        elif not fenced and body and _is_underline(line, lines[position - 1]):
            title = body.pop().strip()
            while body and _UNDERLINE.match(body[-1]):  # reStructuredText's overline
                body.pop()
            parts.append((title, []))
        else:
            body.append(line)
    return [(title, "\n".join(body)) for title, body in parts if title or "".join(body).strip()]


def _is_underline(line: str, above: str) -> bool:
    """Whether `line` underlines the title `above`: as long, directly below, not itself a rule."""
    if not _UNDERLINE.match(line) or not above.strip() or _UNDERLINE.match(above):
        return False
    return not above.startswith((" ", "\t", "|")) and len(line.strip()) >= len(above.strip())


def _jsonl_documents(path: Path, sequence: str, text: str) -> Iterator[Document]:
    lines = [
        _jsonl_line(f"{path} line {number}", line, sequence)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    for (name, document, lane), group in groupby(lines, key=lambda line: line[:3]):
        texts = [line.text for line in group]
        if document is None:
            yield from block_documents(name, texts, lane)
        else:
            yield Document(name, document, texts, lane)


def _jsonl_line(where: str, line: str, sequence: str) -> Line:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f'{where}: must be an object with a string "text"')
    for key in ("sequence", "document", "lane"):
        name = row.get(key, "")
        if not isinstance(name, str) or CONTROL.search(name):
            raise ValueError(f'{where}: "{key}" must be a string without control characters')
    return Line(
        row.get("sequence", sequence), row.get("document"), row.get("lane", ""), row["text"]
    )
