"""Tests of the corpora: what is prose is kept in order, what is not is dropped."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lvm.bank.bank import Bank, open_bank, write_bank
from lvm.bank.row_table import TMD_LANES
from lvm.corpus import python_docs
from lvm.corpus.ingest import ingest
from lvm.corpus.markup import read_sections
from lvm.corpus.python_docs import PACKAGES, module_sentences, paragraphs
from lvm.corpus.reading import EMBEDDED_ROWS, SourceOptions, read_corpus, row_limit
from lvm.corpus.sentences import MAX_WORDS, split_sentences

pytestmark = pytest.mark.slow

NUMPYDOC = """
    Return the `mean` of an array, see :func:`~numpy.median` or `the guide <https://x.org>`_.

    The sum is divided by ``n``, e.g. 5. It uses numpy.ndarray.Sum inside [1]_::

        total = a.sum() / n

    Parameters
    ----------
    a : array_like, shape (n,)
        Numbers whose mean
        is wanted.
    axis, order : int, optional
        Axis along which means are taken.
    dtype : data-type

    Returns
    -------
    m : ndarray
        Mean of the numbers given.

    See Also
    --------
    average : Weighted average
        of many numbers.
    var, std

    Notes
    -----
    .. math:: m = \\frac{1}{n} \\sum a
    .. versionadded:: 1.7.0

    .. note:: Masked values are left out.

    ==== ======
    code meaning of the code
    ==== ======

    * The first item is a sentence.
    * The *second* item is **one** too.

    .. [1] Somebody, "A reference that no one reads", 1999.

    Examples
    --------
    A first example with numbers:

    >>> mean([1, 2, 3])
    a line of output that is long
"""
NUMPYDOC_SENTENCES = [
    "Return the mean of an array, see median or the guide.",
    "The sum is divided by n, e.g. 5.",
    "It uses numpy.ndarray.Sum inside:",
    "a: Numbers whose mean is wanted.",
    "axis, order: Axis along which means are taken.",
    "m: Mean of the numbers given.",
    "average: Weighted average of many numbers.",
    "Masked values are left out.",
    "The first item is a sentence.",
    "The second item is one too.",
    "A first example with numbers:",
]
GOOGLE = """
    Train the model on rows.

    Args:
        model (nn.Module): The model that
            is trained here.
        lr: Step size of the optimiser.
        flag (bool, optional): bool

    Returns:
        The best of the trained models.

    Example::

        >>> train(model)
        some output that is dropped

    ```python
    this fenced text is code
    ```

    > [!TIP]
    > Quotes are text as well.
"""
GOOGLE_SENTENCES = [
    "Train the model on rows.",
    "model: The model that is trained here.",
    "lr: Step size of the optimiser.",
    "The best of the trained models.",
    "Quotes are text as well.",
]
SPHINX = """
    List the runs of one page.

    :param page_size: int (optional)
      Number of runs on one page.
    :param kind: :class:`Kind` (optional)
    :type kind: a type nobody reads
    :returns: Iterator over all the runs.
    :rtype: an iterator of things
    :raises ValueError: if the page is empty.
