"""Memory over KGDB: small packets, and what was read at a stop is kept until the kernel runs."""

from kgdbx.errors import MemoryFault, ProtocolError
from kgdbx.target.kgdb_packets import KgdbPackets
from kgdbx.target.stub import decode_hex

__all__ = ("KgdbMemory", "PACKET_BYTES")

PACKET_BYTES = 496
"""Most memory to ask for or write at once.

KGDB does not check: twice as many digits, address and length must fit into its buffer of 1024
characters (BUFMAX in arch/x86/include/asm/kgdb.h).
"""

_LINE_BYTES = 32
_AHEAD_BYTES = 96


class KgdbMemory:
    """Virtual memory through ``m`` and ``M``, by cache lines where that is safe.

    Memory of devices is mapped among the kernel's vmalloc areas, where a read may have an effect,
    so there only what is asked for is read.
    """

    def __init__(self, connection: KgdbPackets) -> None:
        self._connection = connection
        self._lines: dict[int, bytes] = {}
        self._exact: dict[tuple[int, int], bytes] = {}
        self._ram: tuple[range, ...] = ()

    def read_ahead_in(self, *ram: range) -> None:
        """Say which addresses are RAM and nothing else."""
        self._ram = ram
        self.forget()

    def forget(self) -> None:
        """The kernel runs: nothing that was read counts any more."""
        self._lines.clear()
        self._exact.clear()

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read memory.

        :raises MemoryFault: if any byte cannot be read; KGDB reads no user memory
        """
        if size_bytes == 0:
            return b""
        end = address + size_bytes
        if not any(address in ram and end - 1 in ram for ram in self._ram):
            found = self._exact.get((address, size_bytes))
            if found is None:
                found = self._exact[address, size_bytes] = self._read(address, size_bytes)
            return found
        first = address & -_LINE_BYTES
        data = bytearray()
        for line in range(first, end, _LINE_BYTES):
            if line not in self._lines:
                try:
                    self._fetch(line, end)
                except MemoryFault:
                    raise MemoryFault(address, size_bytes) from None
            data += self._lines[line]
        return bytes(data[address - first : end - first])

    def write(self, address: int, data: bytes) -> None:
        """Write memory.

        :raises MemoryFault: if any byte cannot be written, as in the kernel's text
        """
        self.forget()
        for start in range(0, len(data), PACKET_BYTES):
            part = data[start : start + PACKET_BYTES]
            packet = b"M%x,%x:%b" % (address + start, len(part), part.hex().encode())
            reply, _ = self._connection.exchange(packet, _is_answer)
            if reply != b"OK":
                raise MemoryFault(address, len(data), write=True)
            if self._connection.noisy and self._read(address + start, len(part)) != part:
                raise ProtocolError(f"{len(part)} bytes were not written as sent to {address:#x}")

    def _fetch(self, line: int, end: int) -> None:
        size = (end - line + _LINE_BYTES - 1) & -_LINE_BYTES
        if line - _LINE_BYTES in self._lines:
            size = max(size, _AHEAD_BYTES)  # who reads on goes on reading
        size = min(size, (line | 0xFFF) + 1 - line, PACKET_BYTES & -_LINE_BYTES)
        data = self._read(line, size)
        for start in range(0, size, _LINE_BYTES):
            self._lines[line + start] = data[start : start + _LINE_BYTES]

    def _read(self, address: int, size_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < size_bytes:
            at, size = address + len(data), min(PACKET_BYTES, size_bytes - len(data))

            def valid(reply: bytes, size: int = size) -> bool:
                return len(reply) == 2 * size or _is_error(reply)

            reply = self._connection.read(b"m%x,%x" % (at, size), valid)
            # An error is an E and two decimal digits; data has an even number of digits.
            if _is_error(reply):
                raise MemoryFault(address, size_bytes)
            data += decode_hex(reply)
        return bytes(data)


def _is_error(reply: bytes) -> bool:
    return len(reply) == 3 and reply[:1] == b"E" and reply[1:].isdigit()


def _is_answer(reply: bytes) -> bool:
    return reply == b"OK" or _is_error(reply)
