"""Take the text of a probe definition apart, piece by piece; every refusal names its column."""

import re

from kgdbx.arch.registers import PT_REGS_NAMES
from kgdbx.errors import DefinitionError

__all__ = ("RESERVED", "Scanner", "is_type_name", "literal_type", "split_words")

_SPACE = re.compile(r"[ \t]*")
_FOUND = re.compile(r"\w+|[^\w \t]", re.ASCII)
_DIGITS = re.compile(r"0[xX][0-9a-fA-F]+|0[bB][01]+|[0-9]+")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|[0-9]+)([uUlL]{0,3})(?!\w)", re.ASCII)
_SUFFIXES = frozenset(("", "u", "l", "ul", "lu", "ll", "ull", "llu"))
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_CHAR = re.compile(r"'((?:[^'\\]|\\.)+)'")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-3]?[0-7]{1,2}|.)")
_ESCAPES = dict(zip("abefnrtv\\'\"?", "\a\b\x1b\f\n\r\t\v\\'\"?", strict=True))
_REGISTER = re.compile(r"%([a-z]\w*)", re.ASCII)
_REGISTERS = {long: short for short, long in PT_REGS_NAMES.items()}
_REGISTERS |= {
    name: name for name in (*PT_REGS_NAMES, "cs", "ss", *(f"r{n}" for n in range(8, 16)))
}

_TYPE = re.compile(
    r"\([ \t]*([A-Za-z_]\w*(?:[ \t]+[A-Za-z_]\w*)*)[ \t]*((?:\*[ \t]*)*)\)[ \t]*", re.ASCII
)
_QUALIFIERS = frozenset(("const", "volatile"))
_BASIC = frozenset(("_Bool", "bool", "char", "int", "long", "short", "signed", "unsigned", "void"))
_TAGS = frozenset(("enum", "struct", "union"))
_TYPEDEF = re.compile(r"(__)?[us](8|16|32|64)|\w+_t", re.ASCII)
# What must follow (NAME) for it to be a cast: where NAME may be a variable, and where it is a type.
_AFTER_NAME = re.compile(r"[\w$@\\(]|!(?!=)", re.ASCII)
_AFTER_TYPE = re.compile(r"""[\w$@\\('"]|!(?!=)|[-+*]|&(?!&)|~(?![ \t]*")|%(?=[a-z])""", re.ASCII)

RESERVED = _QUALIFIERS | _BASIC | _TAGS | {"if", "sizeof"}
"""Words that are no names of variables."""

_LIMITS = {"int": 1 << 31, "unsigned int": 1 << 32, "long": 1 << 63, "unsigned long": 1 << 64}