"""
SPHINX_SENTENCES = [
    "List the runs of one page.",
    "page_size: Number of runs on one page.",
    "Iterator over all the runs.",
    "ValueError: if the page is empty.",
]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (NUMPYDOC, NUMPYDOC_SENTENCES),
        (GOOGLE, GOOGLE_SENTENCES),
        (SPHINX, SPHINX_SENTENCES),
    ],
    ids=["numpydoc", "google", "sphinx"],
)
def test_docstring_styles(docstring: str, expected: list[str]) -> None:
    found = [s for paragraph in paragraphs(docstring) for s in split_sentences(paragraph)]
    assert found == expected


def test_links_leave_their_titles() -> None:
    text = "See [`Trainer`](https://host/x), [the docs](y#z) or [`Model.fit`]. ![a map](map.png)"
    assert paragraphs(text) == ["See Trainer, the docs or Model.fit."]


def test_sentences_are_split_where_they_end() -> None:
    text = "Dr. Smith met e.g. Ann at 3.5 miles. They spoke!\n\nA new paragraph\nbegins here"
    assert split_sentences(text) == [
        "Dr. Smith met e.g. Ann at 3.5 miles.",
        "A new paragraph begins here",
    ]


def test_monsters_are_cut_to_equal_pieces() -> None:
    words = [f"word{'s' * (n % 3)}" for n in range(150)]
    pieces = split_sentences(" ".join(words))
    assert " ".join(pieces).split() == words
    assert [len(piece.split()) for piece in pieces] == [50, 50, 50] and MAX_WORDS == 60


@pytest.mark.parametrize(
    "text",
    [
        ": int",
        "x = compute(the, mean)",
        "library, version = parse the command line",
        "import numpy as np",
        "SELECT name FROM people WHERE age",
        "foo(bar, baz, qux)",
        "1.0 2.0 3.0 4.0 and 5.0",
        "Yes.",
        "in_degree out_degree edge_count of_node",
        "Format this %(klass)s with care",
        "----- +++++ ===== -----",
    ],
)
def test_what_is_no_sentence_is_dropped(text: str) -> None:
    assert split_sentences(text) == []


def test_module_docstrings_come_in_source_order() -> None:
    source = b'''"""The module comes first."""
class A:
    """The class comes second."""
    def f(self):
        """The method comes third."""
        def g():
            """The inner function is fourth."""
try:
    import x
except ImportError:
    def h():
        """The fallback comes fifth."""
async def last():
    """The coroutine comes last."""
    "a string that is no docstring"
'''
    ends = [sentence.split()[-1] for sentence in module_sentences(source)]
    assert ends == ["first.", "second.", "third.", "fourth.", "fifth.", "last."]


def test_module_that_does_not_parse_has_no_sentences() -> None:
    assert module_sentences(b'print "Python 2 is over now"') == []
    assert module_sentences(b"\x00\x01") == []


def test_packages_have_lanes_that_exist() -> None:
    assert {package.lane for package in PACKAGES} <= set(TMD_LANES)
    assert len({package.name for package in PACKAGES}) == len(PACKAGES)


def test_python_docs_are_whole_modules_in_a_fixed_order() -> None:
    rows = read_corpus("python-docs", SourceOptions(max_rows=1500)).rows
    assert list(rows.columns) == ["sequence", "document", "lane", "text"]
    assert 1425 <= len(rows) <= 1500 and rows["lane"].nunique() > 3
    again = read_corpus("python-docs", SourceOptions(max_rows=1500)).rows
    pd.testing.assert_frame_equal(again, rows)
    other = read_corpus("python-docs", SourceOptions(max_rows=1500, seed=1)).rows
    assert set(other["document"]) != set(rows["document"])
    order = [package.name for package in PACKAGES]
    packages = rows["sequence"].drop_duplicates().tolist()
    assert packages == sorted(packages, key=order.index)
    documents = rows["document"].drop_duplicates().tolist()
    assert documents == sorted(
        documents, key=lambda name: (order.index(name.split(".")[0]), name.split("."))
    )
    assert not any(".tests" in name or ".testing" in name for name in documents)
    assert rows["text"].str.split().str.len().between(3, 60).all()
    junk = rows["text"].str.contains(r">>>|^\W*\w+\s*:\s*(?:int|str|bool|float)\W*$|---")
    assert not junk.any()


def test_missing_package_is_skipped_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = python_docs.Package("surely_not_installed", "surely-not-installed", "Art")
    monkeypatch.setattr(python_docs, "PACKAGES", (absent, *PACKAGES))
    options = SourceOptions(max_rows=200)
    report = ingest("python-docs", "wordllama", tmp_path / "bank", options)
    assert report.notes == ("surely_not_installed: not installed, skipped",)
    assert 0 < report.rows <= 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "part").mkdir(parents=True)
    (folder / "a.md").write_text(
        "Words before any heading.\n\n# One\nFirst text of section one. Second text of it.\n\n"
        "```\n# no heading in code\n```\n\nTwo\n---\nText of section two.\n\n"
        "# One\nOnce more one.\n"
    )
    (folder / "b.rst").write_text(
        "=====\nTitle\n=====\n\nA sentence with ``code`` here.\n\n"
        "Part\n----\n\nThe last sentence.\n"
    )
    (folder / "part" / "c.txt").write_text("A plain text file. It has two sentences.\n")
    (folder / "part" / "ignored.pdf").write_bytes(b"%PDF")
    lines = [
        {"text": "One row as it is. Not split.", "sequence": "s", "document": "d", "lane": "Law"},
        {"text": "Another row of d.", "sequence": "s", "document": "d", "lane": "Law"},
        {"text": "A row with a text alone."},
    ]
    (folder / "z.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_folder_of_files(folder: Path) -> None:
    corpus = read_corpus(str(folder))
    names = corpus.rows.groupby(["sequence", "document", "lane"], sort=False)["text"].apply(list)
    found = [(*name, texts) for name, texts in names.items()]
    assert corpus.notes == ("left out, as ingest does not read them: 1 .pdf",)
    assert found == [
        ("a.md", "(top)", "", ["Words before any heading."]),
        ("a.md", "One", "", ["First text of section one.", "Second text of it."]),
        ("a.md", "Two", "", ["Text of section two."]),
        ("a.md", "One (2)", "", ["Once more one."]),
        ("b.rst", "Title", "", ["A sentence with code here."]),
        ("b.rst", "Part", "", ["The last sentence."]),
        ("part/c.txt", "block-000000", "", ["A plain text file.", "It has two sentences."]),
        ("s", "d", "Law", ["One row as it is. Not split.", "Another row of d."]),
        ("z.jsonl", "block-000000", "", ["A row with a text alone."]),
    ]


def test_text_without_headings_is_cut_in_blocks(tmp_path: Path) -> None:
    text = "This is a sentence. " * 250
    (tmp_path / "long.md").write_text(text)
    rows = read_corpus(str(tmp_path / "long.md")).rows
    assert list(rows.columns) == ["sequence", "document", "text"]
    assert rows.groupby("document").size().tolist() == [100, 100, 50]


def test_horizontal_rules_and_tables_are_no_headings() -> None:
    text = "Some long text line\n\n---\n\nmore text\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert [title for title, _ in read_sections(".md", text)] == [""]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}', 'a.jsonl line 2: .*string "text"'),
        ("a.jsonl", b"not json", "a.jsonl line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "fine", "lane": 3}', '"lane" must be a string'),
        ("a.txt", b"\xff\xfe broken", "not UTF-8"),
        ("a.txt", b"Too short.", "no sentence of three words"),
        ("a.pdf", b"%PDF", "holds no .md"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, contents: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message) as caught:
        read_corpus(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder or file; use python-docs"):
        ingest(str(tmp_path / "nowhere"), "wordllama", tmp_path / "bank")


def test_ingest_makes_a_bank_and_reuses_it(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    first = ingest(str(folder), "wordllama", path)
    bank = open_bank(path, verify=True)
    assert (first.rows, first.dim, first.sha256) == (bank.num_rows, 256, bank.sha256)
    assert not first.reused and first.rows == 12 and first.dropped == {}
    assert bank.encoder == "wordllama" and first.lanes == {"Law": 2, "": 10}
    assert first.sequences == {"a.md": 5, "b.rst": 2, "part/c.txt": 2, "s": 2, "z.jsonl": 1}
    again = ingest(str(folder), "wordllama", path)
    assert again.reused and again.sha256 == first.sha256
    made_anew = ingest(str(folder), "wordllama", path, overwrite=True)
    assert not made_anew.reused and made_anew.sha256 == first.sha256


def test_ingest_refuses_a_bank_made_otherwise(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    first = ingest(str(folder), "wordllama", path)
    with pytest.raises(ValueError, match="max_rows=3.*another bank path, or delete"):
        ingest(str(folder), "wordllama", path, SourceOptions(max_rows=3))
    (folder / "b.rst").unlink()
    with pytest.raises(ValueError, match="not sha256="):
        ingest(str(folder), "wordllama", path)
    assert open_bank(path).sha256 == first.sha256
    assert ingest(str(folder), "wordllama", path, overwrite=True).rows == first.rows - 2


def test_rows_without_a_vector_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = ["A row that stays.", "", "Another row that stays."]
    text = "\n".join(json.dumps({"text": line}) for line in lines)
    (tmp_path / "a.jsonl").write_text(text)
    report = ingest(str(tmp_path / "a.jsonl"), "wordllama", tmp_path / "bank")
    assert (report.rows_read, report.rows, sum(report.dropped.values())) == (3, 2, 1)
    texts = open_bank(tmp_path / "bank").texts()
    assert texts is not None and texts.tolist() == [lines[0], lines[2]]


def test_bank_is_copied_through_the_checks(tiny_bank: Bank, tmp_path: Path) -> None:
    report = ingest(str(tiny_bank.path), None, tmp_path / "copy")
    copy = open_bank(tmp_path / "copy", verify=True)
    assert (report.rows, report.encoder) == (1440, "synthetic")
    np.testing.assert_array_equal(copy.vectors, tiny_bank.vectors)
    np.testing.assert_array_equal(copy.document_N, tiny_bank.document_N)
    assert (copy.lanes, copy.documents) == (tiny_bank.lanes, tiny_bank.documents)
    np.testing.assert_array_equal(copy.texts(), tiny_bank.texts())
    short = ingest(str(tiny_bank.path), None, tmp_path / "short", SourceOptions(max_rows=50))
    assert short.rows == 40  # two documents of twenty rows


def test_a_copy_keeps_the_splits(tmp_path: Path) -> None:
    rows = pd.DataFrame({"sequence": ["a", "b"], "split": ["train", None]})
    write_bank(tmp_path / "bank", np.eye(2, 4), rows, "none", "test")
    ingest(str(tmp_path / "bank"), None, tmp_path / "copy")
    copied = pd.read_parquet(tmp_path / "copy" / "rows.parquet")["split"]
    assert copied[0] == "train" and pd.isna(copied[1])


def test_a_whole_copy_extends_what_its_source_extends(tmp_path: Path) -> None:
    vectors = np.eye(4, 3) + 1
    rows = pd.DataFrame({"sequence": list("aabb")})
    bases = ("cafe", "beef")
    write_bank(tmp_path / "bank", vectors, rows, "wordllama", "test", bases=bases)
    for name, max_rows, kept in (("copy", None, bases), ("all", 4, bases), ("cut", 3, ())):
        ingest(str(tmp_path / "bank"), None, tmp_path / name, SourceOptions(max_rows=max_rows))
        assert open_bank(tmp_path / name).bases == kept


def test_damaged_bank_is_not_copied(tiny_bank: Bank, tmp_path: Path) -> None:
    shutil.copytree(tiny_bank.path, tmp_path / "source")
    rows = pd.read_parquet(tmp_path / "source" / "rows.parquet")
    rows.assign(text="other").to_parquet(tmp_path / "source" / "rows.parquet")
    with pytest.raises(ValueError, match="sha256 differs"):
        ingest(str(tmp_path / "source"), None, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_npz_becomes_a_bank_folder(tmp_path: Path) -> None:
    vector_ND = np.eye(6, 4, dtype=np.float32) + 0.1
    np.savez(tmp_path / "old.npz", vectors=vector_ND, chain_ids=np.array([1, 1, 1, 2, 2, 2]))
    report = ingest(str(tmp_path / "old.npz"), None, tmp_path / "bank")
    bank = open_bank(tmp_path / "bank")
    assert bank.vectors.dtype == np.float32 and bank.sequences == ("1", "2")
    assert report.encoder == "unknown" and report.lanes == {}
    for name in ("some/encoder", "wordllama"):
        named = ingest(str(tmp_path / "old.npz"), name, tmp_path / name)
        assert named.encoder == name
        with pytest.raises(ValueError, match="not vectors_of=unknown"):
            ingest(str(tmp_path / "old.npz"), None, tmp_path / name)


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Two files that a user wrote."""
    folder = tmp_path / "loose"
    folder.mkdir()
    np.save(folder / "vectors.npy", np.eye(6, 4, dtype=np.float32) + 0.1)
    columns = {"sequence": list("aaabbb"), "lane": ["Law"] * 6, "text": list("uvwxyz")}
    pd.DataFrame(columns).to_parquet(folder / "rows.parquet")
    return folder


