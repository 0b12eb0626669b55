"""Sources of text: folders with lanes, tables of texts, pages of any script, what is refused."""

import json
import unicodedata
from pathlib import Path

import pandas as pd
import pytest

from lvm.corpus.ingest import ingest
from lvm.corpus.reading import SourceOptions, read_corpus, read_text_file

PAGES = {
    "latin": ["The river runs past the old mill.", "Who opened the gate this morning?"],
    "cyrillic": ["Старый мост стоит над рекой.", "Кто открыл ворота сегодня утром?"],
    "greek": ["Το παλιό γεφύρι στέκει πάνω από το ποτάμι.", "Ποιος άνοιξε την πόρτα σήμερα;"],
    "arabic": ["يقف الجسر القديم فوق النهر.", "من فتح الباب هذا الصباح؟"],
    "hebrew": ["הגשר הישן עומד מעל הנהר.", "מי פתח את השער הבוקר?"],
    "devanagari": ["पुराना पुल नदी के ऊपर खड़ा है।", "आज सुबह दरवाज़ा किसने खोला?"],
    "tamil": ["பழைய பாலம் ஆற்றின் மேல் நிற்கிறது.", "இன்று காலை கதவை யார் திறந்தது?"],
    "thai": ["สะพานเก่าตั้งอยู่เหนือแม่น้ำ", "เช้านี้ใครเปิดประตูบ้าน"],
    "chinese": ["老桥横跨在河上。", "今天早上谁打开了大门？"],
    "japanese": ["古い橋が川の上に立っています。", "今朝だれが門を開けましたか？"],
}


def page(script: str) -> str:
    return ("" if script in ("chinese", "japanese") else " ").join(PAGES[script])


def composed(sentences: list[str]) -> list[str]:
    return [unicodedata.normalize("NFC", one) for one in sentences]


def test_a_folder_of_ten_scripts_keeps_every_sentence(tmp_path: Path) -> None:
    for script in PAGES:
        (tmp_path / f"{script}.txt").write_text(page(script), "utf-8")
    rows = read_corpus(str(tmp_path)).rows
    for script, sentences in PAGES.items():
        found = rows[rows["sequence"] == f"{script}.txt"]["text"].tolist()
        assert found == composed(sentences)


@pytest.mark.parametrize("suffix", [".md", ".rst", ".html"])
def test_a_page_of_ten_scripts_has_a_document_for_each(suffix: str, tmp_path: Path) -> None:
    heading = {".md": "# {0}\n\n{1}\n\n", ".rst": "{0}\n==========\n\n{1}\n\n"}
    text = "".join(
        heading.get(suffix, "<h1>{0}</h1><p>{1}</p>").format(script, page(script))
        for script in PAGES
    )
    (tmp_path / f"mixed{suffix}").write_text(text, "utf-8")
    rows = read_corpus(str(tmp_path)).rows
    found = rows.groupby("document", sort=False)["text"].apply(list).to_dict()
    assert found == {script: composed(sentences) for script, sentences in PAGES.items()}


