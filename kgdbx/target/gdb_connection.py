"""gdb's own connection to a stub: packets past gdb, commands to gdb, and whether it is alive."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import gdb

from kgdbx.errors import ProtocolError, TargetError, TargetLost
from kgdbx.target import stub

__all__ = ("GdbConnection", "quiet")

_ESCAPED = re.compile(rb"\}(.)", re.DOTALL)


class GdbConnection:
    """The connection of the inferior that gdb has selected.

    :param address: what ``target remote`` takes; None for the connection that gdb has
    :ivar name: where it leads, for messages
    :raises TargetError: if gdb is not connected to a stub, or cannot be
    """

    def __init__(self, address: str | None) -> None:
        self._is_ours = address is not None
        self._connection = _connect(address)
        self.name = str(self._connection.details)
        self._exited = False
        gdb.events.exited.connect(self._on_exited)

    @property
    def exited(self) -> bool:
        """Whether the guest has shut down."""
        return self._exited

    @property
    def alive(self) -> bool:
        """Whether gdb is connected, to a guest that has not shut down."""
        return bool(self._connection.is_valid()) and not self._exited

    @property
    def running(self) -> bool:
        """Whether gdb takes the guest to run."""
        if not self.alive:
            return False
        thread = gdb.selected_thread()
        return thread is not None and bool(thread.is_running())

    def threads(self) -> dict[int, bytes]:
        """What packets call each vCPU, by its number: QEMU counts its threads from 1."""
        ids = (thread.ptid for thread in gdb.selected_inferior().threads())
        return {max(0, lwp - 1): b"p%x.%x" % (pid, lwp) for pid, lwp, _ in ids}

    def selected_cpu(self) -> int:
        """vCPU number of the thread that gdb has selected.

        :raises TargetLost: if there is none
        """
        thread = gdb.selected_thread()
        if thread is None:
            raise TargetLost(f"the guest at {self.name} is gone")
        return max(0, int(thread.ptid[1]) - 1)

    def select(self, cpu: int) -> None:
        """Have gdb's user look at the thread of a vCPU."""
        for thread in gdb.selected_inferior().threads():
            if max(0, int(thread.ptid[1]) - 1) == cpu:
                thread.switch()

    def max_packet_bytes(self) -> int:
        """Largest packet that the stub takes.

        :raises ProtocolError: if it does not say
        """
        packet_bytes = stub.max_packet_bytes(self.exchange(b"qSupported"))
        if packet_bytes is None:
            raise ProtocolError(f"{self.name} does not say its packet size; is this a gdb stub?")
        return packet_bytes

    def exchange(self, packet: bytes) -> bytes:
        """Send a packet; the stub's answer.

        :raises TargetLost: if the guest is gone
        :raises TargetError: if gdb does not send it
        """
        try:
            reply = self._connection.send_packet(packet) or b""
        except (gdb.error, RuntimeError) as e:
            raise self._translated(e) from e
        return _ESCAPED.sub(lambda m: bytes((m[1][0] ^ 0x20,)), reply) if b"}" in reply else reply

    def expect_ok(self, packet: bytes) -> None:
        """Send a packet that is to be answered ``OK``.

        :raises ProtocolError: if it is not
        """
        reply = self.exchange(packet)
        if reply != b"OK":
            raise ProtocolError(f"the stub answers {reply!r} to {packet!r}")

    def execute(self, command: str) -> str:
        """Have gdb execute a command.

        :return: what was written meanwhile, but for what gdb says of stops
        :raises TargetLost: if the guest is gone
        :raises TargetError: if the command fails
        """
        try:
            return str(gdb.execute(command, to_string=True))
        except gdb.error as e:
            raise self._translated(e) from e

    def leave(self, *, resume: bool) -> None:
        """Let the guest run on without gdb, or leave it standing; then a connection that gdb had
        before stays.

        :raises gdb.error: if gdb cannot
        """
        if resume:
            gdb.execute("detach", to_string=True)
        elif self._is_ours:
            gdb.execute("disconnect", to_string=True)

    def close(self) -> None:
        """Listen to gdb no more."""
        gdb.events.exited.disconnect(self._on_exited)

    def _on_exited(self, event: Any) -> None:
        self._exited = True

    def _translated(self, error: Exception) -> TargetError:
        if not self.alive:
            return TargetLost(f"the guest at {self.name} is gone: {error}")
        return TargetError(f"gdb: {error}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While the block runs, gdb 13 and newer do not tell of stops: that goes past ``to_string``."""
    try:
        before = gdb.parameter("suppress-cli-notifications")
    except RuntimeError:
        yield
        return
    gdb.execute("set suppress-cli-notifications on", to_string=True)
    try:
        yield
    finally:
        gdb.execute(f"set suppress-cli-notifications {'on' if before else 'off'}", to_string=True)


def _connect(address: str | None) -> Any:
    if address is not None:
        try:
            gdb.execute(f"target remote {address}", to_string=True)
        except gdb.error as e:
            raise TargetError(f"cannot connect to {address}: {e}; is the VM running?") from e
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        raise TargetError("gdb is not connected to a stub; use 'target remote' first")
    return connection
