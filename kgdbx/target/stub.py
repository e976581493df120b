"""What a stub's answers mean, whoever carries the packets."""

import re
from collections.abc import Callable

from kgdbx.arch.registers import DEFAULT_LAYOUT, RegisterLayout
from kgdbx.errors import MemoryFault, ProtocolError, Unsupported
from kgdbx.target.base import Stop, StopReason

__all__ = (
    "Exchange",
    "STEP_TRIES",
    "cpu_of",
    "decode_hex",
    "flush_translations",
    "max_packet_bytes",
    "parse_stop",
    "read_layout",
    "read_memory",
    "write_memory",
)

Exchange = Callable[[bytes], bytes]

STEP_TRIES = 3
"""How often to step a vCPU that has not moved.

QEMU reports a vCPU again that reached a breakpoint while another one's was being reported, and
such a report ends a step before it has begun (``debug_requested`` in system/runstate.c).
"""

_WATCH_KEYS = ("watch", "rwatch", "awatch")
_REASONS = {0: StopReason.INTERRUPT, 2: StopReason.INTERRUPT, 5: StopReason.TRAP}
_DESCRIPTION_BYTES = 1 << 20
_PAGE_BYTES = 4096


def parse_stop(packet: bytes) -> Stop:
    """Read a stop reply ("Stop Reply Packets" in the gdb manual's appendix).

    :raises ProtocolError: if it is none
    """
    if packet[:1] in (b"W", b"X"):
        return Stop(0, StopReason.EXITED, signal=0)
    try:
        if packet[:1] not in (b"T", b"S"):
            raise ValueError
        signal = int(packet[1:3], 16)
        fields = dict(
            field.split(":", 1) for field in packet[3:].decode("ascii").split(";") if field
        )
        cpu = cpu_of(fields.get("thread", "1").encode())
        for key in _WATCH_KEYS:
            if key in fields:
                return Stop(cpu, StopReason.WATCHPOINT, int(fields[key], 16), signal)
    except ValueError as e:
        raise ProtocolError(f"the stub answers {packet[:60]!r} for a stop") from e
    return Stop(cpu, _REASONS.get(signal, StopReason.SIGNAL), None, signal)


def cpu_of(thread: bytes) -> int:
    """vCPU number of a thread such as ``p01.02`` or ``2``: QEMU counts them from 1."""
    return max(0, int(thread.rpartition(b".")[2], 16) - 1)


def decode_hex(data: bytes) -> bytes:
    """Bytes of a hex answer; unavailable ones (``xx``) are 0.

    :raises ProtocolError: if it is not hex
    """
    try:
        return bytes.fromhex(data.decode("ascii").replace("x", "0"))
    except ValueError as e:
        raise ProtocolError(f"the stub answers {data[:40]!r} where hex digits belong") from e


def max_packet_bytes(reply: bytes) -> int | None:
    """Largest packet that the stub takes, by its answer to ``qSupported``; None if it is none."""
    size = re.search(rb"PacketSize=([0-9a-fA-F]+)", reply)
    return max(256, min(int(size[1], 16), 1 << 16)) if size else None


def read_memory(
    exchange: Exchange, packet_bytes: int, address: int, size_bytes: int, *, physical: bool = False
) -> bytes:
    """Read memory in as many packets as it takes.

    :param exchange: sends a packet and gives the answer
    :param packet_bytes: largest packet that the stub takes
    :param physical: what a :class:`~kgdbx.errors.MemoryFault` says
    :raises MemoryFault: if any byte cannot be read
    """
    data = bytearray()
    chunk = (packet_bytes - 16) // 2
    while len(data) < size_bytes:
        want = min(chunk, size_bytes - len(data))
        reply = exchange(b"m%x,%x" % (address + len(data), want))
        if reply.startswith(b"E") or not reply:
            raise MemoryFault(address, size_bytes, physical=physical)
        part = decode_hex(reply)
        if len(part) > want:
            raise ProtocolError(f"the stub answered {len(part)} bytes where {want} were asked")
        data += part
    return bytes(data)


def write_memory(
    exchange: Exchange, packet_bytes: int, address: int, data: bytes, *, physical: bool = False
) -> None:
    """Write memory in as many packets as it takes; see :func:`read_memory`.

    :raises MemoryFault: if any byte cannot be written
    """
    chunk = (packet_bytes - 48) // 2
    for offset in range(0, len(data), chunk):
        part = data[offset : offset + chunk]
        packet = b"M%x,%x:%b" % (address + offset, len(part), part.hex().encode())
        if exchange(packet) != b"OK":
            raise MemoryFault(address, len(data), physical=physical, write=True)


def flush_translations(exchange: Exchange) -> None:
    """Have every vCPU forget the address translations that it has cached.

    QEMU's TCG drops them all when a watchpoint that crosses a page is inserted
    (cpu_watchpoint_insert() in system/watchpoint.c).

    :raises Unsupported: if the stub has no such watchpoints
    """
    crossing = b"2,%x,10" % (_PAGE_BYTES - 8)
    if exchange(b"Z" + crossing) != b"OK" or exchange(b"z" + crossing) != b"OK":
        raise Unsupported("the stub has no way to flush translations")


def read_layout(exchange: Exchange, packet_bytes: int) -> RegisterLayout:
    """Ask for the stub's target description.

    :param exchange: sends a packet and gives the answer
    :param packet_bytes: largest packet that the stub takes
    :raises ProtocolError: if it makes no sense
    """
    target = _transfer(exchange, packet_bytes, "target.xml")
    if not target:
        return DEFAULT_LAYOUT
    includes = re.findall(r'<xi:include href="([^"]+)"', target)
    documents = [_transfer(exchange, packet_bytes, name) for name in includes] or [target]
    return RegisterLayout.from_target_xml(documents)


def _transfer(exchange: Exchange, packet_bytes: int, annex: str) -> str:
    data = b""
    while len(data) < _DESCRIPTION_BYTES:
        offset_length = b"%x,%x" % (len(data), packet_bytes - 16)
        reply = exchange(b"qXfer:features:read:%b:%b" % (annex.encode(), offset_length))
        data += reply[1:]
        if not reply.startswith(b"m"):
            return data.decode("ascii", "replace") if reply.startswith(b"l") else ""
    raise ProtocolError(f"the stub's target description {annex} has no end")