class Scanner:
    """A cursor over part of a definition.

    :ivar text: the whole definition, so that columns count from its start
    :ivar position: index of the next character
    :ivar end: index after the last character that may be read
    """

    def __init__(self, text: str, position: int = 0, end: int | None = None) -> None:
        self.text = text
        self.position = position
        self.end = len(text) if end is None else end

    def skip_space(self) -> int:
        """Go past spaces and tabs.

        :return: the column of what follows
        """
        match = _SPACE.match(self.text, self.position, self.end)
        self.position = match.end() if match else self.position
        return self.position

    def at_end(self) -> bool:
        """Whether nothing is left but spaces."""
        return self.skip_space() >= self.end

    def peek(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Match *pattern* here without going past it."""
        return pattern.match(self.text, self.position, self.end)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Match *pattern* here and go past it."""
        match = self.peek(pattern)
        if match:
            self.position = match.end()
        return match

    def take_text(self, text: str) -> bool:
        """Go past *text* if it stands here."""
        if not self.text.startswith(text, self.position, self.end):
            return False
        self.position += len(text)
        return True

    def expect(self, text: str) -> None:
        """Go past spaces and *text*.

        :raises DefinitionError: if something else stands here
        """
        self.skip_space()
        if not self.take_text(text):
            raise self.expected(f"'{text}'")

    def error(self, message: str, column: int | None = None) -> DefinitionError:
        """An exception that points at *column*, or at the next character."""
        return DefinitionError(message, self.text, self.position if column is None else column)

    def expected(self, what: str) -> DefinitionError:
        """An exception that says *what* should stand here and what does."""
        match = self.peek(_FOUND)
        if match:
            found = f"'{match[0]}'"
        elif self.position >= len(self.text):
            found = "the end"
        elif self.end < len(self.text):
            found = "a space; a field with spaces needs parentheses around it"
        else:
            found = "a space"
        return self.error(f"expected {what}, found {found}")

    def number(self) -> tuple[int, str] | None:
        """Read an unsigned C integer.

        :return: value and C type, or None if no digit stands here
        :raises DefinitionError: if it is malformed or does not fit into 64 bits
        """
        if not ("0" <= self.text[self.position : self.position + 1] <= "9"):
            return None
        column = self.position
        match = self.take(_NUMBER)
        suffix = match[2].lower() if match else ""
        if match is None or suffix not in _SUFFIXES or column >= self.end:
            raise self.error("expected a number such as 12, 0x1f or 017", column)
        value = self.integer(match[1], column)
        decimal = not match[1].startswith("0") or not value
        return value, literal_type(value, decimal, "u" in suffix, "l" in suffix)

    def integer(self, digits: str, column: int) -> int:
        """Value of *digits* with C's prefixes, where a leading 0 means octal.

        :raises DefinitionError: if a digit is not octal, or the value needs more than 64 bits
        """
        octal = digits.isdigit() and digits.startswith("0")
        if not _DIGITS.fullmatch(digits) or (octal and ("8" in digits or "9" in digits)):
            raise self.error(f"'{digits}' is not a number; a leading 0 is octal", column)
        if len(digits) > 66 or (value := int(digits, 8 if octal else 0)) >= 1 << 64:
            raise self.error("the number does not fit into 64 bits", column)
        return value

    def string(self) -> str | None:
        """Read a string in double quotes; None if none starts here.

        :raises DefinitionError: if it does not end, or has an unknown escape
        """
        if not self.text.startswith('"', self.position, self.end):
            return None
        column = self.position
        match = self.take(_STRING)
        if match is None:
            raise self.error("the string has no closing quote", column)
        return self._unescape(match[1], column + 1)

    def character(self) -> int | None:
        """Read an ASCII character in single quotes; None if none starts here.

        :raises DefinitionError: if it is not exactly one ASCII character
        """
        if not self.text.startswith("'", self.position, self.end):
            return None
        column = self.position
        match = self.take(_CHAR)
        value = self._unescape(match[1], column + 1) if match else ""
        if len(value) != 1 or not value.isascii():
            raise self.error("expected one ASCII character in single quotes", column)
        return ord(value)

    def register(self) -> str | None:
        """Read ``%di`` or ``%rdi``.

        :return: name as in ``struct pt_regs``, or None if no ``%`` stands here
        :raises DefinitionError: if x86-64 has no such register
        """
        if not self.text.startswith("%", self.position, self.end):
            return None
        match = self.peek(_REGISTER)
        if match is None or match[1] not in _REGISTERS:
            raise self.expected("a register such as %di, %rdi or %r8")
        self.position = match.end()
        return _REGISTERS[match[1]]

    def type_in_parentheses(self, *, cast: bool) -> str | None:
        """Read ``(struct file *)`` and the like; None if what stands here is no type.

        ``(name)`` is a type if the name is one in the kernel's manner (``u32``, ``loff_t``) or if
        only an operand can follow.

        :param cast: an operand has to follow, as after a cast and unlike ``sizeof(type)``
        """
        match = self.peek(_TYPE)
        if match is None:
            return None
        words, stars = match[1].split(), match[2].count("*")
        plain = [word for word in words if word not in _QUALIFIERS]
        is_type = (
            (len(plain) == 2 and plain[0] in _TAGS and plain[1] not in RESERVED)
            or (bool(plain) and all(word in _BASIC for word in plain))
            or (len(plain) == 1 and plain[0] not in RESERVED)
        )
        if not is_type:
            return None
        if len(words) == 1 and not stars:
            follows = _AFTER_TYPE if is_type_name(plain[0]) else _AFTER_NAME
            if cast and not follows.match(self.text, match.end(), self.end):
                return None
            if not cast and not is_type_name(plain[0]):
                return None
        self.position = match.end()
        return " ".join(words) + (" " + "*" * stars if stars else "")

    def _unescape(self, raw: str, column: int) -> str:
        def character(match: re.Match[str]) -> str:
            escape = match[1]
            if escape[0] == "x" and len(escape) > 1:
                return chr(int(escape[1:], 16))
            if escape[0] in "01234567":
                return chr(int(escape, 8))
            if escape not in _ESCAPES:
                raise self.error(f"unknown escape '\\{escape}'", column + match.start())
            return _ESCAPES[escape]

        return _ESCAPE.sub(character, raw)


def is_type_name(word: str) -> bool:
    """Whether a word alone names a type, by C's keywords and the kernel's manner of naming."""
    return word in _BASIC or _TYPEDEF.fullmatch(word) is not None


def literal_type(value: int, decimal: bool, unsigned: bool = False, long: bool = False) -> str:
    """C type of an integer literal on x86-64 (C11, 6.4.4.1).

    :param decimal: written in decimal, so that it is not made unsigned while it fits
    :param unsigned: has the suffix ``U``
    :param long: has the suffix ``L``
    """
    for name, limit in _LIMITS.items():
        is_unsigned = name.startswith("unsigned")
        if (long and "int" in name) or (unsigned and not is_unsigned):
            continue
        if decimal and is_unsigned and not unsigned:
            continue
        if value < limit:
            return name
    return "unsigned long"


def split_words(text: str, position: int = 0) -> list[tuple[int, int]]:
    """Split at white space outside of parentheses, brackets and quotes.

    :return: start and end of each word
    """
    words: list[tuple[int, int]] = []
    start, depth, quote, at = -1, 0, "", position
    while at < len(text):
        character = text[at]
        if character in " \t" and not depth and not quote:
            if start >= 0:
                words.append((start, at))
            start, at = -1, at + 1
            continue
        start = at if start < 0 else start
        if quote:
            at += character == "\\"
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth = max(0, depth + (character in "([") - (character in ")]"))
        at += 1
    if start >= 0:
        words.append((start, len(text)))
    return words
