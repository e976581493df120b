"""A terminal with a program in it: keys go in, the screen can be looked at."""

import copy
import fcntl
import os
import signal
import struct
import subprocess
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyte

__all__ = ("Terminal",)


class _Screen(pyte.HistoryScreen):
    # pyte has no alternate screen, and leaves its answers to the caller.

    def __init__(self, columns: int, lines: int, answer: Callable[[bytes], None]) -> None:
        self._answer = answer
        self._saved: Any = None
        super().__init__(columns, lines, history=200_000, ratio=0.5)

    def write_process_input(self, data: str) -> None:
        self._answer(data.encode())

    def set_mode(self, *modes: int, **options: Any) -> None:
        super().set_mode(*modes, **options)
        if 1049 in modes and self._saved is None:
            self._saved = (copy.deepcopy(self.buffer), copy.copy(self.cursor))
            self.erase_in_display(2)
            self.cursor_position()

    def reset_mode(self, *modes: int, **options: Any) -> None:
        super().reset_mode(*modes, **options)
        if 1049 in modes and self._saved is not None:
            self.buffer, self.cursor = self._saved
            self._saved = None
            self.dirty.update(range(self.lines))


class Terminal:
    """Runs a program in a pseudo terminal that pyte shows.

    One thread notes when bytes come, another one shows them: the first does not wait for pyte.

    :param columns: width of the window
    :param rows: height of the window
    :param environment: variables beside those of this process
    :ivar screen: pyte's screen; use it under :attr:`lock`
    :ivar stamp: what is noted of a moment, see :meth:`answer`; seconds
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        columns: int = 80,
        rows: int = 24,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.lock = threading.Condition()
        self.stamp: Callable[[], tuple[float, ...]] = lambda: (time.monotonic(),)
        self._master, slave = os.openpty()
        self._set_size(columns, rows)
        self.screen = _Screen(columns, rows, self._write)
        self._stream = pyte.ByteStream(self.screen)
        self.process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color"} | (environment or {}),
        )
        os.close(slave)
        self._pieces: deque[tuple[tuple[float, ...], bytes]] = deque()
        self._piece = threading.Semaphore(0)
        self._awaited: Callable[[Sequence[str]], bool] | None = None
        self._came: tuple[float, ...] = ()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._read, self._show)
        ]
        for thread in self._threads:
            thread.start()

    def type(self, keys: str) -> None:
        """Press keys."""
        self._write(keys.encode())

    def line(self, text: str) -> None:
        """Type a line, as pasted, and press Enter."""
        self.type(f"{text}\r")

    def display(self) -> list[str]:
        """The lines of the screen."""
        with self.lock:
            return [line.rstrip() for line in self.screen.display]

    def scrollback(self) -> list[str]:
        """All lines from the first on."""
        with self.lock:
            above = [
                "".join(row[n].data for n in range(self.screen.columns)).rstrip()
                for row in self.screen.history.top
            ]
        return above + self.display()

    def wait(self, what: str | Callable[[], bool], timeout_s: float = 60) -> float:
        """Wait until the screen has a text, or a condition holds.

        :return: seconds that it took
        """
        start = time.monotonic()
        holds = what if callable(what) else lambda: any(what in each for each in self.display())
        while not holds():
            with self.lock:
                self.lock.wait(0.1)
            missing = time.monotonic() - start > timeout_s or self.process.poll() is not None
            if missing and not holds():
                text = "\n".join(self.scrollback()[-60:])
                raise AssertionError(
                    f"{what!r} does not come; status {self.process.poll()}; the screen:\n{text}"
                )
        return time.monotonic() - start

    def answer(
        self, keys: str, holds: Callable[[Sequence[str]], bool], timeout_s: float = 10
    ) -> tuple[float, ...]:
        """Press keys, and wait for the output that answers them.

        :param holds: called with the lines that some output has changed; whether it is that
        :return: differences of :attr:`stamp`, from the keys to the arrival of that output
        :raises TimeoutError: if it does not come
        """
        with self.lock:
            self._awaited, self._came = holds, ()
        before = self.stamp()
        self.type(keys)
        with self.lock:
            self.lock.wait_for(lambda: self._came, timeout_s)
            self._awaited = None
            if not self._came:
                raise TimeoutError(f"no answer to {keys!r} in {timeout_s:g} s")
            return tuple(b - a for a, b in zip(before, self._came, strict=True))

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the window."""
        with self.lock:
            self.screen.resize(rows, columns)
        self._set_size(columns, rows)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def end(self, timeout_s: float = 30) -> int:
        """Wait for the end of the program; its exit status."""
        status = self.process.wait(timeout_s)
        self._join()
        return status

    def close(self) -> None:
        """End the program, however it is."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._join()
        os.close(self._master)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(5)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _write(self, data: bytes) -> None:
        os.write(self._master, data)

    def _read(self) -> None:
        data = b"anything"
        while data:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:
                data = b""
            self._pieces.append((self.stamp(), data))
            self._piece.release()

    def _show(self) -> None:
        while True:
            self._piece.acquire()
            stamp, data = self._pieces.popleft()
            if not data:
                return
            with self.lock:
                self.screen.dirty.clear()
                self._stream.feed(data)
                if self._awaited is not None and not self._came:
                    lines = [self._line(row) for row in sorted(self.screen.dirty)]
                    if self._awaited(lines):
                        self._came = stamp
                self.lock.notify_all()

    def _line(self, row: int) -> str:
        cells = self.screen.buffer[row]
        return "".join(cells[column].data for column in range(self.screen.columns))
