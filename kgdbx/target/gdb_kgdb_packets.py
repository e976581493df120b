"""Packets to KGDB over gdb's own connection, which leave gdb's idea of it true."""

from collections.abc import Callable

import gdb

from kgdbx.errors import ProtocolError
from kgdbx.target.kgdb_packets import Valid

__all__ = ("GdbKgdbPackets",)

_ABOUT_REGISTERS = b"gpP"
_STOPPED = b"Hg0"  # getthread() in kernel/debug/gdbstub.c: the CPU that stopped


def _anything(reply: bytes) -> bool:
    return True


class GdbKgdbPackets:
    """What :class:`~kgdbx.target.kgdb_packets.KgdbConnection` is on a line of ours.

    gdb remembers which thread it has selected by ``Hg``. What is selected here lasts for the
    packets that are about registers, and is given back behind each of them.

    :param exchange: sends a packet by gdb and gives the reply
    :param settle: has gdb select the thread that its user looks at
    """

    noisy = False  # gdb checks the sums of what comes, and repeats itself

    def __init__(self, exchange: Callable[[bytes], bytes], settle: Callable[[], None]) -> None:
        self._exchange = exchange
        self._settle = settle
        self._selection: bytes | None = None  # None: what gdb has selected

    def exchange(self, payload: bytes, valid: Valid = _anything, /) -> tuple[bytes, bool]:
        """As :meth:`~kgdbx.target.kgdb_packets.KgdbPackets.exchange`.

        :raises ProtocolError: if the reply cannot be one to this command
        """
        selects = payload.startswith(b"Hg")
        if selects:
            self._selection = payload
        if self._selection is None or not (selects or payload[:1] in _ABOUT_REGISTERS):
            reply = self._exchange(payload)
        else:
            self._settle()
            gdbs = _selected_by_gdb()
            reply = self._exchange(self._selection)
            if not selects:
                reply = self._exchange(payload)
            self._exchange(gdbs)
        if not valid(reply):
            raise ProtocolError(f"KGDB answers {reply[:40]!r} to {payload[:40]!r}")
        return reply, False

    def read(self, payload: bytes, valid: Valid = _anything, /) -> bytes:
        """As :meth:`~kgdbx.target.kgdb_packets.KgdbPackets.read`."""
        return self.exchange(payload, valid)[0]

    def select_stopped(self) -> None:
        """Registers are those of the CPU that stopped, whatever gdb has selected."""
        self._selection = _STOPPED

    def stopped(self) -> None:
        """The kernel has just stopped: KGDB and gdb have selected the thread that did."""
        self._selection = None

    def give_back(self) -> None:
        """After a step: select in KGDB what gdb takes to be selected."""
        self._settle()
        self._exchange(_selected_by_gdb())


def _selected_by_gdb() -> bytes:
    thread = gdb.selected_thread()
    return b"Hg0" if thread is None else b"Hg%x" % thread.ptid[1]
