"""Output above the prompt, which stays as it is."""

from typing import Any

from prompt_toolkit.application import Application
from prompt_toolkit.renderer import CPR_Support
from prompt_toolkit.utils import get_cwidth

from kgdbx.shell.plain import without_colour

__all__ = ("print_above",)

# With fewer rows above it the prompt makes room, and with a larger gap below it moves down.
_LEAST_ROWS = 3
_LARGEST_GAP = 2


def print_above(app: Application[Any], text: str) -> None:
    """Show lines above the prompt.

    They scroll in the part of the screen that is above it, so that nothing of the prompt is
    written again: drawing it takes more time than a screenful of lines. In raw mode:
    ``run_in_terminal()`` would have the terminal echo keys meanwhile.

    :param text: whole lines
    """
    output = app.output
    if not app.is_running:
        output.write_raw(text.replace("\n", "\r\n"))
        output.flush()
    elif rows := _rows_above(app):
        _scroll_above(app, text, rows)
    else:
        _move_down(app, text)


def _rows_above(app: Application[Any]) -> int:
    # How many rows there are above the prompt, if that is sure, and it is where it belongs.
    renderer = app.renderer
    screen, size = renderer.last_rendered_screen, app.output.get_size()
    if screen is None or renderer.waiting_for_cpr or size != renderer._last_size:
        return 0
    if renderer.cpr_support is not CPR_Support.SUPPORTED or not renderer.height_is_known:
        return 0
    needed = app.layout.container.preferred_height(size.columns, size.rows).preferred
    rows = renderer.rows_above_layout
    sure = screen.height - needed <= _LARGEST_GAP and rows + screen.height == size.rows
    return rows if sure and rows >= _LEAST_ROWS else 0


def _scroll_above(app: Application[Any], text: str, rows: int) -> None:
    output, cursor = app.output, app.renderer._cursor_pos
    lines = text.removesuffix("\n").replace("\n", "\r\n")
    output.enable_autowrap()
    output.write_raw(f"\x1b[1;{rows}r\x1b[{rows};1H\r\n{lines}\x1b[0m\x1b[r")  # DECSTBM
    output.disable_autowrap()
    output.cursor_goto(rows + cursor.y + 1, cursor.x + 1)
    output.flush()


def _move_down(app: Application[Any], text: str) -> None:
    renderer, columns = app.renderer, app.output.get_size().columns
    known = renderer.last_rendered_screen is not None and renderer.height_is_known
    below = app.output.get_size().rows - renderer.rows_above_layout if known else 0
    renderer.erase(leave_alternate_screen=False)
    app.output.write_raw(text.replace("\n", "\r\n"))
    app.output.flush()
    app._request_absolute_cursor_position()
    if below:  # until the terminal tells; without it the toolbar would go and come back
        used = sum(
            max(1, -(-get_cwidth(without_colour(line)) // columns)) for line in text.splitlines()
        )
        renderer._min_available_height = max(1, below - used)
    app._redraw()
