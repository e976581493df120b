"""Output on its way to the screen: gathered, and shown a frame at a time."""

from collections import deque
from collections.abc import Callable

from kgdbx.shell.plain import harmless

__all__ = ("Printer",)


class Printer:
    """Gathers text of all sessions into whole lines.

    Nobody can read ten thousand lines a second. Of lines that may be left out, a frame shows as
    many as fit on the screen and counts the others; a transcript has them all.

    :param most: how many such lines a frame may show
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self.dropped = 0
        self._most = most
        self._open: dict[str, str] = {}
        self._lines: deque[tuple[str, bool]] = deque()
        self._left_out = 0
        self._droppable = 0

    def write(self, source: str, text: str, *, droppable: bool = False, prefix: str = "") -> None:
        """Add text.

        :param source: which session it is of: their lines are not mixed
        :param droppable: it may be left out if there is too much
        :param prefix: put before each line
        """
        lines = (self._open.pop(source, "") + text).split("\n")
        if last := lines.pop():
            self._open[source] = last
        for line in lines:
            self._add(f"{prefix}{line}", droppable)

    def flush(self, source: str, prefix: str = "") -> None:
        """End a line that a command has left open."""
        if last := self._open.pop(source, ""):
            self._add(f"{prefix}{last}", False)

    def frame(self) -> str:
        """What to show now; empty if there is nothing."""
        if not self._lines and not self._left_out:
            return ""
        lines = [harmless(line) for line, _ in self._lines]
        if self._left_out:
            note = f"... {self._left_out:,} lines not shown; a log (--log FILE) has them"
            lines.insert(0, note)
            self.dropped += self._left_out
        self._lines.clear()
        self._left_out = self._droppable = 0
        return "\n".join(lines) + "\n"

    def _add(self, line: str, droppable: bool) -> None:
        self._lines.append((line, droppable))
        self._droppable += droppable
        if not droppable or self._droppable <= max(1, self._most()):
            return
        for n, (_, may_go) in enumerate(self._lines):
            if may_go:
                del self._lines[n]
                self._droppable -= 1
                self._left_out += 1
                return
