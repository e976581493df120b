"""Ends a wait from a signal handler or another thread."""

import contextlib
import os

__all__ = ("Wake",)


class Wake:
    """A pipe that is readable after a :meth:`set`, until it is cleared."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._set = False

    @property
    def is_set(self) -> bool:
        """Whether there was a :meth:`set` since the last :meth:`clear`."""
        return self._set

    def fileno(self) -> int:
        """What to poll for reading; -1 when closed."""
        return self._read

    def set(self) -> None:
        """End each wait; may be called from a signal handler or a thread."""
        self._set = True
        if self._write >= 0:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
                os.write(self._write, b"w")

    def clear(self) -> None:
        """Let it be waited again."""
        self._set = False
        if self._read >= 0:
            with contextlib.suppress(BlockingIOError):
                while os.read(self._read, 64):
                    pass

    def close(self) -> None:
        """Close the pipe; does nothing the second time."""
        if self._read >= 0:
            os.close(self._read)
            os.close(self._write)
            self._read = self._write = -1