def test_vectors_with_their_row_table_become_a_bank(loose: Path, tmp_path: Path) -> None:
    report = ingest(str(loose), None, tmp_path / "bank")
    bank = open_bank(tmp_path / "bank", verify=True)
    assert (report.rows, report.encoder, report.lanes) == (6, "unknown", {"Law": 6})
    assert report.sequences == {"a": 3, "b": 3}
    texts = bank.texts()
    assert texts is not None and texts.tolist() == list("uvwxyz")
    assert ingest(str(loose), None, tmp_path / "bank").reused
    np.save(loose / "vectors.npy", np.eye(6, 4, dtype=np.float32) + 0.2)
    with pytest.raises(ValueError, match="holds something else"):
        ingest(str(loose), None, tmp_path / "bank")


@pytest.mark.parametrize(
    ("vectors", "rows", "message"),
    [
        (np.array([{}] * 6), {}, "not a whole .npy array of numbers"),
        (np.zeros((6, 4), np.float32), {}, "6 zero rows"),
        (np.ones((5, 4), np.float32), {}, "6 rows for 5 vectors"),
        (np.ones((6, 4), np.float32), {"sequence": list("abaaaa")}, "'a' ends at row 0"),
    ],
)
def test_broken_vectors_or_row_tables_are_refused(
    loose: Path, tmp_path: Path, vectors: np.ndarray, rows: dict[str, list[str]], message: str
) -> None:
    np.save(loose / "vectors.npy", vectors, allow_pickle=True)
    pd.read_parquet(loose / "rows.parquet").assign(**rows).to_parquet(loose / "rows.parquet")
    with pytest.raises(ValueError, match=message) as caught:
        ingest(str(loose), None, tmp_path / "bank")
    assert "\n" not in str(caught.value) and not (tmp_path / "bank").exists()


def test_the_embedded_corpus_is_cut_unless_all_rows_are_asked_for() -> None:
    assert row_limit(None, "python-docs") == EMBEDDED_ROWS
    assert row_limit("all", "python-docs") is None and row_limit(None, "folder") is None
    assert row_limit("700", "python-docs") == 700
    for word in ("0", "-3", "1.5", "many", "٣"):
        with pytest.raises(ValueError, match="max_rows: .* is no number from 1 on"):
            row_limit(word, "folder")


def test_max_rows_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_rows 0"):
        ingest("python-docs", "wordllama", tmp_path / "bank", SourceOptions(max_rows=0))
