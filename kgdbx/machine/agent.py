"""Run commands in the guest: the host's side of ``vm/agent.c``.

Nothing here needs the guest to run: bytes wait in the socket while a debugger holds it, and each
:meth:`Command.poll` takes what has come since.
"""

import contextlib
import dataclasses
import re
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kgdbx.errors import MachineError
from kgdbx.machine.cache import locked

__all__ = ("Agent", "Command", "Completed")

_FRAME = re.compile(rb"\x01kx ([0-9a-f]{16}) ([ox]) (\d{1,8})\n")
_LONGEST_HEADER = 40
_SLICE_S = 0.05
_RESEND_S = 0.25
_TURN_S = 30.0
_KILL_S = 1.0
# Linux refuses a longer argument of a program.
_LONGEST_COMMAND = 100_000


@dataclasses.dataclass(frozen=True)
class Completed:
    """A command that has ended.

    :ivar status: exit status; 128 + N if signal N ended it
    :ivar output: what it wrote, standard output and error together
    """

    status: int
    output: str


class Command:
    """A command that was started in the guest."""

    def __init__(self, agent: "Agent", identity: str, text: str) -> None:
        self._agent = agent
        self._identity = identity
        self._text = text
        self._output = bytearray()
        self._status: int | None = None

    @property
    def output(self) -> bytes:
        """What it has written so far, as far as :meth:`poll` or :meth:`wait` took it in."""
        return bytes(self._output)

    def poll(self) -> int | None:
        """Its exit status, or None while it has not ended; never blocks."""
        if self._status is None:
            self._agent.pump(0)
        return self._status

    def wait(self, timeout_s: float = 30.0) -> Completed:
        """Wait until it has ended.

        :param timeout_s: seconds to wait; the guest must be running for it to end
        :raises MachineError: if it has not ended then, or the VM is gone. It can be waited for
            again
        """
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise MachineError(
                    f"'{self._text}' in VM {self._agent.name} has not ended after {timeout_s:g} s; "
                    "does a debugger hold the guest, or did its kernel die? see "
                    f"{self._agent.console}"
                )
            self._agent.pump(min(left, _SLICE_S))
        assert self._status is not None
        return Completed(self._status, self._output.decode(errors="replace"))

    def kill(self) -> None:
        """Send SIGKILL to it and its children; it still has to be waited for."""
        if self._status is None:
            self._agent.send(f"\nkill {self._identity}\n")

    def discard(self) -> None:
        """Kill it and wait for it no longer; a guest that stands still may never kill it."""
        if self._status is None:
            self.kill()
            # QEMU drops what it has not read yet when the connection closes.
            with contextlib.suppress(MachineError):
                self.wait(_KILL_S)
            self._agent.forget(self._identity)

    # Called by the agent's pump.
    def _take(self, kind: bytes, data: bytes) -> None:
        if kind == b"o":
            self._output += data
        else:
            self._status = int(data)


class Agent:
    """Connection to a guest's agent; open only while commands are under way, so that other
    processes get their turn.

    :param socket_path: the serial port's Unix socket
    :param console: file to name in messages
    :param alive: tells whether the VM still runs
    """

    def __init__(
        self, name: str, socket_path: Path, console: Path, alive: Callable[[], bool]
    ) -> None:
        self.name = name
        self.console = console
        self._path = socket_path
        self._alive = alive
        self._lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._connection = contextlib.ExitStack()
        self._commands: dict[str, Command] = {}
        self._received = bytearray()
        self._unsent = bytearray()

    def start(self, text: str) -> Command:
        """Start a command with the guest's ``/bin/sh``.

        :raises MachineError: if the VM is gone, or another process uses its agent for too long
        """
        if len(text.encode()) > _LONGEST_COMMAND:
            raise MachineError(
                f"a command of {len(text)} characters is too long; pack it into the guest as a file"
            )
        with self._lock:
            self._connect()
            identity = secrets.token_hex(8)
            command = self._commands[identity] = Command(self, identity, text)
            # The newline ends whatever noise came before.
            self.send(f"\nrun {identity} {text.encode().hex()}\n")
            return command

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the agent answers. What comes before it listens is lost, so ask repeatedly.

        :param timeout_s: seconds to wait
        :raises MachineError: if it does not answer in that time, or the VM is gone
        """
        with self._lock:
            ping = self.start("")
            deadline = time.monotonic() + timeout_s
            try:
                while True:
                    try:
                        ping.wait(min(_RESEND_S, max(0.0, deadline - time.monotonic())))
                        return
                    except MachineError:
                        if not self._alive() or time.monotonic() >= deadline:
                            raise
                        self.send(f"\nrun {ping._identity} \n")
            finally:
                self.forget(ping._identity)

    def send(self, text: str) -> None:
        """Queue a line for the guest; it goes out as the guest takes it."""
        with self._lock:
            self._unsent += text.encode()
            self.pump(0)

    def pump(self, timeout_s: float) -> None:
        """Take in what the guest sent, waiting up to *timeout_s* seconds for something to come.

        :raises MachineError: if the VM is gone
        """
        with self._lock:
            if self._socket is None:
                raise self._gone()
            wants_write = [self._socket] if self._unsent else []
            readable, writable, _ = select.select([self._socket], wants_write, [], timeout_s)
            try:
                if writable:
                    del self._unsent[: self._socket.send(self._unsent)]
                data = self._socket.recv(1 << 20) if readable else None
            except OSError:
                data = b""
            if data == b"":
                self._disconnect()
                raise self._gone()
            self._received += data or b""
            self._dispatch()

    def forget(self, identity: str) -> None:
        """Drop a command; whatever it still sends is ignored."""
        with self._lock:
            self._commands.pop(identity, None)
            if not self._commands:
                self._disconnect()

    def close(self) -> None:
        """Disconnect; does nothing the second time."""
        with self._lock:
            self._disconnect()

    def _dispatch(self) -> None:
        while match := _FRAME.search(self._received):
            # Taken out at once: a match reads from the bytes that are deleted below.
            identity, kind, size = match[1].decode(), match[2], int(match[3])
            start, end = match.end(), match.end() + size
            if len(self._received) < end:
                return
            data = bytes(self._received[start:end])
            del self._received[:end]
            command = self._commands.get(identity)
            if command is not None:
                command._take(kind, data)
                if kind == b"x":
                    self.forget(identity)
        # Noise, such as the end of a frame for a process that went away.
        start = self._received.rfind(b"\x01", -_LONGEST_HEADER)
        del self._received[: start if start >= 0 else len(self._received)]

    def _connect(self) -> None:
        if self._socket is not None:
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._path.with_suffix(".lock"), _TURN_S))
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                connection.connect(str(self._path))
            except OSError as e:
                raise self._gone() from e
            connection.setblocking(False)
            self._socket = connection
            self._connection = stack.pop_all()

    def _disconnect(self) -> None:
        self._commands.clear()
        self._received.clear()
        self._unsent.clear()
        self._socket = None
        self._connection.close()

    def _gone(self) -> MachineError:
        return MachineError(f"VM {self.name} is gone; its last words are in {self.console}")
