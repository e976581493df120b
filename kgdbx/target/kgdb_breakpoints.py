"""Breakpoints that KGDB has been given: what its answers mean, and what it does not check."""

import errno
from collections.abc import Iterator

from kgdbx.errors import ProbeError, Unsupported
from kgdbx.target.base import BreakpointKind, check_debug_register
from kgdbx.target.kgdb_packets import KgdbPackets

__all__ = ("KgdbBreakpoints", "MAX_SOFTWARE_BREAKPOINTS")

MAX_SOFTWARE_BREAKPOINTS = 1000
"""``KGDB_MAX_BREAKPOINTS`` in include/linux/kgdb.h.

One that was removed keeps its place for its address until a detach: ``BP_REMOVED`` in
kernel/debug/debug_core.c.
"""

_WATCHES = (BreakpointKind.WATCH_WRITE, BreakpointKind.WATCH_ACCESS)
_THERE_ALREADY = b"E%02d" % errno.EEXIST
_NOT_THERE = b"E%02d" % errno.ENOENT
_FULL = b"E%02d" % errno.E2BIG


class KgdbBreakpoints:
    """The breakpoints of one attachment."""

    def __init__(self, connection: KgdbPackets) -> None:
        self._connection = connection
        self._inserted: set[tuple[BreakpointKind, int, int]] = set()

    def __iter__(self) -> Iterator[tuple[BreakpointKind, int, int]]:
        return iter(tuple(self._inserted))

    def is_at(self, kind: BreakpointKind, address: int) -> bool:
        """Whether there is a breakpoint of a kind at an address."""
        return (kind, address, 1) in self._inserted

    @property
    def watched(self) -> int | None:
        """Address of the one watchpoint; None if there is none."""
        return None if self.watch is None else self.watch[1]

    @property
    def watch(self) -> tuple[BreakpointKind, int, int] | None:
        """Kind, address and size in bytes of the one watchpoint; None if there is none."""
        return next((key for key in self._inserted if key[0] in _WATCHES), None)

    def insert(self, kind: BreakpointKind, address: int, size_bytes: int) -> None:
        """Insert one.

        :raises ProbeError: EBUSY if it is there already, or is a second watchpoint; ENOSPC if all
            are taken; EINVAL if KGDB refuses the place
        :raises Unsupported: for a kind that it does not have
        """
        key = (kind, address, size_bytes)
        if key in self._inserted:
            raise ProbeError(f"there is a {kind.name} breakpoint at {address:#x}", errno.EBUSY)
        if kind is BreakpointKind.WATCH_READ:
            raise Unsupported("x86 does not watch reads alone; watch reads and writes: rw")
        check_debug_register(self._inserted, kind, size_bytes)
        if kind is BreakpointKind.SOFTWARE:
            self._insert_software(address)
        else:
            self._insert_hardware(kind, address, size_bytes)
        self._inserted.add(key)

    def remove(self, kind: BreakpointKind, address: int, size_bytes: int) -> None:
        """Remove one; one that is not there is left alone."""
        key = (kind, address, size_bytes)
        if key not in self._inserted:
            return
        reply, again = self._connection.exchange(b"z" + _place(kind, address, size_bytes), _answer)
        gone = reply == b"OK" or (again and reply in (_NOT_THERE, b"E01"))
        if not gone:
            raise ProbeError(
                f"KGDB does not remove the {kind.name} breakpoint at {address:#x}: {reply!r}"
            )
        self._inserted.discard(key)

    def forget(self) -> None:
        """KGDB has removed them all."""
        self._inserted.clear()

    def _insert_software(self, address: int) -> None:
        place = _place(BreakpointKind.SOFTWARE, address, 1)
        reply, again = self._connection.exchange(b"Z" + place, _answer)
        if reply == _FULL:
            raise ProbeError(
                f"KGDB takes software breakpoints at {MAX_SOFTWARE_BREAKPOINTS} addresses, also of "
                "those that were removed, until it is detached from; detach and attach again",
                errno.ENOSPC,
            )
        if reply != b"OK" and not (again and reply == _THERE_ALREADY):
            raise ProbeError(
                f"KGDB refuses a breakpoint at {address:#x} ({reply.decode()}): it is no kernel "
                "text, or must not be probed; choose a caller",
                errno.EINVAL,
            )

    def _insert_hardware(self, kind: BreakpointKind, address: int, size_bytes: int) -> None:
        if kind in _WATCHES and self.watched is not None:
            raise ProbeError(
                "KGDB does not tell which of several watchpoints was hit; remove the one at "
                f"{self.watched:#x} first",
                errno.EBUSY,
            )
        place = _place(kind, address, size_bytes)
        while True:
            reply, again = self._connection.exchange(b"Z" + place, _answer)
            if reply != b"OK":
                raise ProbeError(
                    f"KGDB refuses a {kind.name} breakpoint of {size_bytes} bytes at {address:#x}; "
                    "it takes 1, 2, 4 or 8, aligned, and four in all",
                    errno.ENOSPC,
                )
            if not again:
                return
            # Carried out twice it has taken two debug registers.
            while self._connection.exchange(b"z" + place, _answer)[0] == b"OK":
                pass


def _place(kind: BreakpointKind, address: int, size_bytes: int) -> bytes:
    return b"%d,%x,%x" % (kind, address, size_bytes)


def _answer(reply: bytes) -> bool:
    return reply in (b"", b"OK") or (len(reply) == 3 and reply[:1] == b"E")
