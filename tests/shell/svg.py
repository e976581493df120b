"""A terminal's screen as SVG."""

from html import escape
from itertools import groupby

import pyte
from pyte.screens import Char

__all__ = ("screen_svg",)

_CELL = (8.4, 18.0)
_COLOURS = {
    "black": "#1d1f21",
    "red": "#cc6666",
    "green": "#8fbf6a",
    "brown": "#d9a84e",
    "blue": "#6f9fd8",
    "magenta": "#b294bb",
    "cyan": "#66b8b0",
    "white": "#d5d8d6",
    "brightblack": "#6d7278",
    "brightred": "#e08080",
    "brightgreen": "#a8d88a",
    "brightbrown": "#f0c674",
    "brightblue": "#8ab8f0",
    "brightmagenta": "#d0b0dc",
    "brightcyan": "#8ad8d0",
    "brightwhite": "#ffffff",
}
_FOREGROUND, _BACKGROUND = _COLOURS["white"], _COLOURS["black"]
_Look = tuple[str, str, bool, bool, bool]


def screen_svg(screen: pyte.Screen, title: str) -> str:
    """The screen with its colours.

    :param title: for those who cannot see it
    """
    width, height = screen.columns * _CELL[0] + 20, screen.lines * _CELL[1] + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="14">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" rx="6" fill="{_BACKGROUND}"/>',
    ]
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        column = 0
        for look, group in groupby(cells, _look):
            text = "".join(cell.data for cell in group)
            parts += _run(row, column, text, look)
            column += len(text)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _look(cell: Char) -> _Look:
    foreground = _colour(cell.fg, _FOREGROUND)
    background = _colour(cell.bg, _BACKGROUND)
    if cell.reverse:
        foreground, background = background, foreground
    return foreground, background, cell.bold, cell.italics, cell.underscore


def _colour(name: str, default: str) -> str:
    if name == "default":
        return default
    return _COLOURS.get(name) or f"#{name}"


def _run(row: int, column: int, text: str, look: _Look) -> list[str]:
    foreground, background, bold, italic, underlined = look
    x, y = 10 + column * _CELL[0], 10 + row * _CELL[1]
    width = len(text) * _CELL[0]
    parts = []
    if background != _BACKGROUND:
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_CELL[1]:g}" '
            f'fill="{background}"/>'
        )
    if text.strip():
        style = ' font-weight="bold"' if bold else ""
        style += ' font-style="italic"' if italic else ""
        style += ' text-decoration="underline"' if underlined else ""
        parts.append(
            f'<text x="{x:g}" y="{y + 13.5:g}" fill="{foreground}"{style} xml:space="preserve" '
            f'textLength="{width:g}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>'
        )
    return parts
