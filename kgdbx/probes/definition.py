"""One probe as text, the same grammar everywhere: ``kprobe_events`` plus names from debug info.

::

    p[:[GRP/]NAME] [MODULE:]FUNC[+OFFSET | :LINE] [FIELD ...] [if CONDITION]
    p[:[GRP/]NAME] ADDRESS [FIELD ...] [if CONDITION]
    r[MAXACTIVE][:[GRP/]NAME] [MODULE:]FUNC [FIELD ...] [if CONDITION]
    p[:[GRP/]NAME] [MODULE:]FUNC%return ...     the same as r
    w[:[GRP/]NAME] EXPR[:SIZE] [r|w|rw] [FIELD ...] [if CONDITION]
    -:[GRP/]NAME

In place of fields a ``p`` or ``r`` can have an aggregation as in bpftrace, ``@NAME[KEY, ...] =
FUNCTION(EXPR)``: hits are then summed up in a map, see :mod:`kgdbx.probes.aggregation`.

FUNC may be a pattern with ``* ? [...]``. A FIELD is ``[NAME=]EXPR[:TYPE]``; white space separates
fields, so an expression with spaces goes into parentheses. ``w`` watches the memory of EXPR, or
the memory at EXPR if that is a number.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal as OneOf

from kgdbx.probes.aggregation import Aggregation, is_aggregation, read_aggregation
from kgdbx.probes.expression import Expr, format_expression, is_text
from kgdbx.probes.field import Field, add_field, read_value
from kgdbx.probes.lexer import Scanner, split_words

__all__ = ("DEFAULT_GROUP", "ProbeDefinition", "format_definition", "parse_definition")

DEFAULT_GROUP = "kprobes"
"""Group of events that name none, as in ``kprobe_events``."""

_MAX_NAME = 63  # MAX_EVENT_NAME_LEN - 1, kernel/trace/trace_probe.h
_MAX_MAXACTIVE = 4096  # KRETPROBE_MAXACTIVE_MAX, kernel/trace/trace_kprobe.c
_MAX_WATCH_BYTES = 4096

_HEAD = re.compile(r"([prw-])(\d*)(?=[: \t]|$)", re.ASCII)
_EVENT_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_MODULE = re.compile(r"([A-Za-z_][\w-]*):(?=[A-Za-z_*?\[])", re.ASCII)
_FUNCTION = re.compile(r"(?:[A-Za-z_*?]|\[[^\]\s]+\])(?:[\w.*?]|\[[^\]\s]+\])*", re.ASCII)
_NUMBER = re.compile(r"\d\w*", re.ASCII)
_SPACE = re.compile(r"[ \t]|$")
_IF = re.compile(r"if(?=[ \t(]|$)")
_ACCESS = re.compile(r"(rw|r|w)(?=[ \t]|$)")


@dataclass(frozen=True, slots=True)
class ProbeDefinition:
    """One line of the grammar.

    :ivar kind: p for a probe at an instruction, r for a return probe, w for a data watch, - for
        the deletion of a probe
    :ivar group: None if not given; see :attr:`event_group`
    :ivar name: None if not given; see :attr:`event_name`
    :ivar function: name or pattern; None for an address, a watch and a deletion
    :ivar offset_bytes: from the function's entry
    :ivar line: source line, counted from the function's first line as 0; None for none
    :ivar address: guest-virtual address to probe in place of a function
    :ivar maxactive: simultaneous instances of a return probe; 0 for the default
    :ivar watch: whose memory to watch
    :ivar size_bytes: how much to watch; None for the size of the type
    :ivar access: r, w or rw: which accesses a watch reports
    :ivar aggregation: what to sum up in place of fields
    :ivar text: as it was written; not part of equality
    """

    kind: OneOf["p", "r", "w", "-"]
    group: str | None = None
    name: str | None = None
    module: str | None = None
    function: str | None = None
    offset_bytes: int = 0
    line: int | None = None
    address: int | None = None
    maxactive: int = 0
    watch: Expr | None = None
    size_bytes: int | None = None
    access: OneOf["r", "w", "rw"] = "w"
    fields: tuple[Field, ...] = ()
    condition: Expr | None = None
    aggregation: Aggregation | None = None
    text: str = field(default="", compare=False)

    @property
    def is_glob(self) -> bool:
        """Whether *function* is a pattern, which may stand for several functions."""
        return self.function is not None and any(c in self.function for c in "*?[")

    @property
    def event_group(self) -> str:
        """Group of the event."""
        return self.group or DEFAULT_GROUP

    @property
    def event_name(self) -> str:
        """Name of the event; a default as ``kprobe_events`` makes it, such as ``p_vfs_read_0``."""
        if self.name is not None:
            return self.name
        if self.address is not None:
            place = f"{self.address:#x}"
        elif self.watch is not None:
            place = format_expression(self.watch, spaces=False)
        else:
            module = f"{self.module}_" if self.module else ""
            place = f"{module}{self.function}_" + (
                f"L{self.line}" if self.line is not None else str(self.offset_bytes)
            )
        return re.sub(r"\W", "_", f"{self.kind}_{place}", flags=re.ASCII)[:_MAX_NAME]


def parse_definition(text: str) -> ProbeDefinition:
    """Parse one line.

    :raises DefinitionError: if it is not a probe definition; it points at the fault

    >>> parse_definition("r20:x do_sys_openat2 $retval:s32 if $retval < 0").maxactive
    20
    """
    return _Parser(text.strip()).definition()


def format_definition(definition: ProbeDefinition) -> str:
    """Canonical text, which parses to an equal definition."""
    return " ".join(_format_parts(definition))


class _Parser:
    def __init__(self, text: str) -> None:
        self.scanner = Scanner(text)
        # What has no value where the probe is; see read_value().
        self.absent = frozenset(("arg", "duration_ns", "retval"))
        self.map: Aggregation | None = None

    def definition(self) -> ProbeDefinition:
        scanner = self.scanner
        for separator in "\n\r":
            if separator in scanner.text:
                column = scanner.text.index(separator)
                raise scanner.error("expected one definition on one line", column)
        head = scanner.take(_HEAD)
        if head is None:
            raise scanner.expected("a probe that starts with p, r, w or -")
        if head[2] and head[1] != "r":
            raise scanner.error("only a return probe (r) takes a maxactive", head.start(2))
        group, name = self.event_name(head[1] == "-")
        if head[1] == "-":
            if not scanner.at_end():
                raise scanner.expected("the end")
            return ProbeDefinition("-", group, name, text=scanner.text)
        if scanner.at_end():
            what = "something to watch" if head[1] == "w" else "a function or an address"
            raise scanner.expected(what)
        if head[1] == "w":
            return self.watch(group, name)
        return self.probe(head[1] == "r", self.maxactive(head), group, name)

    def maxactive(self, head: re.Match[str]) -> int:
        value = int(head[2][:9] or 0)
        if value > _MAX_MAXACTIVE:
            raise self.scanner.error(f"maxactive is at most {_MAX_MAXACTIVE}", head.start(2))
        return value

    def event_name(self, required: bool) -> tuple[str | None, str | None]:
        scanner = self.scanner
        if not scanner.take_text(":"):
            if required:
                raise scanner.expected("':' and the name of the probe to delete")
            return None, None
        group: str | None = None
        name: str | None = self.identifier("an event name")
        if scanner.take_text("/") or scanner.take_text("."):
            group, name = name, None
            if required or not scanner.peek(_SPACE):
                name = self.identifier("an event name")
        if not scanner.peek(_SPACE):
            raise scanner.expected("a space after the event name")
        return group, name

    def identifier(self, what: str) -> str:
        column = self.scanner.position
        match = self.scanner.take(_EVENT_NAME)
        if match is None:
            raise self.scanner.expected(what)
        if len(match[0]) > _MAX_NAME:
            raise self.scanner.error(f"a name has at most {_MAX_NAME} characters", column)
        return match[0]

    def probe(
        self, is_return: bool, maxactive: int, group: str | None, name: str | None
    ) -> ProbeDefinition:
        scanner = self.scanner
        module = function = line = address = None
        offset, place = 0, scanner.position
        if number := scanner.number():
            address = number[0]
        else:
            if match := scanner.take(_MODULE):
                module = match[1]
            match = scanner.take(_FUNCTION)
            if match is None:
                raise scanner.expected("a function or an address")
            function, place = match[0], scanner.position
            if scanner.take_text("+"):
                offset = self.count("an offset in bytes")
            elif scanner.take_text(":"):
                line = self.count("a line number")
            if scanner.take_text("%return"):
                is_return = True
        if not scanner.peek(_SPACE):
            raise scanner.expected("+offset, :line, %return or a space")
        is_inside = bool(offset) or line is not None
        if is_return and is_inside:
            raise scanner.error("a return probe is for a whole function", place)
        if is_inside and function and any(c in function for c in "*?["):
            raise scanner.error("a pattern takes no offset and no line", place)
        if not is_inside:
            self.absent -= {"arg"}
        if is_return:
            self.absent -= {"duration_ns", "retval"}
        fields, condition = self.tail(aggregates=True)
        return ProbeDefinition(
            kind="r" if is_return else "p",
            group=group,
            name=name,
            module=module,
            function=function,
            offset_bytes=offset,
            line=line,
            address=address,
            maxactive=maxactive,
            fields=fields,
            condition=condition,
            aggregation=self.map,
            text=scanner.text,
        )

    def count(self, what: str) -> int:
        column = self.scanner.position
        match = self.scanner.take(_NUMBER)
        if match is None:
            raise self.scanner.expected(what)
        value = self.scanner.integer(match[0], column)
        if value >= 1 << 31:
            raise self.scanner.error("the number is too large", column)
        return value

    def watch(self, group: str | None, name: str | None) -> ProbeDefinition:
        scanner = self.scanner
        (start, end), *_ = split_words(scanner.text, scanner.position)
        word = Scanner(scanner.text, start, end)
        watch = read_value(word, self.absent)
        if is_text(watch):
            raise scanner.error("a string has no memory to watch", start)
        scanner.position = word.position
        if word.position < end and scanner.text[word.position] != ":":
            raise word.expected("an operator, ':' and a size, or a space")
        scanner.skip_space()
        size_bytes = None
        if scanner.take_text(":"):
            column = scanner.position
            size_bytes = self.count("a size in bytes")
            if not 1 <= size_bytes <= _MAX_WATCH_BYTES:
                raise scanner.error(f"a watch has 1 to {_MAX_WATCH_BYTES} bytes", column)
            if not scanner.peek(_SPACE):
                raise scanner.expected("a space after the size")
        scanner.skip_space()
        access = scanner.take(_ACCESS)
        fields, condition = self.tail()
        return ProbeDefinition(
            kind="w",
            group=group,
            name=name,
            watch=watch,
            size_bytes=size_bytes,
            access=access[1] if access else "w",  # type: ignore[arg-type]
            fields=fields,
            condition=condition,
            text=scanner.text,
        )

    def tail(self, *, aggregates: bool = False) -> tuple[tuple[Field, ...], Expr | None]:
        text = self.scanner.text
        fields: dict[str, Field] = {}
        words = split_words(text, self.scanner.position)
        while words:
            start, end = words.pop(0)
            if _IF.match(text, start):
                return tuple(fields.values()), self.condition(start + 2)
            rest = Scanner(text, start)
            if aggregates and is_aggregation(rest):
                if self.map is not None:
                    raise rest.error("a probe has one aggregation")
                self.map = read_aggregation(rest, self.absent)
                words = split_words(text, rest.position)
            else:
                add_field(fields, Scanner(text, start, end), self.absent)
            if fields and self.map is not None:
                message = "an aggregation takes no fields; put them between its brackets"
                raise rest.error(message, start)
        return tuple(fields.values()), None

    def condition(self, position: int) -> Expr:
        scanner = Scanner(self.scanner.text, position)
        condition = read_value(scanner, self.absent)
        if not scanner.at_end():
            raise scanner.expected("an operator or the end ('==' compares)")
        return condition


def _format_parts(definition: ProbeDefinition) -> Iterator[str]:
    head = definition.kind + (str(definition.maxactive) if definition.maxactive else "")
    if definition.group or definition.name:
        group = f"{definition.group}/" if definition.group else ""
        head += f":{group}{definition.name or ''}"
    yield head
    if definition.watch is not None:
        watch = format_expression(definition.watch, spaces=False)
        yield watch + (f":{definition.size_bytes}" if definition.size_bytes else "")
        yield definition.access
    elif definition.address is not None:
        yield f"{definition.address:#x}"
    elif definition.function is not None:
        module = f"{definition.module}:" if definition.module else ""
        offset = f"+{definition.offset_bytes:#x}" if definition.offset_bytes else ""
        line = "" if definition.line is None else f":{definition.line}"
        yield f"{module}{definition.function}{offset}{line}"
    yield from map(str, definition.fields)
    if definition.aggregation is not None:
        yield str(definition.aggregation)
    if definition.condition is not None:
        yield f"if {format_expression(definition.condition)}"
