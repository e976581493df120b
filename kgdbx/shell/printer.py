"""Output on its way to the screen: gathered, and shown a frame at a time."""

import time
from collections.abc import Callable

from kgdbx.shell.plain import harmless

__all__ = ("Printer",)

_SCREENS_PER_S = 2.0
_NOTE_S = 0.5
# Of an event with its kernel stack, see kgdbx.trace.text.
_STACK_HEAD = ": <stack trace>"
_STACK_LINE = " => "


class Printer:
    """Gathers text of all sessions into whole lines.

    Nobody can read ten thousand lines a second. Of lines that may be left out a screenful is shown
    at once, and two of them a second go on; the others are counted, and that is said. A transcript
    has them all.

    :param rows: rows of the screen; None shows everything
    :param clock: seconds
    :ivar dropped: lines that were not shown so far
    """

    def __init__(
        self,
        rows: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dropped = 0
        self._rows = rows
        self._clock = clock
        self._allowed = 0.0 if rows is None else float(rows())
        self._allowed_at = clock()
        self._open: dict[str, str] = {}
        self._lines: list[str] = []
        self._left_out = 0
        self._cut = False
        self._note_at = clock()

    def write(self, source: str, text: str, *, prefix: str = "") -> None:
        """Add text that is shown whatever comes.

        :param source: which session it is of: their lines are not mixed
        :param prefix: put before each line
        """
        lines = (self._open.pop(source, "") + text).split("\n")
        if last := lines.pop():
            self._open[source] = last
        self._lines += (f"{prefix}{line}" for line in lines)

    def write_events(self, text: str, *, prefix: str = "") -> None:
        """Add whole lines, of which some may be left out."""
        if self._rows is None:
            self._lines += (f"{prefix}{line}" for line in text.splitlines())
            return
        now, rows = self._clock(), self._rows()
        refill = (now - self._allowed_at) * _SCREENS_PER_S * rows
        self._allowed, self._allowed_at = min(float(rows), self._allowed + refill), now
        while self._cut and _is_stack(text):  # of an event that was left out
            text = text.partition("\n")[2]
            self._left_out += 1
        count = text.count("\n")
        shown = _whole_events(text, min(count, int(self._allowed)))
        self._allowed -= len(shown)
        self._left_out += count - len(shown)
        self._cut = len(shown) < count or (self._cut and not text)
        self._lines += (f"{prefix}{line}" for line in shown)

    def flush(self, source: str, prefix: str = "") -> None:
        """End a line that a command has left open."""
        if last := self._open.pop(source, ""):
            self._lines.append(f"{prefix}{last}")

    def frame(self) -> str:
        """What to show now; empty if there is nothing."""
        lines, self._lines = self._lines, []
        now = self._clock()
        if self._left_out and now - self._note_at >= _NOTE_S:
            lines.append(f"... {self._left_out:,} lines not shown; --log FILE has all")
            self.dropped += self._left_out
            self._left_out, self._note_at = 0, now
        return "".join(f"{harmless(line)}\n" for line in lines)


def _whole_events(text: str, most: int) -> list[str]:
    # The first lines, without an event of which only a part would be shown.
    *shown, rest = text.split("\n", most)
    while shown and _is_stack(rest):
        rest = shown.pop()
    return shown


def _is_stack(text: str) -> bool:
    return text.startswith(_STACK_LINE) or _STACK_HEAD in text.partition("\n")[0]
