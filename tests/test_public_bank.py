"""The public bank, built from tiny archives that are made here."""

import io
import tarfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.public_bank import (
    LEAST_ROWS,
    MOST_TIMES,
    PINS,
    Pins,
    build,
    fetch,
    main,
    read_rows,
    rows_sha256,
)
from lvm.bank.bank import open_bank
from lvm.bank.files import file_sha256
from lvm.corpus.encoders import load_encoder
from lvm.corpus.sentences import Tally

PAGE = Path(__file__).parents[1] / "docs" / "results" / "public-bank.md"
FOOTER = "<p>This line stands below every page.</p>"


def page(title: str, texts: list[str], following: str = "") -> bytes:
    link = f'<link rel="next" href="{following}#top">' if following else ""
    prose = "".join(f"<p>{text}</p>" for text in texts)
    html = f"<html><head>{link}</head><body><h1>{title}</h1>{prose}{FOOTER}</body></html>"
    return html.encode()


def sentences(subject: str, count: int) -> list[str]:
    return [f"Sentence number {place} tells about the {subject}." for place in range(count)]


def write_package(path: Path, pages: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name, content in pages.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0", "data.tar.xz": packed.getvalue()}
    raw = b"!<arch>\n"
    for name, content in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        raw += head.encode() + content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)


@pytest.fixture
def pinned(tmp_path: Path) -> dict:
    """Pins of one archive with two books; the second has its pages by number."""
    pages = {
        "doc/index.html": page("Start", sentences("start", LEAST_ROWS), "z.html"),
        "doc/z.html": page("Middle", sentences("middle", LEAST_ROWS - 2), "a.html"),
        "doc/a.html": page("End", sentences("end", 3)),
        "doc/unlinked.html": page("Lost", sentences("lost", 3)),
    }
    pages |= {
        f"book/ch{n}.html": page(f"Chapter {n}", sentences(f"step {n}", 9)) for n in range(1, 12)
    }
    write_package(tmp_path / "manual_1_all.deb", pages)
    archive = {"package": "manual", "version": "1", "file": "manual_1_all.deb", "licence": "CC0"}
    archive |= {"sha256": file_sha256(tmp_path / "manual_1_all.deb")}
    archive["books"] = [
        {"name": "guide", "lane": "Art", "pages": ["doc/index.html"], "order": "next"},
        {"name": "steps", "lane": "Law", "pages": ["book/ch*.html"]},
    ]
    encoder = {"name": "tiny", "package": "no-such-encoder", "version": "1", "folder": "."}
    return {"rows": "0" * 64, "encoder": encoder | {"sha256": "0"}, "archives": [archive]}


def written(pins: dict, folder: Path) -> Path:
    path = folder / "pins.yaml"
    path.write_text(yaml.safe_dump(pins))
    return path


def test_books_are_read_in_order_without_what_stands_on_every_page(tmp_path: Path, pinned: dict):
    tally = Tally()
    rows = read_rows(Pins.read(written(pinned, tmp_path)), tmp_path, tally)
    guide = rows[rows.sequence == "guide"]
    parts = (("start", LEAST_ROWS), ("middle", LEAST_ROWS - 2), ("end", 3))
    footer = "This line stands below every page."
    assert guide.text.tolist() == [
        text for name, count in parts for text in [*sentences(name, count), footer]
    ]
    assert guide.document.unique().tolist() == ["Start", "Middle"], "a short section is joined"
    steps = rows[rows.sequence == "steps"]
    numbers = [int(text.rpartition(" ")[2].strip(".")) for text in steps.text]
    assert numbers == sorted(numbers) and len(steps) == 11 * 9, "chapter 2 before chapter 10"
    assert 11 > MOST_TIMES and tally.dropped.total() == 11, "the footer of the second book"
    assert rows.lane.unique().tolist() == ["Art", "Law"]


def test_the_bank_has_the_pinned_rows_and_no_others(tmp_path: Path, pinned: dict):
    encoder = load_encoder("wordllama")
    rows = read_rows(Pins.read(written(pinned, tmp_path)), tmp_path, Tally())
    with pytest.raises(ValueError, match="^rows: their sha256 is .*pyproject.toml"):
        build(tmp_path / "bank", tmp_path, Pins.read(written(pinned, tmp_path)), encoder)
    assert not (tmp_path / "bank").exists()
    pins = Pins.read(written(pinned | {"rows": rows_sha256(rows)}, tmp_path))
    build(tmp_path / "bank", tmp_path, pins, encoder)
    bank = open_bank(tmp_path / "bank", verify=True)
    assert bank.num_rows == len(rows) and bank.encoder == "wordllama"
    with pytest.raises(ValueError, match="exists"):
        build(tmp_path / "bank", tmp_path, pins, encoder)


def test_another_archive_is_refused_in_one_line(tmp_path: Path, pinned: dict):
    pinned["archives"][0]["sha256"] = "f" * 64
    archive = Pins.read(written(pinned, tmp_path)).archives[0]
    with pytest.raises(ValueError, match="manual_1_all.deb: its sha256 is .*, not fff.*delete it"):
        fetch(archive, tmp_path)


def test_an_archive_that_cannot_be_fetched_says_where_to_put_it(
    tmp_path: Path, pinned: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    archive = Pins.read(written(pinned, tmp_path)).archives[0]
    with pytest.raises(ValueError, match="there is no apt-get here.*put it into"):
        fetch(archive, tmp_path / "elsewhere")


def test_a_page_that_is_missing_is_named(tmp_path: Path, pinned: dict):
    pinned["archives"][0]["books"][0]["pages"] = ["doc/none.html"]
    with pytest.raises(ValueError, match="book guide: the archive has no doc/none.html"):
        read_rows(Pins.read(written(pinned, tmp_path)), tmp_path, Tally())


def test_a_missing_encoder_ends_the_command_before_anything_is_fetched(
    tmp_path: Path, pinned: dict
):
    words = [str(tmp_path / "bank"), "--pins", str(written(pinned, tmp_path))]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    last = done.output.splitlines()[-1]
    assert last.startswith("Error: encoder no-such-encoder: is not installed; run `pip install")


def test_the_page_names_every_archive_with_its_licence():
    text = PAGE.read_text()
    pins = Pins.read(PINS)
    assert pins.rows[:12] in text
    for one in pins.archives:
        line = next(line for line in text.splitlines() if line.startswith(f"| {one.package} "))
        assert one.version in line and one.licence in line
        assert all(book.name in line for book in one.books)
