"""Where the readers of a stream come from: a FIFO, or a Unix stream socket."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from kgdbx.trace.errors import TraceError

__all__ = ("Endpoint", "FifoEndpoint", "SocketEndpoint")

_MODE = 0o600
_BACKLOG = 64
# What the system may hold for one reader; it gives less where its limits are lower.
_SYSTEM_BYTES = 1 << 20


class Endpoint(Protocol):
    """A path that readers open."""

    @property
    def path(self) -> Path:
        """What readers open."""

    @property
    def listener(self) -> int | None:
        """File descriptor that is readable when a reader comes; None if one has to try."""

    def accept(self, connected: int) -> Iterator[int]:
        """File descriptors of new readers, non-blocking; they are the caller's to close.

        :param connected: how many readers there are
        """

    def close(self) -> None:
        """Take no more readers, and remove the path if it was made here."""


class FifoEndpoint:
    """A named FIFO: one reader at a time; each that comes after another gets a whole stream.

    :param path: made with mode 0600, or an existing FIFO of this user, which then stays; None for
        a new one in a directory that only this user can enter
    :raises TraceError: if there is something else at the path
    """

    listener = None

    def __init__(self, path: Path | None = None) -> None:
        self._place = _Place(path, "fifo")
        self.path = self._place.path
        with self._place.making():
            try:
                os.mkfifo(self.path, _MODE)
                self._place.made()
            except FileExistsError:
                self._check(self.path.lstat())

    def accept(self, connected: int) -> Iterator[int]:
        """The reader, once it has opened the FIFO."""
        if connected:
            return
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            number = os.open(self.path, flags)
        except OSError as e:
            if e.errno in (errno.ENXIO, errno.ENOENT):  # nobody reads; removed by somebody
                return
            raise
        try:
            self._check(os.fstat(number))
        except TraceError:
            os.close(number)
            raise
        with contextlib.suppress(PermissionError):  # over the limit of this user: as it was
            fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, _SYSTEM_BYTES)
        yield number

    def close(self) -> None:
        """Remove the FIFO, if it was made here."""
        self._place.remove()

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISFIFO(status.st_mode):
            raise TraceError(f"{self.path}: exists and is no FIFO; give another path")
        if status.st_uid != os.geteuid():
            raise TraceError(f"{self.path}: the FIFO of another user")


class SocketEndpoint:
    """A Unix stream socket: any number of readers.

    :param path: made with mode 0600; a socket that nobody listens at any more is replaced; None
        for a new one in a directory that only this user can enter
    :raises TraceError: if there is something else at the path
    """

    def __init__(self, path: Path | None = None) -> None:
        self._place = _Place(path, "socket")
        self.path = self._place.path
        with self._place.making():
            self._remove_abandoned()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Before it has a name: then there is no moment with a wider mode.
                os.fchmod(self._socket.fileno(), _MODE)
                self._socket.bind(os.fspath(self.path))
                self._place.made()
                self._socket.listen(_BACKLOG)
                self._socket.setblocking(False)
            except OSError:
                self._socket.close()
                raise

    @property
    def listener(self) -> int:
        """The listening socket."""
        return self._socket.fileno()

    def accept(self, connected: int) -> Iterator[int]:
        """All that have connected."""
        while True:
            try:
                reader, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            reader.setblocking(False)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SYSTEM_BYTES)
            yield reader.detach()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._socket.close()
        self._place.remove()

    def _remove_abandoned(self) -> None:
        try:
            mode = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise TraceError(f"{self.path}: exists and is no socket; give another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(os.fspath(self.path))
            except ConnectionRefusedError:
                self.path.unlink()
                return
            except BlockingIOError:  # its backlog is full: somebody does listen
                pass
        raise TraceError(f"{self.path}: another program listens there; give another path")


class _Place:
    # A path, and what has to be removed of it.

    def __init__(self, path: Path | None, name: str) -> None:
        self._directory: Path | None = None
        if path is None:
            parent = os.environ.get("XDG_RUNTIME_DIR")
            self._directory = Path(tempfile.mkdtemp(prefix="kgdbx-", dir=parent))
            path = self._directory / name
        self.path = path.absolute()
        self._made = -1

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.remove()
            raise TraceError(f"{self.path}: {e.strerror or e}") from e
        except TraceError:
            self.remove()
            raise

    def made(self) -> None:
        # Held open, so that no other file can get the same number meanwhile.
        self._made = os.open(self.path, os.O_PATH | os.O_NOFOLLOW)

    def remove(self) -> None:
        # Only what was made here: the path may be another's by now.
        if self._made >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(self.path.lstat(), os.fstat(self._made)):
                    self.path.unlink()
            os.close(self._made)
            self._made = -1
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):
                self._directory.rmdir()
