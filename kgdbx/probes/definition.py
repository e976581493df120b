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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal as OneOf

from kgdbx.errors import DefinitionError
from kgdbx.probes.aggregation import AGGREGATION, FUNCTIONS, MAX_KEYS, Aggregation, split_list
from kgdbx.probes.expression import (
    Expr,
    Literal,
    Name,
    Register,
    Special,
    format_expression,
    is_text,
    read_expression,
    walk,
)
from kgdbx.probes.lexer import Scanner, split_words

__all__ = (
    "DEFAULT_GROUP",
    "FetchType",
    "Field",
    "ProbeDefinition",
    "STACK_DEPTH",
    "expand_fields",
    "format_definition",
    "parse_definition",
)

DEFAULT_GROUP = "kprobes"
"""Group of events that name none, as in ``kprobe_events``."""

STACK_DEPTH = 16
"""Frames of a ``$kstack`` that does not say how many it wants."""

_MAX_STACK_DEPTH = 127  # PERF_MAX_STACK_DEPTH, include/uapi/linux/perf_event.h
_MAX_NAME = 63  # MAX_EVENT_NAME_LEN - 1, kernel/trace/trace_probe.h
_MAX_ARRAY = 64  # MAX_ARRAY_LEN, same file
_MAX_FIELDS = 128  # MAX_TRACE_ARGS, same file
_MAX_MAXACTIVE = 4096  # KRETPROBE_MAXACTIVE_MAX, kernel/trace/trace_kprobe.c
_MAX_WATCH_BYTES = 4096

_HEAD = re.compile(r"([prw-])(\d*)(?=[: \t]|$)", re.ASCII)
_EVENT_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_MODULE = re.compile(r"([A-Za-z_][\w-]*):(?=[A-Za-z_*?\[])", re.ASCII)
_FUNCTION = re.compile(r"(?:[A-Za-z_*?]|\[[^\]\s]+\])(?:[\w.*?]|\[[^\]\s]+\])*", re.ASCII)
_NUMBER = re.compile(r"\d\w*", re.ASCII)
_SIGNED = re.compile(r"-?(?:0x[0-9a-fA-F]+|[1-9]\d*|0)", re.ASCII)
_SPACE = re.compile(r"[ \t]|$")
_FIELD_NAME = re.compile(r"([A-Za-z_]\w*)=(?!=)", re.ASCII)
_IF = re.compile(r"if(?=[ \t(]|$)")
_ACCESS = re.compile(r"(rw|r|w)(?=[ \t]|$)")
_TYPE = re.compile(
    r"(?:([usx])(8|16|32|64)|(char|u?string|symbol)|b(\d+)@(\d+)/(8|16|32|64))(?:\[(\d+)\])?(?!\S)",
    re.ASCII,
)
_WHOLE_FIELD = frozenset(("params", "vars"))
_OWN_FIELD = _WHOLE_FIELD | {"func", "kstack"}
_STEPS_LIMIT = 1000  # of lhist, as in bpftrace


@dataclass(frozen=True, slots=True)
class FetchType:
    """The ``:TYPE`` of a field.

    :ivar base: u, s or x (shown as unsigned, signed, hexadecimal), b (bit field), char, string,
        ustring, symbol (an address, shown as symbol+offset), or kstack (*count* frames at most)
    :ivar size_bytes: size in memory; of one pointer for the strings, of the container for b
    :ivar bit_offset: lowest bit of a bit field
    :ivar bit_width: width of a bit field
    :ivar count: number of elements of an array, otherwise None
    """

    base: str
    size_bytes: int = 8
    bit_offset: int = 0
    bit_width: int = 0
    count: int | None = None

    def __str__(self) -> str:
        if self.base == "kstack":
            return str(self.count)
        array = "" if self.count is None else f"[{self.count}]"
        bits = 8 * self.size_bytes
        if self.base == "b":
            return f"b{self.bit_width}@{self.bit_offset}/{bits}{array}"
        return f"{self.base}{bits if self.base in 'usx' else ''}{array}"

    @property
    def is_string(self) -> bool:
        """Whether the value is text that an address leads to."""
        return self.base in ("string", "ustring")