def test_the_first_folder_of_a_file_is_its_lane(tmp_path: Path) -> None:
    for name in ("law/a.md", "law/old/b.txt", "art/c.html", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("One sentence is enough here.")
    (tmp_path / "art" / "d.jsonl").write_text('{"text": "x y z", "lane": "own"}\n{"text": "u"}\n')
    rows = read_corpus(str(tmp_path), SourceOptions(lanes="folder")).rows
    assert list(zip(rows["sequence"], rows["lane"], strict=True)) == [
        ("art/c.html", "art"),
        ("art/d.jsonl", "own"),
        ("art/d.jsonl", "art"),
        ("law/a.md", "law"),
        ("law/old/b.txt", "law"),
        ("top.txt", ""),
    ]
    assert "lane" not in read_corpus(str(tmp_path / "law")).rows
    with pytest.raises(ValueError, match="lanes 'files': of text, lanes are none or folder"):
        SourceOptions(lanes="files")


LANGCHAIN = [
    {"page_content": "The first page.", "metadata": {"source": "report.pdf", "page": 0}},
    {"page_content": "Its second part.", "metadata": {"source": "report.pdf", "page": 0}},
    {"page_content": "The next page.", "metadata": {"source": "report.pdf", "page": 1}},
    {"page_content": "No metadata.", "metadata": {}, "type": "Document"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_of_langchain_keep_source_and_page(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"chunks{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, LANGCHAIN)))
    else:
        pd.DataFrame(LANGCHAIN).to_parquet(path)
    rows = read_corpus(str(path)).rows
    assert rows[["sequence", "document", "text"]].to_numpy().tolist() == [
        ["report.pdf", "page 0", "The first page."],
        ["report.pdf", "page 0", "Its second part."],
        ["report.pdf", "page 1", "The next page."],
        [f"chunks{suffix}", "block-000000", "No metadata."],
    ]


def test_own_names_in_metadata_stand_before_those_of_langchain(tmp_path: Path) -> None:
    metadata = {"source": "a.pdf", "page": 3, "document": "Chapter 1", "lane": "Law"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"page_content": "x", "metadata": metadata}))
    rows = read_corpus(str(tmp_path)).rows
    assert rows.to_numpy().tolist() == [["a.pdf", "Chapter 1", "Law", "x"]]
    (tmp_path / "a.jsonl").write_text('{"page_content": "x", "metadata": "none"}')
    with pytest.raises(ValueError, match='a.jsonl line 1: "metadata" must be an object'):
        read_corpus(str(tmp_path))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_of_texts_is_read_row_by_row(separator: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.TSV" if separator == "\t" else "a.csv")
    header, rows = ["sequence", "text"], [["1", "As it is. Not split."], ["1", "Two"], ["2", "x"]]
    path.write_text("\n".join(separator.join(row) for row in [header, *rows]), "utf-8-sig")
    assert read_corpus(str(path)).rows[["sequence", "text"]].to_numpy().tolist() == rows


def test_a_source_of_which_most_is_dropped_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("This sentence is one that stays.\n\n" + "1.5 2.5 3.5\n\n" * 40)
    with pytest.raises(ValueError, match=r"9\d% of its text would be dropped \(40 .*as JSONL"):
        read_corpus(str(tmp_path))
    (tmp_path / "b.txt").write_text("A long sentence of many words follows it here. " * 40)
    corpus = read_corpus(str(tmp_path))  # most of the source as a whole is kept
    assert corpus.tallies["a.txt"].kept == 1
    assert corpus.tallies["a.txt"].dropped.total() == 40


def test_files_that_lose_sentences_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("Nothing is lost from this file.")
    (folder / "b.txt").write_text("Too short. But this sentence is kept, and it is long.")
    (folder / "c.txt").write_text("No. Yes.")
    (folder / "d.docx").write_bytes(b"PK")
    report = ingest(str(folder), "wordllama", tmp_path / "bank")
    assert report.files == {
        "b.txt": {"kept": 1, "fewer than 3 words": 1},
        "c.txt": {"kept": 0, "fewer than 3 words": 2},
    }
    assert report.notes == ("left out, as ingest does not read them: 1 .docx",)


def test_one_file_is_read_by_its_markup(tmp_path: Path) -> None:
    expected = ["The first sentence is here.", "The second one is there."]
    texts = {
        "a.MD": "# A title\n\nThe **first** sentence is here.\n\n```\nx = 1\n```\n\n"
        "The second one is [there](http://x.org).\n",
        "a.rst": "Title\n=====\n\nThe *first* sentence is here.\n\n::\n\n  x = 1\n\n"
        "The second one is `there`_.\n",
        "a.htm": "<p>The <b>first</b> sentence is here.<pre>x</pre><p>The second one is there.",
        "a.text": "The first sentence is here. The second one is there.",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, "utf-8-sig")
        assert read_text_file(tmp_path / name) == expected


def test_html_in_a_declared_encoding_is_read(tmp_path: Path) -> None:
    page = '<meta charset="windows-1251"><p>Старый мост стоит над рекой.'
    (tmp_path / "a.html").write_text(page, "windows-1251")
    assert read_text_file(tmp_path / "a.html") == ["Старый мост стоит над рекой."]
    (tmp_path / "a.html").write_text(page.replace("windows-1251", "none-such"), "windows-1251")
    with pytest.raises(ValueError, match="a.html: is not in the encoding that it declares"):
        read_text_file(tmp_path / "a.html")


def test_a_folder_without_text_is_told_what_it_holds(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.DOCX").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"it has 1 .parquet, 1 .docx\); give hf:.* for its"):
        read_corpus(str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ValueError, match=r"\(it has 1 .docx\); give a folder with one"):
        read_corpus(str(tmp_path))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        (tmp_path / unicodedata.normalize(form, "é.txt")).write_text("One sentence is enough.")
    with pytest.raises(ValueError, match="two files are called .*; rename one"):
        read_corpus(str(tmp_path))


def test_a_column_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,title\nA row of the table.,b\n")
    assert read_corpus(str(path)).notes == ("columns that are not read: title",)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_vectors_that_are_text_are_refused(name: str, tmp_path: Path) -> None:
    """As pandas writes a column of lists to CSV."""
    path = tmp_path / name
    table = pd.DataFrame({"text": ["A row of the table."], "embedding": ["[0.1, 0.2]"]})
    if name == "a.csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    with pytest.raises(ValueError, match="embedding is text, not a list of numbers"):
        read_corpus(str(path))


def test_a_table_without_texts_is_refused_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Text;Lane\nA row of the table.;law\n")
    with pytest.raises(ValueError, match="no column text, .* among Text, Lane; "):
        read_corpus(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(("name", "way"), [("a.npy", "as vectors.npy"), ("a.json", "give JSONL")])
def test_what_is_not_read_is_refused_with_a_way(name: str, way: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=way):
        read_corpus(str(tmp_path / name))
