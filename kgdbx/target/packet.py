"""Packets of the gdb remote serial protocol over a byte stream.

"Overview" and "Packets" in the gdb manual's appendix "gdb Remote Serial Protocol".
"""

import re
import select
import socket
import time

from kgdbx.errors import ProtocolError, TargetError, TargetLost, TargetTimeout
from kgdbx.target.wake import Wake

__all__ = ("PacketConnection", "connect_stream")

_MAX_PACKET_BYTES = 1 << 20
_MAX_RETRANSMITS = 5
_SPIN_S = 0.002
_RUN_LENGTH = re.compile(rb"(.)\*([ -~])", re.DOTALL)


def connect_stream(address: str, timeout_s: float) -> socket.socket:
    """Open a stream socket.

    :param address: path of a Unix socket, or ``host:port``
    :param timeout_s: seconds to wait for the connection
    :raises TargetError: if nothing listens there
    """
    host, colon, port = address.rpartition(":")
    try:
        if "/" not in address and colon and port.isdigit():
            where = (host.strip("[]") or "localhost", int(port))
            stream = socket.create_connection(where, timeout_s)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                stream.settimeout(timeout_s)
                stream.connect(address)
            except OSError:
                stream.close()
                raise
    except OSError as e:
        raise TargetError(
            f"cannot connect to {address}: {e.strerror or e}; is the machine running, with a "
            "stub or its line on this address and nobody else connected?"
        ) from e
    return stream


