"""Readers of ontologies (OBO files, edge lists, WordNet folders) as graphs, and of edge tables.

Graph edges point from the broader concept to the narrower ones. A node has `name`, `text` and
`lane` ("" where the source names none). In a `weighted` graph the narrower concepts of a concept
are ordered by falling weight.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lvm.bank.tables import TABLES, kind_of, name_text, read_table, read_text
from lvm.system.errors import CONTROL, one_line_errors

if TYPE_CHECKING:  # takes two seconds to load, and most commands read no ontology
    import networkx

_DEFINITION = re.compile(r'^"((?:[^"\\]|\\.)*)"')  # OBO: def: "text" [references]
# What obonet raises for damaged files.
OBO_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError)
# What nltk raises for damaged databases.
WORDNET_ERRORS = (*OBO_ERRORS, AssertionError, StopIteration)
# The files that nouns need, of those that nltk asks for.
WORDNET_FILES = ("data.noun", "index.noun")
# lexnames(5WN) of WordNet 3.x, a file that packages of the database omit; numbered from 0.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()


def ontology_kind(path: Path) -> str:
    """Return obo, edges or wordnet; raises ValueError if `path` is none of them."""
    if path.is_dir() and (path / "data.noun").is_file():
        return "wordnet"
    if path.is_file() and kind_of(path) == ".obo":
        return "obo"
    if path.is_file() and kind_of(path) in TABLES:
        return "edges"
    raise ValueError(
        f"ontology {path}: no such ontology; give an .obo file, an edge list "
        f"({', '.join(TABLES)} with parent, child) or the folder of a WordNet database"
    )


@one_line_errors
def read_ontology(path: Path) -> networkx.DiGraph:
    """Read an ontology; its `notes` name omitted terms. Raises ValueError for bad files, cycles."""
    read = {"wordnet": _read_wordnet, "obo": _read_obo, "edges": _read_edge_list}
    graph = read[ontology_kind(path)](path)
    for node, data in graph.nodes(data=True):
        for name in (node, data["name"], data["lane"]):
            if CONTROL.search(name):
                raise ValueError(f"ontology {path}: {name!r} holds control characters; rename it")
    _check_acyclic(graph, path)
    return graph


def _check_acyclic(graph: networkx.DiGraph, path: Path) -> None:
    import networkx

    try:
        cycle = networkx.find_cycle(graph)
    except networkx.NetworkXNoCycle:
        return
    steps = [edge[0] for edge in cycle]
    shown = " > ".join([*steps[:8], *(["..."] if len(steps) > 8 else []), steps[0]])
    raise ValueError(f"ontology {path}: has the cycle {shown}; remove one of its edges")


def _read_obo(path: Path) -> networkx.DiGraph:
    """Return the is_a relations of an OBO file, without terms that have no name."""
    import networkx
    import obonet

    text = read_text(path)
    try:
        terms = obonet.read_obo(io.StringIO(text))
    except OBO_ERRORS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ValueError(
            f"{path}: not a readable OBO file ({reason}); each "
            "line of a [Term] must be `tag: value`, each term must have an id"
        ) from error
    graph = networkx.DiGraph(weighted=False)
    unnamed = 0
    for node, data in terms.nodes(data=True):
        if not data.get("name"):
            unnamed += 1
            continue
        name, text = str(data["name"]), str(data["name"])
        if definition := _DEFINITION.match(data.get("def") or ""):
            text += ": " + re.sub(r"\\(.)", r"\1", definition[1])
        lane = str(data.get("namespace") or terms.graph.get("default-namespace", [""])[0])
        graph.add_node(str(node), name=name, text=text, lane=lane)
    is_a = [(a, b) for a, b, relation in terms.edges(keys=True) if relation == "is_a"]
    graph.add_edges_from((b, a) for a, b in is_a if a in graph and b in graph)
    if not graph.number_of_edges():
        raise ValueError(f"{path}: no [Term] with an is_a in it; this is not an ontology to walk")
    if unnamed:
        graph.graph["notes"] = (f"{unnamed:,} terms without a name: omitted",)
    return graph


def _read_edge_list(path: Path) -> networkx.DiGraph:
    import networkx

    edges = read_edges(path, "parent", "child")
    graph = networkx.DiGraph(weighted=edges["weight"].nunique() > 1)
    edges = edges.sort_values("weight", ascending=False, kind="stable")
    graph.add_edges_from(zip(edges["parent"], edges["child"], strict=True))
    known = read_concepts(path)
    for name in graph:
        text, lane = known.get(name, ("", ""))
        graph.nodes[name].update(name=name, text=text or name, lane=lane)
    return graph


@one_line_errors
def read_edges(path: Path, start: str, end: str) -> pd.DataFrame:
    """Return the columns `start` and `end` as names and `weight`, 1 where the file has none.

    Raises ValueError for a missing column, an empty name, no edge, and weights below 0.
    """
    edges = read_table(path)
    missing = [name for name in (start, end) if name not in edges]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; an edge list has {start}, {end} and, where "
            f"it is weighted, weight; found {', '.join(map(str, edges.columns))}"
        )
    if not len(edges):
        raise ValueError(f"{path}: holds no edge; give at least one line of {start}, {end}")
    names = {name: _names(path, edges, name) for name in (start, end)}
    for name, column in names.items():
        empty_E = (column == "").to_numpy()
        if empty_E.any():
            raise ValueError(f"{path}: {name} is empty in edge {empty_E.argmax()}; name it")
    return pd.DataFrame(names).assign(weight=_weights(path, edges))


@one_line_errors
def read_concepts(path: Path) -> dict[str, tuple[str, str]]:
    """Return the text and the lane of each concept of an edge file; empty where no file has them.

    The file stands beside the edges: edges.nodes.csv beside edges.csv.
    """
    beside = edge_files(path)[1:]
    if not beside:
        return {}
    nodes = read_table(beside[0])
    missing = [name for name in ("node", "text") if name not in nodes]
    if missing:
        raise ValueError(
            f"{beside[0]}: no column {', '.join(missing)}; it must have node, text, optionally lane"
        )
    names = _names(beside[0], nodes, "node")
    if names.duplicated().any():
        name = names[names.duplicated()].iloc[0]
        raise ValueError(f"{beside[0]}: node {name!r} appears twice; give it one line")
    texts = _names(beside[0], nodes, "text")
    lanes = _names(beside[0], nodes, "lane") if "lane" in nodes else [""] * len(nodes)
    return dict(zip(names, zip(texts, lanes, strict=True), strict=True))


def edge_files(path: Path) -> list[Path]:
    """Return the edge file and, where there is one, the file of its concepts."""
    beside = path.with_name(f"{path.stem}.nodes{path.suffix}")
    lower = path.with_name(f"{path.stem}.nodes{path.suffix.lower()}")
    return [path, *[one for one in (beside, lower) if one.is_file()][:1]]


def _names(path: Path, table: pd.DataFrame, name: str) -> pd.Series:
    """Return a column of names, numbers or texts as text, "" for a null."""
    column = table[name]
    values = column[column.notna()]
    kind = pd.api.types.infer_dtype(values, skipna=True) if len(values) else "empty"
    if kind == "floating" and ((values % 1 == 0) & (values.abs() < 2**53)).all():
        kind = "integer"  # pandas writes integers beside nulls as floats
    if kind not in ("string", "integer", "empty"):
        raise ValueError(f"{path}: {name} holds {kind} values; give names or numbers, not both")
    code_N, unique = pd.factorize(column)
    texts = np.array([*(name_text(value) for value in unique), ""], dtype=object)
    wrong = None if name == "text" else next((one for one in texts if CONTROL.search(one)), None)
    if wrong is not None:
        raise ValueError(f"{path}: {name} {wrong!r} holds control characters; rename it")
    return pd.Series(texts[code_N], name=name)


def _weights(path: Path, edges: pd.DataFrame) -> np.ndarray:
    if "weight" not in edges:
        return np.ones(len(edges))
    weight_E = pd.to_numeric(edges["weight"], errors="coerce").to_numpy(dtype=np.float64)
    wrong_E = ~np.isfinite(weight_E) | (weight_E < 0)
    if wrong_E.any():
        edge = int(wrong_E.argmax())
        raise ValueError(
            f"{path}: weight '{edges['weight'].iloc[edge]}' in edge {edge}; weights must be "
            "numbers of 0 or more"
        )
    return weight_E


def _read_wordnet(folder: Path) -> networkx.DiGraph:
    """Return the noun synsets: `name` (dog.n.01), `text` (lemmas: gloss), `lane` (noun.animal).

    Only nouns form one hierarchy: the verbs of WordNet 3.0 have a cycle. Instances (cities,
    people) are children of their classes. Raises ValueError where a file is missing or damaged.
    """
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a pointer to no synset
            graph = _hierarchy(_wordnet_reader(folder))
    except (WordNetError, UserWarning, *WORDNET_ERRORS) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ValueError(
            f"ontology {folder}: not a readable WordNet database ({reason}); it must hold "
            f"{', '.join(WORDNET_FILES)} of WordNet 3.x"
        ) from error
    if not graph.number_of_edges():
        raise ValueError(f"ontology {folder}: no noun with a hyponym in data.noun")
    return graph


def _hierarchy(reader: Any) -> networkx.DiGraph:
    import networkx

    graph = networkx.DiGraph(weighted=False)
    synsets = sorted(reader.all_synsets("n"), key=lambda synset: synset.offset())
    for synset in synsets:
        lemmas = ", ".join(synset.lemma_names()).replace("_", " ")
        text = f"{lemmas}: {synset.definition()}"
        graph.add_node(synset.name(), name=synset.name(), text=text, lane=synset.lexname())
    for synset in synsets:
        for narrower in sorted([*synset.hyponyms(), *synset.instance_hyponyms()]):
            graph.add_edge(synset.name(), narrower.name())
    return graph


def _wordnet_reader(folder: Path) -> Any:
    """Return nltk's reader of this folder; it reads only below the folders in nltk.data.path."""
    import nltk.data
    from nltk.corpus.reader import WordNetCorpusReader

    class Nouns(WordNetCorpusReader):
        """A reader that needs the files of nouns alone."""

        def open(self, file: str) -> Any:
            """Open a file of the database; files that nouns do not need are empty."""
            if file in WORDNET_FILES or (file == "lexnames" and (folder / file).is_file()):
                return super().open(file)
            if file == "lexnames":
                lines = (f"{number:02d}\t{name}\t0\n" for number, name in enumerate(LEXNAMES))
                return io.StringIO("".join(lines))
            return io.StringIO("")

        def map_wn(self, version: str = "wordnet") -> None:
            """Map to no other WordNet: the multilingual files that need it are not read."""

    place = str(folder.resolve())
    nltk.data.path.append(place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        return Nouns(place, None)
