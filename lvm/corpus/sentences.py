"""Plain text of any script, split into sentences that are worth a vector each.

sentencex splits by the rules of a language. Unless the language is given, it follows from the
script of a paragraph. Scripts without spaces are measured in characters: a Han character counts as
a word (as in Unicode's UAX 29), as do three letters of kana, Thai, Lao, Khmer, Burmese or Tibetan.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import regex
import sentencex

AUTO = "auto"
MIN_WORDS = 3
MIN_DENSE_WORDS = 2  # in scripts whose words carry the small words of others as affixes
MAX_WORDS = 60
MIN_LETTERS = 0.7  # share of letters among the characters that are not spaces
LETTERS_A_WORD = 3  # in scripts without spaces, Han apart
BLOCK = (
    2000  # longer paragraphs are cut: the time of sentencex grows with the square of their length
)
SHORT, SIGNS, CODE = "fewer than 3 words", "mostly digits or signs", "reads as code"
LANGUAGES = {  # by script; a script that is not here is read by the rules of English
    "Han": "zh",
    "Hiragana": "ja",
    "Katakana": "ja",
    "Hangul": "ko",
    "Cyrillic": "ru",
    "Greek": "el",
    "Arabic": "ar",
    "Hebrew": "he",
    "Devanagari": "hi",
    "Bengali": "bn",
    "Gujarati": "gu",
    "Gurmukhi": "pa",
    "Tamil": "ta",
    "Telugu": "te",
    "Kannada": "kn",
    "Malayalam": "ml",
    "Thai": "th",
    "Myanmar": "my",
    "Armenian": "hy",
    "Ethiopic": "am",
}
_SCRIPTS = regex.compile("|".join(rf"(?P<{name}>\p{{Script={name}}})" for name in LANGUAGES))
_KANA = r"\p{Script=Hiragana}\p{Script=Katakana}ー"
_UNMARKED = r"\p{Script=Thai}\p{Script=Lao}"  # scripts without a mark that ends a sentence
_SPACELESS = rf"{_UNMARKED}\p{{Script=Khmer}}\p{{Script=Myanmar}}\p{{Script=Tibetan}}"
_HAN = regex.compile(r"\p{Script=Han}")
_UNSPACED_LETTER = regex.compile(rf"(?V1)[[{_KANA}{_SPACELESS}]--\p{{M}}]")
_UNSPACED = regex.compile(rf"[\p{{Script=Han}}{_KANA}{_SPACELESS}\p{{M}}]")
_DENSE = regex.compile(
    r"[\p{Script=Hangul}\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Tamil}\p{Script=Telugu}"
    r"\p{Script=Kannada}\p{Script=Malayalam}\p{Script=Ethiopic}]"
)
_WRAPPED = regex.compile(  # a line end inside of Chinese or Japanese, which is no space
    rf"(?<=[\p{{Script=Han}}{_KANA}、-〟！-･])\s*\n\s*(?=[\p{{Script=Han}}{_KANA}、-〟！-･])"
)
# A space that ends a phrase: between letters of these scripts, not after a mark of repetition.
_PHRASE = regex.compile(rf"(?<=[{_UNMARKED}]{{3}})(?<![ๆฯໆ]) (?=[{_UNMARKED}]{{3}})")
_END = regex.compile(r"(?V1)(?<=[\p{Sentence_Terminal}།༎--[\x00-\x7f]]) ")  # sentencex lacks some
_SURE_END = regex.compile(  # of a sentence, not of an abbreviation
    r"(?<=\w{4}[.!?]) (?=[\p{Lu}\p{Lo}])|(?<=[。！？।]) ?(?=\w)"
)
_CLAUSE = regex.compile(r"[，、；：,;:。！？!?」』）)\s]+")
_INNER_DOT = re.compile(r"(?<=\w)\.(?=\w)(?!\w\.)")  # numpy.ndarray ends no sentence; not e.g.
_DOT = "\ue000"
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_CODE = re.compile(
    r"""
    ^(?:import|from\s+\S+\s+import|def|async\s+def|class\s+\w+[(:]|@\w+|with\s.*:$|return\s\w+\()\b
    | ^(?:SELECT|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|(?:CREATE|ALTER|DROP)\s+TABLE)\b
    | ^for\s\w+(?:,\s*\w+)*\sin\s.*:
    | ^\w[\w.\[\]'"]*(?:,\s*\w+)*\s*=\s*\S   # an assignment
    | ^[\w.]+\(.*\)\W*$                       # one call
    | ^[$%#>]\s                               # a prompt
    | \)\s*->\s | (?<![\u0370-\u03ff\u1f00-\u1fff]);\s*$ | %\(\w+\)[sd] | \{\{ | \\n
    """,  # in Greek a semicolon is a question mark
    re.VERBOSE | re.ASCII,
)


@dataclass
class Tally:
    """Counts of the sentences of one file: those kept, and those dropped by reason.

    `characters` counts the whole text, `kept_characters` the kept sentences, both without spaces.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    kept_characters: int = 0

    def split(self, text: str, language: str = AUTO) -> list[str]:
        """Return the sentences of a text (see `split_sentences`), and count them."""
        found = split_sentences(text, language, self.dropped)
        self.kept += len(found)
        self.characters += _size(text)
        self.kept_characters += sum(map(_size, found))
        return found


def _size(text: str) -> int:
    return sum(map(len, text.split()))


def check_language(language: str) -> None:
    """Raise ValueError unless `language` is "auto" or a code such as "de"."""
    if language != AUTO and not _LANGUAGE.fullmatch(language):
        raise ValueError(f"language {language!r}: must be auto or a code such as de, pt or zh")


def split_sentences(
    text: str, language: str = AUTO, dropped: Counter[str] | None = None
) -> list[str]:
    """Return the sentences of `text` in order; blank lines end a sentence too.

    Sentences of fewer than 3 words, code, and lines of digits or signs are dropped; `dropped`
    counts them by reason. A sentence of more than 60 words is cut into pieces. `language` is "auto"
    (by the script of each paragraph) or a code such as "de".
    """
    sentences = []
    for sentence in _segments(text, language):
        reason = drop_reason(sentence)
        if not reason:
            sentences += _pieces(sentence)
        elif dropped is not None:
            dropped[reason] += 1
    return sentences


def drop_reason(sentence: str) -> str:
    """Return why a sentence is not worth a vector; "" if it is."""
    is_ascii = sentence.isascii()
    words = [word for word in sentence.split() if any(map(str.isalpha, word))]
    least = MIN_WORDS if is_ascii or not _DENSE.search(sentence) else MIN_DENSE_WORDS
    if (len(words) if is_ascii else num_words(sentence)) < least:
        return SHORT
    num_identifiers = sum("_" in word.strip("_") for word in words)
    if _CODE.search(sentence) or 2 * num_identifiers > len(words):
        return CODE
    characters = sentence.replace(" ", "")
    if not is_ascii:  # accents and vowel signs are parts of letters; joiners are not seen
        shown = [one for one in characters if unicodedata.category(one) != "Cf"]
        num_letters = sum(one.isalpha() or unicodedata.category(one)[0] == "M" for one in shown)
        extra = (LETTERS_A_WORD - 1) * len(_HAN.findall(characters))
        return "" if num_letters + extra >= MIN_LETTERS * (len(shown) + extra) else SIGNS
    num_letters = sum(map(str.isalpha, characters))
    return "" if num_letters >= MIN_LETTERS * len(characters) else SIGNS


def num_words(text: str) -> float:
    """Count words: those between spaces, and characters of scripts without spaces."""
    num_unspaced = len(_HAN.findall(text)) + len(_UNSPACED_LETTER.findall(text)) / LETTERS_A_WORD
    rest = _UNSPACED.sub(" ", text) if num_unspaced else text
    return num_unspaced + sum(any(map(str.isalpha, word)) for word in rest.split())


def script_language(text: str) -> str:
    """Return the language whose rules fit the script of most letters of `text`."""
    if text.isascii():
        return "en"
    count = Counter(found.lastgroup for found in _SCRIPTS.finditer(text))
    if not count or 2 * count.total() < sum(map(str.isalpha, text)):
        return "en"
    found = {LANGUAGES[str(name)] for name in count}
    return "ja" if "ja" in found else LANGUAGES[str(count.most_common(1)[0][0])]


def _segments(text: str, language: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        spaced = paragraph if paragraph.isascii() else _WRAPPED.sub("", paragraph)
        line = _INNER_DOT.sub(_DOT, " ".join(spaced.split()))
        known = script_language(line) if language == AUTO else language
        segments = (one for block in _blocks(line) for one in sentencex.segment(known, block))
        for segment in segments:
            sentence = segment.replace(_DOT, ".").strip()
            if sentence.isascii():
                if sentence:
                    yield sentence
                continue
            for ended in _END.split(sentence):
                yield from _phrases(ended.strip())


def _blocks(line: str) -> Iterator[str]:
    """Cut a long paragraph at a certain end of a sentence, or else at a space."""
    start = 0
    while len(line) - start > BLOCK:
        least, most = start + BLOCK, start + 2 * BLOCK
        found = _SURE_END.search(line, least, most)
        end = found.end() if found else line.rfind(" ", least, most) + 1 or most
        yield line[start:end]
        start = end
    yield line[start:]


def _phrases(sentence: str) -> Iterator[str]:
    """Cut Thai and similar scripts at spaces, which end phrases there; join short pieces."""
    phrases: list[str] = []
    begun = ""
    for part in _PHRASE.split(sentence):
        begun = f"{begun} {part}".strip()
        if num_words(begun) >= MIN_WORDS:
            phrases.append(begun)
            begun = ""
    if begun and phrases:
        phrases[-1] += f" {begun}"
    yield from phrases or [begun]


def _pieces(sentence: str) -> list[str]:
    """Cut a sentence into pieces of at most MAX_WORDS words and about equal length."""
    words = sentence.split()
    if sentence.isascii() or not (_HAN.search(sentence) or _UNSPACED_LETTER.search(sentence)):
        num_pieces = -(-len(words) // MAX_WORDS)
        borders = [round(piece * len(words) / num_pieces) for piece in range(num_pieces + 1)]
        return [" ".join(words[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    if num_words(sentence) <= MAX_WORDS:
        return [sentence]
    middle = len(sentence) // 2
    clauses = [found.end() for found in _CLAUSE.finditer(sentence)]
    inside = [end for end in clauses if abs(end - middle) < len(sentence) / 4]
    graphemes = [found.start() for found in regex.finditer(r"\X", sentence)][1:]
    border = min(inside or graphemes, key=lambda end: abs(end - middle))
    return [
        piece
        for half in (sentence[:border].strip(), sentence[border:].strip())
        for piece in _pieces(half)
    ]
