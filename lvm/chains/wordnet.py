"""The nouns of a WordNet database folder as a graph from hypernym to hyponym."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes two seconds to load
    import networkx

# lexnames(5WN) of WordNet 3.x, a file that packages of the database leave out; numbered from 0.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()
# What nouns need of the files that the reader asks for.
NEEDED = ("data.noun", "index.noun")
# nltk checks little.
UNREADABLE = (
    OSError,
    AssertionError,
    ValueError,
    LookupError,
    StopIteration,
    TypeError,
    AttributeError,
    RuntimeError,
)


def read_wordnet(folder: Path) -> networkx.DiGraph:
    """Return the noun synsets: `name` (dog.n.01), `text` (lemmas: gloss), `lane` (noun.animal).

    Only nouns form one hierarchy: the verbs of WordNet 3.0 hold a cycle. Instances (cities, people)
    stand below what they are instances of. Raises ValueError where the folder is not whole.
    """
    from nltk.corpus.reader.wordnet import WordNetError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a pointer to no synset
            graph = _hierarchy(_reader(folder))
    except (WordNetError, UserWarning, *UNREADABLE) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise ValueError(
            f"ontology {folder}: not a readable WordNet database ({reason}); it must hold "
            f"{', '.join(NEEDED)} of WordNet 3.x"
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


def _reader(folder: Path) -> Any:
    """nltk's reader of this folder; it reads only below the folders in nltk.data.path."""
    import nltk.data
    from nltk.corpus.reader import WordNetCorpusReader

    class Nouns(WordNetCorpusReader):
        """A reader that needs the nouns alone."""

        def open(self, file: str) -> Any:
            """Open a file of the database; what nouns do not need counts as empty."""
            if file in NEEDED or (file == "lexnames" and (folder / file).is_file()):
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
