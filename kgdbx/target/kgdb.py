"""A kernel behind its own debugger, KGDB, over a serial line."""

from kgdbx.errors import TargetLost, TargetTimeout, Unsupported
from kgdbx.target.base import BreakpointKind, StopReason
from kgdbx.target.break_in import BreakIn
from kgdbx.target.kgdb_access import KgdbAccess
from kgdbx.target.kgdb_packets import KgdbConnection
from kgdbx.target.kgdb_run import KgdbRunControl
from kgdbx.target.kgdb_state import KgdbSymbols

__all__ = ("KgdbTarget",)

_ANSWER_S = 5.0
_SOFTWARE = BreakpointKind.SOFTWARE
# How long a kernel that stands may take for its first answer, and how long that is.
_LISTENS_S = 0.3
_LISTENS_BYTES = 1024


class KgdbTarget(KgdbRunControl, KgdbAccess):
    """A target over KGDB's serial line.

    Attaching removes the breakpoints that a debugger which died left behind. Registers that KGDB
    does not know are not there, never zero.

    :param address: ``/dev/ttyS0[,115200]``, path of a Unix socket, or ``host:port``
    :param break_in: stops a kernel that runs; None if there is no way but its own breakpoints
    :param answer_s: seconds that KGDB has for an answer
    :raises TargetTimeout: if KGDB does not answer: the kernel runs, and was not broken into
    """

    def __init__(
        self, address: str, *, break_in: BreakIn | None = None, answer_s: float = _ANSWER_S
    ) -> None:
        super().__init__(address, break_in, answer_s)
        try:
            self._synchronize()
            self._cpus.list()
            self._stop = self._stopped(b"S05", resumed_by=b"")
        except BaseException:
            self._connection.close()
            raise

    @property
    def connection(self) -> KgdbConnection:
        """The packet layer, for its counters."""
        return self._connection

    def use_symbols(self, symbols: KgdbSymbols) -> None:
        super().use_symbols(symbols)
        state = self._cpus.state
        self._debug_registers.changed()  # by a debugger that died, perhaps
        stale = self._cpus.moved is None and self._stop.reason is not StopReason.INTERRUPT
        if stale and state is not None and state.was_breakpoint(self._cpus.rip - 1):
            self._cpus.moved = self._cpus.rip - 1

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        if kind is _SOFTWARE:
            self._breakpoints.insert(kind, address, size_bytes)
        elif self._cpus.state is None:
            raise Unsupported(
                "KGDB's debug registers can be neither set nor removed for certain without the "
                "kernel's symbols; use a software breakpoint"
            )
        else:
            self._breakpoints.insert(kind, address, size_bytes)
            self._cpus.state.activate(address, self._cpus.numbers)
            self._debug_registers.changed()

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        self._breakpoints.remove(kind, address, size_bytes)
        if kind is not _SOFTWARE:
            self._debug_registers.changed()

    def close(self, *, resume: bool = True) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._running and (self.can_break_in or any(True for _ in self._breakpoints)):
                self.interrupt()
            if self._running:
                return  # nothing of ours is in it
            if resume:
                self._detach()
            else:
                for kind, address, size in self._breakpoints:
                    self._breakpoints.remove(kind, address, size)
                self._connection.acknowledge()
        except TargetLost:
            self._running = False  # a kernel that is gone needs no cleaning
        finally:
            self._breakpoints.forget()
            self._connection.close()

    def _detach(self) -> None:
        for kind, address, size in self._breakpoints:
            if kind is not _SOFTWARE:
                self._breakpoints.remove(kind, address, size)
                self._debug_registers.changed()
        self._load_debug_registers()
        # A break-in that is under way would stop a kernel that nobody waits for.
        if self._breaks_under_way and self.can_break_in:
            for kind, address, size in self._breakpoints:
                self._breakpoints.remove(kind, address, size)
            self._start(b"c")
            self._ask_for_stop()
        # D has no address to go on at, and KGDB lets the kernel run when its OK is acknowledged.
        if self._cpus.moved is not None and self._cpus.moved != self._cpus.rip:
            self._cpus.write_through(self._stop.cpu, "rip", self._cpus.moved)
        self._connection.exchange(b"D", _is_ok_or_error)
        self._connection.acknowledge()
        self._running = True

    # Protocol

    def _synchronize(self) -> None:
        """Attach to whatever state the line is in, and remove old breakpoints."""
        # KGDB may wait for a command, or for the acknowledgment of its last packet.
        connection, break_in = self._connection, self._break_in_way
        connection.line.write(b"+")
        connection.quiet()
        if break_in is None:
            connection.exchange(b"?", _is_stop)
        elif not self._stands():
            connection.forgive()
            with break_in():
                # What was asked is on the line, and is answered now if it was not lost.
                if connection.late_answer(self._answer_s) is None:
                    connection.exchange(b"?", _is_stop)
        connection.acknowledge()
        # Questions that piled up while the kernel ran are being answered now.
        connection.quiet()

    def _stands(self) -> bool:
        wait_s = _LISTENS_S + self._connection.line.transfer_s(_LISTENS_BYTES)
        try:
            self._connection.exchange(b"?", _is_stop, wait_s)
        except TargetTimeout:
            return False
        return True


def _is_stop(reply: bytes) -> bool:
    return len(reply) >= 3 and reply[:1] in (b"S", b"T")


def _is_ok_or_error(reply: bytes) -> bool:
    return reply == b"OK" or (len(reply) == 3 and reply[:1] == b"E")
