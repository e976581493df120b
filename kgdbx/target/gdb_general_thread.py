"""The thread that a stub's register packets are about: gdb's ``general_thread``."""

import contextlib
from collections.abc import Iterator

import gdb

from kgdbx.errors import Unsupported
from kgdbx.target import stub
from kgdbx.target.base import Stop, StopReason
from kgdbx.target.gdb_connection import GdbConnection

__all__ = ("GeneralThread",)


class GeneralThread:
    """Selects vCPUs in QEMU's stub and leaves gdb's idea of the stub and of registers true."""

    def __init__(self, connection: GdbConnection) -> None:
        self._connection = connection
        self._in_hit = False
        self._cpu = 0  # during a hit
        self._stale = False

    def begin_hit(self, cpu: int) -> None:
        """gdb asks about a hit on a vCPU, which is selected."""
        self._in_hit, self._cpu = True, cpu

    def end_hit(self) -> None:
        """gdb goes on."""
        self._in_hit = False
        if self._stale:
            self._flush()
            self._stale = False

    def forget_registers(self) -> None:
        """Have gdb read registers anew: at once, or when the hit is over."""
        if self._in_hit:
            self._stale = True
        else:
            self._flush()

    def current(self) -> int:
        """vCPU number, as far as gdb knows."""
        if self._in_hit:
            return self._cpu
        self._flush()
        gdb.newest_frame().pc()  # gdb selects its thread in the stub to read this
        return self._connection.selected_cpu()

    def run_past_gdb(self, packet: bytes) -> Stop:
        """Have the stub run vCPUs until a stop, of which gdb is told nothing.

        :param packet: ``vCont`` and its actions
        """
        here, stop = self.current(), None
        try:
            stop = stub.parse_stop(self._connection.exchange(packet))
        finally:
            self.forget_registers()
            gone = not self._connection.alive or (stop and stop.reason is StopReason.EXITED)
            # gdb_set_stop_cpu() in gdbstub/gdbstub.c: but not for a watchpoint.
            selected = stop and stop.reason is not StopReason.WATCHPOINT and stop.cpu == here
            if not gone and not selected:
                self._connection.expect_ok(b"Hg" + self._connection.threads()[here])
        return stop

    @contextlib.contextmanager
    def selected(self, cpu: int) -> Iterator[None]:
        """While the block runs, packets are about a vCPU.

        :raises Unsupported: if there is no such vCPU
        """
        here = self.current()
        if cpu == here:
            yield
            return
        threads = self._connection.threads()
        if cpu not in threads:
            raise Unsupported(f"there is no vCPU {cpu}; there are {len(threads)}")
        self._connection.expect_ok(b"Hg" + threads[cpu])
        try:
            yield
        finally:
            self._connection.expect_ok(b"Hg" + threads[here])

    def _flush(self) -> None:
        gdb.execute("maint flush register-cache", to_string=True)
