"""Views as lines of styled text, as wide as the window."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from prompt_toolkit.utils import get_cwidth

__all__ = ("Line", "Table", "histogram_lines", "probe_table", "rows_table", "stop_lines")

Line = list[tuple[str, str]]
"""Pieces of one line: prompt_toolkit style, text."""


class Table(NamedTuple):
    """Rows under headings.

    :ivar notes: lines below it: what is not complete, and why
    """

    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    notes: tuple[str, ...] = ()

    def sorted_by(self, column: int, descending: bool) -> "Table":
        """The same table in another order."""

        def key(row: tuple[object, ...]) -> Any:
            return (isinstance(row[column], str), row[column])

        return self._replace(rows=sorted(self.rows, key=key, reverse=descending))

    def lines(self, columns: int) -> tuple[Line, list[Line]]:
        """Head and rows, cut at the width of the window."""
        cells = [[_cell(value) for value in row] for row in self.rows]
        widths = [
            max(get_cwidth(each) for each in (head, *(row[n] for row in cells)))
            for n, head in enumerate(self.columns)
        ]
        right = [
            bool(self.rows) and all(isinstance(row[n], int | float) for row in self.rows)
            for n in range(len(self.columns))
        ]
        head = _cut([("class:table.head", _join(self.columns, widths, right))], columns)
        body = [_cut([("", _join(row, widths, right))], columns) for row in cells]
        return head, body + [_cut([("class:fault", note)], columns) for note in self.notes]


def probe_table(probes: Sequence[dict[str, Any]], before: dict[str, int], seconds: float) -> Table:
    """Probes with their rates.

    :param before: hits by name when *seconds* had not passed
    """
    rows: list[tuple[object, ...]] = []
    for probe in probes:
        hits = int(probe["hits"])
        rate = (hits - before.get(str(probe["name"]), hits)) / seconds if seconds else 0.0
        ns = round(float(probe["handler_s"]) * 1e9 / hits) if hits else 0
        rows.append(
            (
                probe["num"],
                str(probe["name"]).removeprefix("kprobes/"),
                hits,
                round(rate),
                probe["missed"],
                probe["faults"],
                ns,
                probe["kind"],
                probe["tier"],
                probe["state"],
                probe["what"],
            )
        )
    columns = "num name hits hits/s missed faults ns/hit kind tier state what"
    return Table(tuple(columns.split()), rows)


def rows_table(answer: dict[str, Any], hexadecimal: Sequence[str] = ()) -> Table:
    """A view's rows; addresses in hex."""
    rows = answer["rows"]
    columns = tuple(rows[0]) if rows else ()
    shown = [
        tuple(f"{row[name]:#x}" if name in hexadecimal else row[name] for name in columns)
        for row in rows
    ]
    errors = answer.get("errors", ())
    notes = (f"not complete, {len(errors)} could not be read: {errors[0]}",) if errors else ()
    return Table(columns, shown, notes)


def histogram_lines(answer: dict[str, Any], columns: int) -> list[Line]:
    """Bars by powers of two."""
    head = f"{answer['field'] or 'no number yet'}: {answer['count']:,} events"
    if answer["count"]:
        head += f", mean {answer['mean']:,.1f}"
    if answer["skipped"]:
        head += f"; {answer['skipped']:,} events without this number are not in it"
    lines: list[Line] = [_cut([("bold", head)], columns)]
    counts = {int(n): int(count) for n, count in answer["buckets"]}
    if not counts:
        return lines
    most = max(counts.values())
    for n in range(min(counts), max(counts) + 1):
        count = counts.get(n, 0)
        label = f"{_bounds(n):>24} {count:>10,} "
        room = max(1, columns - len(label) - 1)
        lines.append(_cut([("", label), ("class:bar", "█" * round(count * room / most))], columns))
    return lines


def stop_lines(answer: dict[str, Any], columns: int, rows: int) -> list[Line]:
    """Source or instructions around the stop, then the stack."""
    lines: list[Line] = []
    if "where" in answer:
        text = f"{answer['where']} on CPU {answer['cpu']}, {answer['comm']} ({answer['pid']})"
        lines.append([("bold", text)])
    source = answer.get("source", {})
    if source.get("line"):
        lines.append([("class:place", f"{source['file']}:{source['line']}")])
    lines += _source(source, max(5, rows // 4))
    lines += _code(answer.get("code", []), int(answer.get("address", 0)), max(5, rows // 3))
    lines.append([("", "")])
    for number, frame in enumerate(answer.get("stack", ())):
        values = ", ".join(f"{name}={value}" for name, value in frame["arguments"])
        at = f" {frame['file']}:{frame['line']}" if frame["file"] else ""
        lines.append(
            [
                ("", f"#{number:<3} "),
                ("class:function", frame["function"]),
                ("", f"({values})" if not frame["inline"] else f"({values}) inlined"),
                ("class:place", at),
            ]
        )
    lines += [[("class:fault", error)] for error in answer.get("errors", ())]
    return [_cut(line, columns) for line in lines]


def _cut(line: Line, columns: int) -> Line:
    """A line that is not wider than the window; a mark says that something is missing."""
    if sum(get_cwidth(text) for _, text in line) <= columns:
        return line
    found: Line = []
    room = columns - 1
    for style, text in line:
        kept = ""
        for character in text:
            width = get_cwidth(character)
            if width > room:
                return [*found, (style, kept), ("reverse", ">")]
            kept += character
            room -= width
        found.append((style, kept))
    return found


def _source(source: dict[str, Any], rows: int) -> list[Line]:
    text, here = source.get("text", []), int(source.get("line", 0))
    first = max(0, here - 1 - rows // 2)
    return [
        [("class:here" if n == here else "", f"{'>' if n == here else ' '}{n:>5}  {line}")]
        for n, line in enumerate(text[first : first + rows], first + 1)
    ]


def _code(code: list[list[Any]], address: int, rows: int) -> list[Line]:
    here = next((n for n, row in enumerate(code) if row[0] == address), 0)
    first = max(0, here - rows // 2)
    lines: list[Line] = []
    for at, text, where in code[first : first + rows]:
        mark = at == address
        lines.append(
            [
                ("class:here" if mark else "", f"{'>' if mark else ' '} {at:#x} "),
                ("class:place", f"{where.partition('/')[0]:<28} "),
                ("class:here" if mark else "", text),
            ]
        )
    return lines


def _bounds(n: int) -> str:
    if not n:
        return "0"
    low, high = 1 << abs(n) - 1, (1 << abs(n)) - 1
    low, high = (low, high) if n > 0 else (-high, -low)
    return f"{low:,}" if low == high else f"{_short(low)} .. {_short(high)}"


def _short(value: int) -> str:
    for suffix, size in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if abs(value) >= 4 * size:
            return f"{round(value / size)}{suffix}"
    return str(value)


def _join(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts = []
    for text, width, to_right in zip(cells, widths, right, strict=True):
        blank = " " * (width - get_cwidth(text))
        parts.append(blank + text if to_right else text + blank)
    return "  ".join(parts).rstrip()


def _cell(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10000:
        return f"{value:,}"
    return "".join(c if c.isprintable() else "?" for c in str(value))
