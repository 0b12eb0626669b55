"""Markdown, reStructuredText and HTML, parsed into sections of plain paragraphs.

Omitted as no prose: code, display formulas, images, comments, front matter, scripts, navigation.
Headings name sections; cells of tables are paragraphs. The suffix of a file tells its format.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import docutils
import docutils.core
from docutils import nodes
from docutils.parsers.rst import Parser, roles, states
from lxml import etree
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.footnote import footnote_plugin
from mdit_py_plugins.front_matter import front_matter_plugin

# What parsers raise on odd input, beyond the errors that they declare.
PARSER_ERRORS = (
    docutils.ApplicationError,
    etree.LxmlError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Directives of reStructuredText, docutils' and Sphinx's, that hold no prose.
NO_PROSE = frozenset(
    "autoattribute autoclass autodata autoexception autofunction automethod automodule "
    "autosummary bibliography c:namespace code code-block contents csv-table currentmodule "
    "default-role doctest figure-md graphviz highlight image include index inheritance-diagram "
    "ipython jupyter-execute literalinclude math meta mermaid module parsed-literal plot plantuml "
    "productionlist program program-output prompt py:currentmodule py:module raw role "
    "sectnum sourcecode tabularcolumns testcleanup testcode testoutput testsetup toctree uml "
    "unicode".split()
)
RST_SETTINGS = {
    "_disable_config": True,
    "docinfo_xform": False,
    "doctitle_xform": False,
    "file_insertion_enabled": False,
    "halt_level": 5,
    "input_encoding": "unicode",
    "line_length_limit": 10**9,  # docutils refuses longer lines, but here a line may be a paragraph
    "raw_enabled": False,
    "report_level": 1,  # keeps unknown directives in the tree, see `_unknown_directive`
    "syntax_highlight": "none",
    "traceback": True,  # otherwise docutils ends the process
    "warning_stream": False,
}
MAX_NESTING = 100  # of Markdown's quotes and lists
MAX_BRACKETS = 10  # nested in a paragraph of Markdown; those further inside are text
MAX_OPEN_BRACKETS = 100  # of a paragraph: the parser's time grows by their square
MAX_RST_PARAGRAPH = 10_000  # characters, longer ones are read as plain text for the same reason
INLINE_HTML = frozenset(
    "a abbr acronym b bdi bdo big br cite code data del dfn em font i ins kbd label mark q rb rp "
    "rt ruby s samp small span strike strong sub sup time tt u var wbr".split()
)
SKIPPED_HTML = frozenset(
    "audio button canvas head iframe math nav noscript object pre rp rt script select style svg "
    "template textarea title video".split()
)
SKIPPED_ROLES = frozenset(("navigation", "search"))
NO_TEXT = (
    *(nodes.comment, nodes.FixedTextElement, nodes.image, nodes.label, nodes.option_group),
    *(nodes.pending, nodes.raw, nodes.substitution_definition, nodes.system_message),
)
TYPE_FIELDS = frozenset("cvartype meta rtype type vartype".split())
_HEADING = re.compile("h[1-6]")
_BRACKET = re.compile(r"\\.|[\[\]]", re.DOTALL)
_DIRECTIVE = re.compile(r"\.\.[ \t]+([\w:.+-]+?)::(.*)")
_OPTION = re.compile(r":[\w-]+:")
# A reference whose target is on another page, which docutils leaves as it is written.
_REFERENCE = re.compile(r"`([^`]+?)(?:\s*<[^<>]*>)?`__?|(\w[\w.-]*?)__?")
_VERSION = re.compile(r"\s*v?[0-9][\w.]*:?(?=\s|$)")


class Section(NamedTuple):
    """The paragraphs below one heading, up to the next heading; `title` may be ""."""

    title: str
    paragraphs: list[str]


class _Sections:
    """Collects sections in reading order."""

    def __init__(self) -> None:
        self.found = [Section("", [])]

    def begin(self, title: str) -> None:
        """Begin a section."""
        self.found.append(Section(" ".join(title.split()), []))

    def add(self, text: str) -> None:
        """Add a paragraph to the section."""
        line = " ".join(text.split())
        if line:
            self.found[-1].paragraphs.append(line)

    def whole(self) -> list[Section]:
        """Return the sections; an untitled first one only if it has paragraphs."""
        return [one for one in self.found if one.title or one.paragraphs]


def read_sections(kind: str, text: str) -> list[Section]:
    """Return the sections of a text whose file has the suffix `kind`.

    Raises ValueError if the parser cannot read the text.
    """
    sections = _Sections()
    try:
        READERS[kind](text, sections)
    except PARSER_ERRORS as error:
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise ValueError(f"cannot be read as {kind} ({reason}); save it as .txt") from error
    return sections.whole()


def _read_markdown(text: str, sections: _Sections) -> None:
    parser = MarkdownIt("commonmark", {"maxNesting": MAX_NESTING})
    parser.enable(["table", "strikethrough"]).use(front_matter_plugin).use(footnote_plugin)
    parser.use(dollarmath_plugin, allow_space=False, allow_digits=False).use(colon_fence_plugin)
    parser.core.ruler.disable("footnote_tail")  # it drops footnotes that nothing refers to
    parser.core.ruler.before("inline", "open_brackets", _escape_open_brackets)
    _read_tokens(parser, text, sections)


def _escape_open_brackets(state: StateCore) -> None:
    """Escape brackets that do not begin a link, in paragraphs with very many of them."""
    for token in state.tokens:
        if token.type != "inline" or token.content.count("[") <= MAX_OPEN_BRACKETS:
            continue
        open_places: list[int] = []
        end_of: dict[int, int] = {}
        for found in _BRACKET.finditer(token.content):
            if found[0] == "[":
                open_places.append(found.start())
            elif found[0] == "]" and open_places:
                end_of[open_places.pop()] = found.start()
        ends: list[int] = []  # of the pairs around a place
        for place in sorted(end_of):
            ends = [end for end in ends if end > place]
            if len(ends) < MAX_BRACKETS:
                ends.append(end_of[place])
            else:
                open_places.append(place)
        if len(open_places) > MAX_OPEN_BRACKETS:
            escaped = set(open_places)
            text = enumerate(token.content)
            token.content = "".join(f"\\{one}" if n in escaped else one for n, one in text)


def _read_tokens(parser: MarkdownIt, text: str, sections: _Sections) -> None:
    in_heading = False
    env: dict[str, Any] = {}
    for token in parser.parse(text, env):
        if token.type in ("heading_open", "heading_close"):
            in_heading = token.type == "heading_open"
        elif token.type == "inline":
            line = "".join(_inline_text(token.children or []))
            if in_heading:
                sections.begin(line)
            else:
                sections.add(line)
            for child in token.children or []:
                if child.type == "footnote_ref":  # an inline one has its text there
                    note = env["footnotes"]["list"][child.meta["id"]]
                    sections.add("".join(_inline_text(note.get("tokens", []))))
        elif token.type == "html_block":
            _read_html(token.content, sections)
        elif token.type == "colon_fence" or (
            token.type == "fence" and _is_prose_directive(token.info)
        ):
            _read_tokens(parser, token.content, sections)


def _is_prose_directive(info: str) -> bool:
    """Return whether the words after a fence name a MyST directive of prose, as in {note}."""
    found = re.match(r"\{([\w:.+-]+)\}", info.strip())
    return found is not None and found[1] not in NO_PROSE


def _inline_text(tokens: Iterable[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type in (
            "text",
            "code_inline",
            "math_inline",
            "math_inline_double",
            "text_special",
        ):
            yield token.content
        elif token.type in ("softbreak", "hardbreak"):
            yield "\n"
        elif token.type == "html_inline" and re.match(r"<br\b", token.content, re.IGNORECASE):
            yield "\n"


def _inliner() -> states.Inliner:
    """Return docutils' parser of inline markup that replaces Sphinx's roles by their titles."""
    inliner = states.Inliner()
    known, parse = inliner.interpreted, inliner.parse

    def bounded(text: str, *where: Any) -> tuple[list[nodes.Node], list[nodes.Node]]:
        if len(text) > MAX_RST_PARAGRAPH:
            return [nodes.Text(nodes.unescape(text))], []
        return parse(text, *where)

    def interpreted(
        rawsource: str, text: str, role: str, lineno: int
    ) -> tuple[list[nodes.Node], list[nodes.Node]]:
        if roles.role(role, inliner.language, lineno, inliner.reporter)[0]:
            return known(rawsource, text, role, lineno)
        title = re.sub(r"\s*<[^<>]*>$", "", nodes.unescape(text)).lstrip("!")
        if title.startswith("~"):
            title = title.rpartition(".")[2].lstrip("~")
        return [nodes.inline(rawsource, title)], []

    inliner.parse = bounded
    inliner.interpreted = interpreted  # a subclass lacks what docutils looks up in its class
    return inliner


def _short_lines(line: str) -> list[str]:
    """Break lines that are longer than a paragraph may be."""
    if len(line) <= MAX_RST_PARAGRAPH:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(line, MAX_RST_PARAGRAPH, subsequent_indent=indent, break_on_hyphens=False)


def _read_rst(text: str, sections: _Sections) -> None:
    lines = (short for line in text.split("\n") for short in _short_lines(line))
    tree = docutils.core.publish_doctree(
        "\n".join(lines), parser=Parser(inliner=_inliner()), settings_overrides=RST_SETTINGS
    )
    _read_nodes(tree, sections)


def _read_nodes(node: nodes.Node, sections: _Sections) -> None:
    for child in node.children:
        if isinstance(child, nodes.title) and isinstance(node, nodes.section):
            sections.begin(_node_text(child))
        elif isinstance(child, nodes.system_message):
            _unknown_directive(child, sections)
        elif isinstance(child, NO_TEXT):
            continue
        elif isinstance(child, nodes.field):
            _read_field(child, sections)
        elif isinstance(child, nodes.line_block):
            sections.add("\n".join(_node_text(line) for line in child.findall(nodes.line)))
        elif isinstance(child, nodes.TextElement):
            sections.add(_node_text(child))
        else:
            _read_nodes(child, sections)


def _read_field(field: nodes.field, sections: _Sections) -> None:
    """Read `:param int size: Its size.` as "size: Its size."; types are omitted."""
    words = field.children[0].astext().split()
    if words and words[0] in TYPE_FIELDS:
        return
    first = len(sections.found[-1].paragraphs)
    _read_nodes(field.children[1], sections)
    texts = sections.found[-1].paragraphs
    if len(words) > 1 and len(texts) > first:
        texts[first] = f"{words[-1]}: {texts[first]}"


def _node_text(node: nodes.Node) -> str:
    if isinstance(node, nodes.Text):
        return node.astext()
    if isinstance(node, nodes.problematic):
        found = _REFERENCE.fullmatch(node.astext())
        return found[1] or found[2] if found else node.astext()
    text = ""
    for child in node.children:
        if isinstance(child, nodes.footnote_reference | nodes.citation_reference):
            text = text.removesuffix(" ")
        elif not isinstance(child, NO_TEXT):
            text += _node_text(child)
    return text


def _unknown_directive(message: nodes.system_message, sections: _Sections) -> None:
    """Return the text of an unknown directive from the error that docutils made of it."""
    for block in message.findall(nodes.literal_block):
        first, _, rest = block.astext().partition("\n")
        found = _DIRECTIVE.match(first)
        if not found or found[1] in NO_PROSE:
            continue
        lines = rest.split("\n")
        while lines and _OPTION.match(lines[0].strip()):
            del lines[0]
        indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
        body = "\n".join(line[min(indents, default=0) :] for line in lines)
        begin = found[2]
        if found[1].startswith(("version", "deprecated")):
            begin = _VERSION.sub("", begin, count=1)
        _read_rst(f"{begin.strip()}\n{body}", sections)


def _read_html(text: str, sections: _Sections) -> None:
    if not text.strip():
        return
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_pis=True, no_network=True)
    root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    if any(one.type_name == "ERR_RESOURCE_LIMIT" for one in parser.error_log):
        raise ValueError("HTML is nested too deeply")
    if root is None:
        return
    words: list[str] = []
    heading: Any = None

    def flush() -> None:
        sections.add("".join(words))
        words.clear()

    walk = etree.iterwalk(root, events=("start", "end", "comment"))
    for event, element in walk:
        name = element.tag
        is_skipped = event == "start" and _is_skipped(element)
        if is_skipped:
            walk.skip_subtree()
        if event == "start" and not is_skipped:
            if name not in INLINE_HTML and heading is None:
                flush()
            if heading is None and _HEADING.fullmatch(name):
                heading = element
            if name == "br":
                if words and words[-1] == "\n":  # two of them end a paragraph
                    flush()
                words.append("\n")
            if element.text:
                words.append(element.text)
        elif event == "end" and not _is_skipped(element):
            if element is heading:
                sections.begin("".join(words))
                words.clear()
                heading = None
            elif name not in INLINE_HTML and heading is None:
                flush()
        if event != "start":
            if name not in INLINE_HTML and event == "end":
                words.append("\n")
            if element.tail and (element.tail.strip() or name != "br"):
                words.append(element.tail)
    flush()


def _is_skipped(element: Any) -> bool:
    role = element.get("role", "")
    is_mark = (
        "headerlink" in element.get("class", "").split()
    )  # the link sign that Sphinx puts beside headings
    return element.tag in SKIPPED_HTML or role in SKIPPED_ROLES or is_mark


READERS: dict[str, Callable[[str, _Sections], None]] = {
    ".md": _read_markdown,
    ".rst": _read_rst,
    ".html": _read_html,
}
