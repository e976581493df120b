"""From rows and events to text and JSON: the only place that knows widths and colour."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from kgdbx.doctor import Check
from kgdbx.probes.event import Event
from kgdbx.probes.fetch import FieldValue, Hex, Unreadable

__all__ = (
    "SCHEMA",
    "Style",
    "checks_table",
    "event_json",
    "event_line",
    "json_line",
    "pick_style",
    "table",
)

SCHEMA = "kgdbx.event.1"
"""Version of the JSON lines: the first line of a stream names it."""


@dataclasses.dataclass(frozen=True)
class Style:
    """ANSI colours, or nothing."""

    bold: str = ""
    name: str = ""
    value: str = ""
    fault: str = ""
    reset: str = ""


PLAIN = Style()
COLOUR = Style("\x1b[1m", "\x1b[36m", "\x1b[32m", "\x1b[31m", "\x1b[0m")


def pick_style(stream: TextIO | None, when: str = "auto") -> Style:
    """Colour for a stream: on a terminal, unless ``NO_COLOR`` is set (no-color.org).

    :param when: ``auto``, ``always`` or ``never``
    """
    if when == "always":
        return COLOUR
    if when == "never" or os.environ.get("NO_COLOR"):
        return PLAIN
    if os.environ.get("CLICOLOR_FORCE", "0") != "0" or (stream is not None and stream.isatty()):
        return COLOUR
    return PLAIN


def event_line(event: Event, style: Style = PLAIN) -> str:
    """An event in ftrace's text form (Documentation/trace/kprobetrace.rst)."""
    task = f"{event.task.comm[:16]:>16}-{event.task.pid:<7}"
    seconds = f"{event.ts_ns // 10**9}.{event.ts_ns // 1000 % 10**6:06d}"
    where = event.where
    if event.kind == "r" and event.return_address is not None:
        where = f"{event.return_where or hex(event.return_address)} <- {where.partition('+')[0]}"
    fields = "".join(f" {name}={_coloured(value, style)}" for name, value in event.fields.items())
    name = event.probe.removeprefix("kprobes/")
    return (
        f"{task} [{event.cpu:03d}] {seconds:>13}: "
        f"{style.name}{name}{style.reset}: ({where}){fields}"
    )


def event_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object: stable snake_case keys, times in ns, addresses as hex text."""
    record: dict[str, Any] = {
        "ts_ns": event.ts_ns,
        "cpu": event.cpu,
        "comm": event.task.comm,
        "pid": event.task.pid,
        "tgid": event.task.tgid,
        "probe": event.probe,
        "kind": event.kind,
        "address": hex(event.address),
        "where": event.where,
        "fields": {name: _json_value(value) for name, value in event.fields.items()},
    }
    if event.return_address is not None:
        record["return_address"] = hex(event.return_address)
    return record


def json_line(record: Mapping[str, Any]) -> str:
    """One JSON object on one line."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], style: Style = PLAIN) -> str:
    """Columns as wide as their widest cell; numbers to the right, the last column ragged."""
    rows = list(rows)
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[n], int | float) for row in rows)
        for n in range(len(columns))
    ]
    widths = [max(len(row[n]) for row in [list(columns), *cells]) for n in range(len(columns))]
    lines = []
    for index, row in enumerate([list(columns), *cells]):
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        line = "  ".join(parts).rstrip()
        lines.append(f"{style.bold}{line}{style.reset}" if index == 0 else line)
    return "\n".join(lines)


def checks_table(checks: Iterable[Check], style: Style = PLAIN) -> str:
    """What ``doctor`` found, with remedies for what is missing."""
    rows = [
        ("ok" if c.ok else "MISSING", c.name, c.found if c.ok else f"{c.found}; {c.remedy}")
        for c in checks
    ]
    return table(("", "what", "found"), rows, style)


def _cell(value: object) -> str:
    if isinstance(value, Hex):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    return str(value)


def _coloured(value: FieldValue, style: Style) -> str:
    colour = style.fault if isinstance(value, Unreadable) else style.value
    return f"{colour}{_text(value)}{style.reset if colour else ''}"


def _text(value: FieldValue) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bytes):
        return value.hex(" ")
    if isinstance(value, list):
        return "{" + ",".join(_text(each) for each in value) + "}"
    return str(value)


def _json_value(value: FieldValue) -> Any:
    if isinstance(value, Unreadable):
        return {
            "error": value.reason,
            "address": None if value.address is None else hex(value.address),
        }
    if isinstance(value, Hex):
        return hex(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    return value
