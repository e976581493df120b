"""How far something has come, shown on a terminal only."""

import sys
from collections.abc import Callable

__all__ = ("Progress", "terminal_count", "terminal_progress")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done and how much there is, in bytes."""

_WIDTH = 30


def terminal_progress(label: str, done_bytes: int, total_bytes: int) -> None:
    """Draw the bar on standard error if that is a terminal, otherwise do nothing."""
    if not sys.stderr.isatty():
        return
    done = min(done_bytes, total_bytes)
    filled = _WIDTH * done // total_bytes if total_bytes else _WIDTH
    bar = "#" * filled + "-" * (_WIDTH - filled)
    sys.stderr.write(f"\r\x1b[K{label} [{bar}] {done >> 20}/{total_bytes >> 20} MiB")
    if done >= total_bytes:
        sys.stderr.write("\n")
    sys.stderr.flush()


def terminal_count(what: str, done: int, *, ended: bool = False) -> None:
    """Say how much is done of what nobody knows the end of, as :func:`terminal_progress` does.

    :param what: what is counted, such as ``files compiled``
    :param ended: nothing more comes
    """
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{done} {what}" + ("\n" if ended else ""))
        sys.stderr.flush()
