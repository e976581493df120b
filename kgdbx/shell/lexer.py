"""Colours of what is being typed."""

import re
from collections.abc import Callable

from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.formatted_text.base import OneStyleAndTextTuple
from prompt_toolkit.lexers import Lexer, PygmentsLexer
from prompt_toolkit.styles import Style

__all__ = ("COLOURS", "ShellLexer", "style")

COLOURS = {
    "command": "bold ansicyan",
    "function": "ansigreen",
    "variable": "ansimagenta",
    "number": "ansiyellow",
    "string": "ansiyellow",
    "option": "ansibrightblue",
    "keyword": "bold ansiblue",
    "comment": "ansibrightblack",
    "bottom-toolbar": "noreverse bg:ansibrightblack ansiwhite",
    "toolbar.running": "bold ansigreen",
    "toolbar.stopped": "bold ansiyellow",
    "toolbar.lost": "bold ansired",
    "prompt.running": "ansigreen",
    "prompt.stopped": "ansiyellow",
    "prompt.lost": "ansired",
    "prompt.detached": "",
    "table.head": "bold underline",
    "here": "bold ansiyellow",
    "bar": "ansicyan",
    "place": "ansibrightblack",
    "fault": "ansired",
}
"""Style of each class, in prompt_toolkit's words."""

_TOKEN = re.compile(
    r"""(?P<comment>^\s*\#.*)
      | (?P<string>"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?)
      | (?P<option>(?<=\s)--?[A-Za-z][\w-]*)
      | (?P<variable>[$%@][A-Za-z_]\w*)
      | (?P<number>\b(?:0x[0-9a-fA-F]+|\d+)\b)
      | (?P<word>[A-Za-z_][\w.]*)
      | (?P<other>\s+|.)""",
    re.VERBOSE,
)
_KEYWORDS = frozenset(("if", "end", "string", "ustring", "else", "while"))


class ShellLexer(Lexer):
    """Colours commands, functions of the kernel, fields, numbers and strings; Python after
    ``>>>``, and in the bodies of probes.

    :param is_command: whether a first word is a command
    :param is_function: whether the kernel has a function
    :param python: whether lines are Python whatever they begin with
    """

    def __init__(
        self,
        is_command: Callable[[str], bool],
        is_function: Callable[[str], bool],
        python: Callable[[], bool],
    ) -> None:
        self._is_command = is_command
        self._is_function = is_function
        self._python = python
        self._python_lexer: Lexer = _python_lexer()

    def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
        """Styled pieces of each line."""
        first = document.lines[0].lstrip()
        if self._python() or first.startswith((">>>", "@")):
            return self._python_lexer.lex_document(document)
        return lambda number: self._line(document.lines[number])

    def _line(self, line: str) -> StyleAndTextTuples:
        pieces: list[OneStyleAndTextTuple] = []
        first = True
        for match in _TOKEN.finditer(line):
            kind, text = str(match.lastgroup), match[0]
            name = ""
            if kind == "word":
                name = self._word(text, first)
                first = False
            elif kind != "other":
                name, first = kind, False
            pieces.append((f"class:{name}" if name else "", text))
        return pieces

    def _word(self, word: str, first: bool) -> str:
        if first:
            return "command" if self._is_command(word) else ""
        if word in _KEYWORDS:
            return "keyword"
        return "function" if self._is_function(word) else ""


def style(colour: bool) -> Style:
    """The style of prompt, toolbar and views.

    :param colour: otherwise bold, underline and reverse are all there is
    """
    if colour:
        return Style.from_dict(COLOURS)
    plain = {name: "" for name in COLOURS}
    return Style.from_dict(plain | {"table.head": "bold", "here": "bold", "command": "bold"})


def _python_lexer() -> Lexer:
    from pygments.lexers.python import Python3Lexer

    return PygmentsLexer(Python3Lexer)