class PacketConnection:
    """Sends and receives checked packets.

    An acknowledgment goes out together with the next packet. QEMU takes any byte that arrives
    while the VM runs for a break-in, so the last reply before a resume must stay unacknowledged;
    QEMU allows that (gdb_read_byte() in gdbstub/gdbstub.c).

    :param stream: a connected socket, owned from now on
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._stream.settimeout(None)
        self._buffer = bytearray()
        self._unacknowledged = False
        self._last_sent = b""
        self._wake = Wake()
        self._spin_end = self._sent = 0.0
        self._stops_come_soon = True
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)
        self._poll_wake = select.poll()
        self._poll_wake.register(stream, select.POLLIN)
        self._poll_wake.register(self._wake.fileno(), select.POLLIN)
        self.packets_sent = 0

    def send(self, *payloads: bytes) -> None:
        """Send packets in one write; their replies come in the same order.

        :raises TargetLost: if the peer is gone
        """
        message = bytearray()
        for payload in payloads:
            if self._unacknowledged:
                message += b"+"
            message += b"$%b#%02x" % (payload, sum(payload) & 0xFF)
            self._unacknowledged = True  # by the time the next one is read, this one is answered
        self._unacknowledged = False
        self._last_sent = bytes(message)
        self.packets_sent += len(payloads)
        self.send_raw(self._last_sent)

    def send_raw(self, data: bytes) -> None:
        """Send bytes outside of any packet, such as the break-in ``0x03``.

        :raises TargetLost: if the peer is gone
        """
        if self._stream.fileno() < 0:
            raise TargetLost("the connection to the stub is closed")
        try:
            self._stream.sendall(data)
        except OSError as e:
            raise TargetLost(f"the connection to the stub is gone: {e.strerror}") from e
        self._sent = time.monotonic()
        self._spin_end = self._sent + _SPIN_S

    def receive(self, timeout_s: float) -> bytes:
        """The payload of the next packet, unescaped.

        :param timeout_s: seconds to wait for the whole packet
        :raises TargetTimeout: if the packet is not complete in time
        :raises TargetLost: if the peer closes the connection
        :raises ProtocolError: if what comes is no packet, again and again
        """
        packet = self._receive(time.monotonic() + timeout_s, self._poll)
        if packet is None:
            raise TargetTimeout(f"no answer from the stub within {timeout_s:g} s")
        return packet

    def receive_or_wake(self, timeout_s: float | None) -> bytes | None:
        """Like :meth:`receive`, but None when the time passes, or at once after a :meth:`wake`
        that is not forgotten.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return self._receive(deadline, self._poll_wake)

    @property
    def woken(self) -> bool:
        """Whether there was a :meth:`wake` since the last :meth:`forget_wake`."""
        return self._wake.is_set

    def wake(self) -> None:
        """End each :meth:`receive_or_wake`; may be called from a signal handler or a thread."""
        self._wake.set()

    def forget_wake(self) -> None:
        """Let :meth:`receive_or_wake` wait again."""
        self._wake.clear()

    def close(self) -> None:
        """Close the socket; does nothing the second time."""
        if self._stream.fileno() >= 0:
            self._stream.close()
            self._wake.close()

    def _receive(self, deadline: float | None, poll: select.poll) -> bytes | None:
        naks = 0
        while True:
            packet, good = self._take_packet()
            if packet is not None and good:
                self._unacknowledged = True
                if packet[:1] in (b"T", b"S"):  # a stop
                    self._stops_come_soon = time.monotonic() - self._sent < _SPIN_S
                return packet
            if packet is not None:
                naks += 1
                if naks > _MAX_RETRANSMITS:
                    raise ProtocolError(f"the stub sent {naks} packets with a wrong checksum")
                self.send_raw(b"-")
                continue
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._stream.fileno() < 0:
                raise TargetLost("the connection to the stub is closed")
            # With one answer after the other there would be no time to see the deadline.
            asked = poll is self._poll_wake and (self._wake.is_set or remaining == 0)
            spins = self._stops_come_soon or poll is not self._poll_wake
            if spins and not asked and self._spin(deadline):
                continue
            ready = poll.poll(None if remaining is None else remaining * 1000)
            if not ready or any(fd == self._wake.fileno() for fd, _ in ready):
                return None
            self._fill()

    def _spin(self, deadline: float | None) -> bool:
        # Whether something came at once. To be woken takes longer than most answers do, and many
        # stops; a peer that has not answered by then is not waited for like this a second time,
        # nor is the stop after one that took its time: the guest needs the CPU more.
        end = self._spin_end if deadline is None else min(self._spin_end, deadline)
        while time.monotonic() < end:
            try:
                data = self._stream.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError as e:
                raise TargetLost(f"the connection to the stub is gone: {e.strerror}") from e
            self._add(data)
            return True
        return False

    def _fill(self) -> None:
        try:
            data = self._stream.recv(1 << 16)
        except OSError as e:
            raise TargetLost(f"the connection to the stub is gone: {e.strerror}") from e
        self._add(data)

    def _add(self, data: bytes) -> None:
        if not data:
            raise TargetLost("the stub closed the connection: the VM has ended or was killed")
        self._spin_end = time.monotonic() + _SPIN_S
        self._buffer += data
        if len(self._buffer) > _MAX_PACKET_BYTES:
            self._buffer.clear()
            raise ProtocolError("the stub sends an endless packet; is this a gdb stub?")

    def _take_packet(self) -> tuple[bytes | None, bool]:
        # One packet off the buffer: (payload, checksum right), or (None, False) if incomplete.
        buffer = self._buffer
        start = buffer.find(b"$")
        if start < 0:
            if b"-" in buffer:
                self._retransmit()
            if len(buffer) > 4096:
                buffer.clear()
                raise ProtocolError("the stub sends no packets; is this a gdb stub?")
            return None, False
        end = buffer.find(b"#", start)
        if end < 0 or len(buffer) < end + 3:
            return None, False
        body = bytes(buffer[start + 1 : end])
        digits = bytes(buffer[end + 1 : end + 3])
        del buffer[: end + 3]
        try:
            good = int(digits, 16) == sum(body) & 0xFF
        except ValueError:
            good = False
        return (_decode(body) if good else body), good

    def _retransmit(self) -> None:
        self._buffer.clear()
        self.send_raw(self._last_sent)


def _decode(body: bytes) -> bytes:
    # Run-length encoding and escapes: "Overview" in the manual's appendix.
    if b"*" in body:
        body = _RUN_LENGTH.sub(lambda m: m[1] * (1 + m[2][0] - 29), body)
    if b"}" in body:
        body = re.sub(rb"\}(.)", lambda m: bytes((m[1][0] ^ 0x20,)), body, flags=re.DOTALL)
    return body
