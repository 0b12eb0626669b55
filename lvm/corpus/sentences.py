"""Plain text cut into sentences that are worth a vector each."""

import re

import sentencex

MIN_WORDS = 3
MAX_WORDS = 60
MIN_LETTERS = 0.7  # share of letters among the characters that are not spaces
LANGUAGE = "en"
_INNER_DOT = re.compile(r"(?<=\w)\.(?=\w)(?!\w\.)")  # numpy.ndarray ends no sentence; not e.g.
_DOT = "\ue000"

_CODE = re.compile(
    r"""
    ^(?:import|from\s+\S+\s+import|def|async\s+def|class\s+\w+[(:]|@\w+|with\s.*:$|return\s\w+\()\b
    | ^(?:SELECT|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|(?:CREATE|ALTER|DROP)\s+TABLE)\b
    | ^for\s\w+(?:,\s*\w+)*\sin\s.*:
    | ^\w[\w.\[\]'"]*(?:,\s*\w+)*\s*=\s*\S   # an assignment
    | ^[\w.]+\(.*\)\W*$                       # one call
    | ^[$%#>]\s                               # a prompt
    | \)\s*->\s | ;\s*$ | %\(\w+\)[sd] | \{\{ | \\n
    """,
    re.VERBOSE,
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of `text` in order; blank lines end a sentence too.

    Sentences of fewer than 3 words are dropped, as is what reads as code or as a table; one of
    more than 60 words is cut into equal pieces.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = _INNER_DOT.sub(_DOT, " ".join(paragraph.split()))
        for segment in sentencex.segment(LANGUAGE, line):
            sentence = segment.replace(_DOT, ".").strip()
            if reads_as_sentence(sentence):
                sentences += _pieces(sentence.split())
    return sentences


def reads_as_sentence(sentence: str) -> bool:
    """Whether `sentence` has enough words, mostly letters, few identifiers, no mark of code."""
    words = [word for word in sentence.split() if any(map(str.isalpha, word))]
    if len(words) < MIN_WORDS or _CODE.search(sentence):
        return False
    num_identifiers = sum("_" in word.strip("_") for word in words)
    characters = sentence.replace(" ", "")
    num_letters = sum(map(str.isalpha, characters))
    return num_letters >= MIN_LETTERS * len(characters) and 2 * num_identifiers <= len(words)


def _pieces(words: list[str]) -> list[str]:
    """Join `words` to pieces of at most MAX_WORDS, as equal in length as can be."""
    num_pieces = -(-len(words) // MAX_WORDS)
    borders = [round(piece * len(words) / num_pieces) for piece in range(num_pieces + 1)]
    return [" ".join(words[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
