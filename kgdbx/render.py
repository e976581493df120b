"""From rows to text, and the choice of colours; events are shown by kgdbx.trace."""

import os
from collections.abc import Iterable, Sequence
from typing import TextIO

from kgdbx.doctor import Check
from kgdbx.probes.value import Hex
from kgdbx.trace.text import PLAIN, Style

__all__ = ("checks_table", "pick_style", "table")

COLOUR = Style("\x1b[1m", "\x1b[36m", "\x1b[32m", "\x1b[31m", "\x1b[0m")


def pick_style(stream: TextIO | None, when: str = "auto") -> Style:
    """Colour for a stream: on a terminal that has it, unless ``NO_COLOR`` is set (no-color.org).

    :param when: ``auto``, ``always`` or ``never``
    """
    if when == "always":
        return COLOUR
    if when == "never" or os.environ.get("NO_COLOR"):
        return PLAIN
    if os.environ.get("CLICOLOR_FORCE", "0") != "0":
        return COLOUR
    shows = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return COLOUR if shows else PLAIN


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
