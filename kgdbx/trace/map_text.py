"""Maps as bpftrace prints them, and as JSON."""

from collections.abc import Iterable
from typing import Any

from kgdbx.probes.value import FieldValue, KernelStack
from kgdbx.resident.maps import Map, Row
from kgdbx.trace.json_lines import json_line, json_value

__all__ = ("MAP_SCHEMA", "map_json", "map_text")

MAP_SCHEMA = "kgdbx.map.1"
"""Version of the JSON lines of maps: the first line of a stream names it."""

_BAR_WIDTH = 52
_UNITS = ("", "K", "M", "G", "T", "P", "E")


def map_text(of: Map) -> str:
    """A map, the greatest value last; empty if nothing was summed up."""
    blocks = [_row_text(of, row) for row in of.rows]
    if of.lost:
        blocks.append(f"@{of.name}: {of.lost:,} hits found no room for their key and are missing")
    return "\n".join(blocks)


def map_json(of: Map) -> str:
    """A map as one JSON object on one line.

    A row has ``value``, or the ``buckets`` of a histogram, where ``min`` is the least value and
    ``end`` is above the greatest.
    """
    rows: list[dict[str, Any]] = []
    for row in of.rows:
        item: dict[str, Any] = {"key": [json_value(part) for part in row.key]}
        if of.function in ("hist", "lhist"):
            item["buckets"] = [
                {"min": least, "end": end, "count": count} for least, end, count in row.buckets
            ]
        else:
            item["value"] = row.value
        rows.append(item)
    return json_line(
        {
            "map": f"@{of.name}",
            "function": of.function,
            "keys": list(of.keys),
            "rows": rows,
            "lost": of.lost,
        }
    )


def _row_text(of: Map, row: Row) -> str:
    head = f"@{of.name}" + (f"[{_key(row.key)}]" if row.key else "")
    if of.function not in ("hist", "lhist"):
        return f"{head}: {row.value}"
    highest = max((count for _, _, count in row.buckets), default=1)
    lines = [f"{head}:"]
    for least, end, count in row.buckets:
        bar = "@" * (_BAR_WIDTH * count // highest)
        lines.append(f"{_interval(least, end):<16} {count:8} |{bar:<{_BAR_WIDTH}}|")
    return "\n".join((*lines, ""))


def _key(parts: Iterable[FieldValue]) -> str:
    return ", ".join(map(_part, parts))


def _part(value: FieldValue) -> str:
    if isinstance(value, KernelStack):
        return "\n" + "".join(f"    {frame!s}\n" for frame in value)
    if isinstance(value, str):
        # The guest chooses its names: none may break the line.
        return value if value.isprintable() else value.encode("unicode_escape").decode()
    return value.hex(" ") if isinstance(value, bytes) else str(value)


def _interval(least: int | None, end: int | None) -> str:
    if least is None:
        return f"(..., {_short(end or 0)})"
    if end is None:
        return f"[{_short(least)}, ...)"
    if end == least + 1:
        return f"[{least}]"
    return f"[{_short(least)}, {_short(end)})"


def _short(number: int) -> str:
    # 1024 is 1K, but 1000 is 1000.
    unit = 0
    while number and number % 1024 == 0 and unit < len(_UNITS) - 1:
        number //= 1024
        unit += 1
    return f"{number}{_UNITS[unit]}"