@dataclass(frozen=True, slots=True)
class Field:
    """One value to record.

    :ivar name: as given, otherwise the canonical text of the expression
    """

    name: str
    expression: Expr
    type: FetchType | None = None

    def __str__(self) -> str:
        text = format_expression(self.expression, spaces=False)
        name = "" if self.name == text else f"{self.name}="
        return name + text + (f":{self.type}" if self.type else "")


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


def expand_fields(
    fields: Sequence[Field], variables: Mapping[str, Sequence[str]]
) -> tuple[Field, ...]:
    """Replace ``$vars`` and ``$params`` by a field for each variable that has none yet.

    :param variables: the names of the variables under the keys ``vars`` and ``params``
    """
    taken = {each.name for each in fields}
    expanded: list[Field] = []
    for each in fields:
        expression = each.expression
        if not isinstance(expression, Special) or expression.name not in _WHOLE_FIELD:
            expanded.append(each)
            continue
        for name in variables[expression.name]:
            if name not in taken:
                taken.add(name)
                expanded.append(Field(name, Name(name, column=expression.column)))
    return tuple(expanded)


class _Parser:
    def __init__(self, text: str) -> None:
        self.scanner = Scanner(text)
        self.is_entry = False  # $argN has a meaning
        self.is_return = False  # $retval has a meaning
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
        self.is_return, self.is_entry = is_return, not is_inside
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
        watch = self.checked(read_expression(word))
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
            match = AGGREGATION.match(text, start) if aggregates else None
            if match is not None:
                words = split_words(text, self.aggregation(match))
            else:
                self.add_field(fields, Scanner(text, start, end))
            if fields and self.map is not None:
                message = "an aggregation takes no fields; put them between its brackets"
                raise DefinitionError(message, text, start)
        return tuple(fields.values()), None

    def add_field(self, fields: dict[str, Field], word: Scanner) -> None:
        text, start = self.scanner.text, word.position
        each = self.field(word)
        if each.name in fields:
            message = (
                f"the name '{each.name}' is already used; write other={text[start : word.end]}"
            )
            raise DefinitionError(message, text, start)
        if len(fields) == _MAX_FIELDS:
            raise DefinitionError(f"a probe has at most {_MAX_FIELDS} fields", text, start)
        fields[each.name] = each

    def aggregation(self, match: re.Match[str]) -> int:
        """Read one; where it ends."""
        text, scanner = self.scanner.text, self.scanner
        if self.map is not None:
            raise scanner.error("a probe has one aggregation", match.start())
        keys: dict[str, Field] = {}
        if match["keys"] is not None:
            for start, end in split_list(text, *match.span("keys")):
                self.add_field(keys, Scanner(text, start, end))
        if len(keys) > MAX_KEYS:
            raise scanner.error(f"a map has at most {MAX_KEYS} keys", match.start("keys"))
        if whole := [key for key in keys.values() if _is_special(key.expression, *_WHOLE_FIELD)]:
            raise scanner.error(f"{whole[0].name} is no key", match.start("keys"))
        name = match["function"]
        if name not in FUNCTIONS:
            known = " ".join(FUNCTIONS)
            raise scanner.error(f"expected one of {known}", match.start("function"))
        words = split_words(text, match.end() - 1)
        close = words[0][1] - 1 if words else match.end()
        if text[close : close + 1] != ")" or close < match.end():
            raise scanner.error("this parenthesis is not closed", match.end() - 1)
        value, steps = self.summed(name, match.end(), close)
        self.map = Aggregation(match["name"] or "", tuple(keys.values()), name, value, steps)
        return close + 1

    def summed(
        self, function: str, start: int, end: int
    ) -> tuple[Expr | None, tuple[int, int, int] | None]:
        # What stands in the parentheses of a map's function.
        text, scanner = self.scanner.text, self.scanner
        items = [each for each in split_list(text, start, end) if each[0] < each[1]]
        wanted = {"count": 0, "lhist": 4}.get(function, 1)
        if len(items) != wanted:
            forms = {"count": "count()", "lhist": "lhist(EXPR, MIN, MAX, STEP)"}
            form = forms.get(function, f"{function}(EXPR)")
            raise scanner.error(f"expected {form}", start)
        if not items:
            return None, None
        word = Scanner(text, *items[0])
        value = self.checked(read_expression(word))
        if word.position < word.end:
            raise word.expected("an operator or ')'")
        if is_text(value):
            raise scanner.error("a string is no number; make it a key", items[0][0])
        if function != "lhist":
            return value, None
        numbers = []
        for item in items[1:]:
            match = _SIGNED.fullmatch(text, *item)
            if match is None:
                raise scanner.error("expected a number", item[0])
            numbers.append(int(match[0], 0))
        least, most, step = numbers
        if step <= 0 or most <= least or (most - least) % step:
            raise scanner.error("STEP has to divide MAX - MIN, and MAX be above MIN", start)
        if (most - least) // step > _STEPS_LIMIT:
            raise scanner.error(f"a histogram has at most {_STEPS_LIMIT} steps", start)
        return value, (least, most, step)

    def condition(self, position: int) -> Expr:
        scanner = Scanner(self.scanner.text, position)
        condition = self.checked(read_expression(scanner))
        if not scanner.at_end():
            raise scanner.expected("an operator or the end ('==' compares)")
        return condition

    def field(self, word: Scanner) -> Field:
        name = word.take(_FIELD_NAME)
        column = word.position
        expression = read_expression(word)
        is_stack = _is_special(expression, "kstack")
        is_whole = _is_special(expression, *_WHOLE_FIELD)
        if not _is_special(expression, *_OWN_FIELD):
            self.checked(expression)
        elif is_whole and (name or word.position < word.end):
            raise word.error("stands for several fields and takes no name and no type", column)
        fetch_type = None
        if word.take_text(":"):
            fetch_type = self.depth(word) if is_stack else self.type(word, expression)
        if word.position < word.end:
            raise word.expected("an operator, ':' and a type, or a space")
        label = name[1] if name else format_expression(expression, spaces=False)
        return Field(label, expression, fetch_type)

    def depth(self, word: Scanner) -> FetchType:
        column = word.position
        match = word.take(_NUMBER)
        frames = word.integer(match[0], column) if match else 0
        if not 1 <= frames <= _MAX_STACK_DEPTH:
            raise word.error(f"a stack has 1 to {_MAX_STACK_DEPTH} frames: $kstack:8", column)
        return FetchType("kstack", 8, count=frames)

    def type(self, word: Scanner, expression: Expr) -> FetchType:
        column = word.position
        match = word.take(_TYPE)
        if match is None:
            types = "u8..u64 s8..s64 x8..x64 char string ustring symbol b<width>@<offset>/<size>"
            raise word.error(f"expected a type, one of {types}, or type[N]", column)
        number, bits, other, width, offset, container, digits = match.groups()
        count = int(digits[:9]) if digits else None
        if count is not None and not 1 <= count <= _MAX_ARRAY:
            raise word.error(f"an array has 1 to {_MAX_ARRAY} elements", match.start(7))
        if number:
            result = FetchType(number, int(bits) // 8, count=count)
        elif other:
            result = FetchType(other, 1 if other == "char" else 8, count=count)
        else:
            low, wide = int(offset[:9]), int(width[:9])
            if not wide or low + wide > int(container):
                raise word.error(f"the bits do not fit into {container}", column)
            result = FetchType("b", int(container) // 8, low, wide, count)
        if _is_special(expression, "func"):
            raise word.error("$func takes no type", column)
        if is_text(expression) and (not result.is_string or count is not None):
            raise word.error("a string takes the types string and ustring only", column)
        if count is not None and (
            _is_special(expression, "stack") or isinstance(expression, Register | Literal)
        ):
            memory = f"+0({format_expression(expression)}):{result}"
            raise word.error(f"an array is read from memory; write {memory}", column)
        return result

    def checked(self, expression: Expr) -> Expr:
        for node in walk(expression):
            if not isinstance(node, Special):
                continue
            if node.name == "retval" and not self.is_return:
                message = "$retval has a value in a return probe (r) only"
            elif node.name == "arg" and not self.is_entry:
                message = f"$arg{node.index} has a value at the function's entry only"
            elif node.name == "duration_ns" and not self.is_return:
                message = "$duration_ns has a value in a return probe (r) only"
            elif node.name in _OWN_FIELD:
                message = f"${node.name} is a field of its own, not part of an expression"
            else:
                continue
            raise self.scanner.error(message, node.column)
        return expression


def _is_special(expression: Expr, *names: str) -> bool:
    return isinstance(expression, Special) and expression.name in names


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
