"""A transcript that is a script: what was typed stands as it was, what came back as comments."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from kgdbx.errors import CommandError
from kgdbx.shell.plain import without_colour

__all__ = ("Transcript",)

_SHORTEST_WAIT_S = 0.05


class Transcript:
    """Writes a log that ``kgdbx shell < FILE`` does again.

    Where the kernel ran between two commands, a ``wait`` of as many seconds stands between them.

    :param path: file to write; what is there is replaced
    :param clock: seconds
    :raises CommandError: if it cannot be written
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            self._file: TextIO = path.open("w", encoding="utf-8")
        except OSError as e:
            raise CommandError(f"cannot write {path}: {e.strerror}") from e
        self._clock = clock
        self._line_open = False
        self._ran_since: float | None = None

    def typed(self, text: str, *, running: bool) -> None:
        """Write a command.

        :param running: whether the kernel runs while it is given
        """
        self._end_line()
        if running and self._ran_since is not None:
            seconds = self._clock() - self._ran_since
            if seconds >= _SHORTEST_WAIT_S:
                self._file.write(f"wait {seconds:.2f}\n")
        self._file.write(text.rstrip("\n") + "\n")
        self._ran_since = None
        self._file.flush()

    def done(self) -> None:
        """Note that a command is done: from now on time passes that a script has to wait for."""
        self._ran_since = self._clock()

    def shown(self, text: str) -> None:
        """Write output, in pieces of any size; all of it, also what the screen leaves out."""
        plain = without_colour(text)
        if not plain:
            return
        self._line_open, was_open = not plain.endswith("\n"), self._line_open
        lines = plain if self._line_open else plain[:-1]
        start = "" if was_open else "# "
        end = "" if self._line_open else "\n"
        self._file.write(start + lines.replace("\n", "\n# ") + end)

    def close(self) -> None:
        """Write what is left."""
        self._end_line()
        self._file.close()

    def _end_line(self) -> None:
        if self._line_open:
            self._file.write("\n")
            self._line_open = False
