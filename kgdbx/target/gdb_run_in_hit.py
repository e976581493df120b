"""What the kernel does while gdb asks about a hit, by packets that gdb does not see."""

import contextlib
import time
from collections.abc import Callable, Iterator

from kgdbx.errors import TargetLost, Unsupported
from kgdbx.target.base import Stop, StopReason
from kgdbx.target.gdb_breakpoints import GdbBreakpoints, Key
from kgdbx.target.gdb_connection import GdbConnection
from kgdbx.target.gdb_general_thread import GeneralThread

__all__ = ("RunInHit",)

_REMOVE = b"z%d,%x,%x"


class RunInHit:
    """Lets the kernel run between two handlers of a hit.

    gdb's breakpoints are in the guest then, but for those that were made during the hit: gdb
    inserts them when it goes on, so they are inserted here for as long.

    gdb waits ``remotetimeout`` seconds for an answer and asks for it once more, which QEMU takes
    for a break-in: nothing else ends such a run.

    :ivar has_run: whether the kernel has run, until it is cleared
    """

    def __init__(
        self, connection: GdbConnection, general_thread: GeneralThread, breakpoints: GdbBreakpoints
    ) -> None:
        self.has_run = False
        self._connection = connection
        self._general_thread = general_thread
        self._breakpoints = breakpoints
        self._inserted: list[Key] | None = None

    def run(
        self, hit: int, on_stop: Callable[[Stop], bool], timeout_s: float | None
    ) -> Stop | None:
        """As :meth:`~kgdbx.target.base.Target.run`.

        :param hit: its number
        :raises Unsupported: if breakpoints of the user are enabled: gdb would not be told of
            their hits
        """
        if self._breakpoints.has_users:
            raise Unsupported(
                "the kernel cannot run on during a hit while breakpoints of yours are enabled in "
                "gdb; disable them, or do this at gdb's prompt"
            )
        with self.breakpoints(hit):
            return self._run(on_stop, timeout_s)

    @contextlib.contextmanager
    def breakpoints(self, hit: int) -> Iterator[None]:
        """While the block runs, the breakpoints that were made during a hit are in the guest."""
        if self._inserted is not None:  # for a handler that was hit in such a run
            yield
            return
        self._inserted = []
        try:
            for key in self._breakpoints.made_during(hit):
                self.insert(key)
            yield
        finally:
            inserted, self._inserted = self._inserted, None
            for key in inserted:
                self._connection.expect_ok(_REMOVE % key)

    def insert(self, key: Key) -> None:
        """A breakpoint was made: insert it, if the kernel is to run before gdb does."""
        if self._inserted is not None:
            self._inserted.append(key)
            self._connection.expect_ok(b"Z%d,%x,%x" % key)

    def remove(self, key: Key) -> None:
        """A breakpoint was removed."""
        if self._inserted is not None and key in self._inserted:
            self._connection.expect_ok(_REMOVE % key)
            self._inserted.remove(key)

    def _run(self, on_stop: Callable[[Stop], bool], timeout_s: float | None) -> Stop | None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.has_run = True
            stop = self._general_thread.run_past_gdb(b"vCont;c")
            if stop.reason is StopReason.EXITED:
                raise TargetLost(f"the guest at {self._connection.name} has shut down")
            if stop.reason is not StopReason.INTERRUPT and not on_stop(stop):
                return stop
            if end is not None and time.monotonic() >= end:
                return None
