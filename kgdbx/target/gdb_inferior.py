"""A kernel over gdb's own connection, whoever answers there; runs inside gdb's Python.

gdb keeps its breakpoints, its user interface and its run control. Registers, memory and steps go
past it in packets of our own, and gdb is told to forget what it has cached.
"""

import abc
from collections.abc import Callable
from typing import Any

import gdb

from kgdbx.errors import TargetError, TargetLost, Unsupported
from kgdbx.target.base import (
    IDLE_S,
    BreakpointKind,
    Stop,
    StopReason,
    Target,
)
from kgdbx.target.gdb_breakpoints import GdbBreakpoint, GdbBreakpoints
from kgdbx.target.gdb_connection import GdbConnection, quiet
from kgdbx.target.gdb_general_thread import GeneralThread
from kgdbx.target.gdb_hits import GdbHits
from kgdbx.target.gdb_run import GdbRunControl
from kgdbx.target.gdb_settings import GdbSettings

__all__ = ("GdbInferior",)


class GdbInferior(Target):
    """What all targets inside gdb have: its breakpoints, its run control, and its connection.

    Breakpoints are internal ones of gdb, so that the user's own ``continue`` runs probes too:
    :attr:`on_stop` is asked at each stop at one of ours. What it raises is kept in
    :attr:`errors`, printed once, and the kernel runs on. ``^C`` while it runs stops the kernel.

    gdb steps over a breakpoint that lies where a handled one left the program counter. If it is
    the user's, we stop there, and the next ``continue`` takes it; :meth:`run` does so itself.

    :meth:`resume` is ``continue &``: gdb handles stops only when no command runs, so that
    :meth:`interrupt` cannot wait for one.

    :param address: what ``target remote`` takes; None for the connection that gdb has
    :raises TargetError: if gdb is not connected to a stub, or cannot be
    """

    def __init__(self, address: str | None) -> None:
        self.on_stop: Callable[[Stop], bool] | None = None
        self.on_hit: Callable[[], None] = lambda: None
        self._closed = False
        self._connection = GdbConnection(address)
        self._general_thread = GeneralThread(self._connection)
        self._breakpoints = GdbBreakpoints(lambda ours: self._hits.ask(lambda: self._hit(ours)))
        self._run_control = GdbRunControl(self._connection, self._breakpoints, self._selected_cpu)
        self._hits = GdbHits(
            self._connection,
            self._general_thread,
            self._breakpoints,
            self._run_control,
            self._selected_cpu,
            on_stop=lambda stop: self.on_stop is not None and self.on_stop(stop),
            on_hit=lambda: self.on_hit(),
            next_stop=self._next_stop,
        )
        self.errors = self._hits.errors
        gdb.events.stop.connect(self._on_stop_event)
        self._settings = self._change_settings()
        try:
            self._learn()
        except BaseException:
            self.close(resume=False)
            raise

    @abc.abstractmethod
    def _change_settings(self) -> GdbSettings:
        # Have gdb's settings as they are needed.
        raise NotImplementedError

    @abc.abstractmethod
    def _learn(self) -> None:
        # Find out what this stub is and has.
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self._connection.name

    @property
    def running(self) -> bool:
        return not self.in_hit and self._connection.running

    @property
    def in_hit(self) -> bool:
        """Whether gdb asks about a hit of one of our breakpoints."""
        return self._hits.cpu is not None

    @property
    def in_run(self) -> bool:
        """Whether :meth:`run` is under way; otherwise it is the user who lets the kernel run."""
        return self._run_control.current is not None

    @property
    def stop_requested(self) -> bool:
        """Whether the kernel is to stop, and runs still."""
        return self._run_control.stop_requested

    def looked_at(self) -> int:
        """CPU number of the thread that gdb's user has selected."""
        return self._selected_cpu() if gdb.selected_thread() is not None else 0

    # Breakpoints

    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._require_stopped("a breakpoint")
        self._breakpoints.insert((kind, address, size_bytes), self._hits.number)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        self._breakpoints.remove((kind, address, size_bytes), self._hits.number)

    # Run control

    def resume(self) -> None:
        if not self.running:
            self._require_stopped("resuming")
            self._connection.execute("continue &")

    def interrupt(self) -> Stop:
        if self.running:
            raise Unsupported(
                "gdb cannot wait for a stop inside of a command; use 'interrupt' at its prompt, "
                "or run with a time limit"
            )
        if not self._connection.alive:
            raise TargetLost(f"the guest at {self.name} is gone")
        return self._hits.stop

    def request_stop(self) -> None:
        self._run_control.request_stop()

    def forget_stop_request(self) -> None:
        self._run_control.stop_requested = False

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        self._require_stopped("running")
        if self.in_hit:
            raise Unsupported("the kernel cannot run on during a hit; do this at gdb's prompt")
        stop = self._run_control.run(on_stop, timeout_s, on_idle, idle_s)
        if stop is not None:
            self._hits.stop = stop
        return stop

    def close(self, *, resume: bool = True) -> None:
        if self._closed:
            return
        if self.in_hit:
            raise Unsupported("a target cannot be closed while gdb handles a stop of it")
        self._closed = True
        try:
            if self._connection.alive and not self.running:
                self._leave(resume)
        except gdb.error as e:
            if self._connection.alive:
                raise TargetError(f"gdb cannot leave {self.name}: {e}") from e
        finally:
            self._breakpoints.forget()
            self._settings.restore()
            self._connection.close()
            gdb.events.stop.disconnect(self._on_stop_event)

    def _leave(self, resume: bool) -> None:
        self._breakpoints.delete_all()
        for _ in range(3):
            if self._run_control.has_posted:
                # gdb crashes at its exit when an event is left over; a step takes them.
                with quiet():
                    gdb.execute("stepi", to_string=True)
        self._connection.leave(resume=resume)

    # Hits

    def _hit(self, ours: GdbBreakpoint) -> bool:
        # Called in place of a breakpoint's condition; whether gdb shall stop.
        if not self._breakpoints.holds(ours):
            return False
        kind, address, _ = ours.key
        if kind >= BreakpointKind.WATCH_WRITE:
            return self._handle(StopReason.WATCHPOINT, address)
        return self._handle(StopReason.TRAP, None, elsewhere_than=address)

    def _handle(
        self, reason: StopReason, watched: int | None, elsewhere_than: int | None = None
    ) -> bool:
        return self._hits.handle(reason, watched, elsewhere_than)

    def _next_stop(self, cpu: int) -> Stop | None:
        # Another stop of the vCPU whose hit was handled, which gdb would pass over.
        return None

    # gdb

    def _on_stop_event(self, event: Any) -> None:
        if self._hits.looked_at is not None:
            self._connection.select(self._hits.looked_at)
            self._hits.looked_at = None
        if self.in_run:
            return
        self._run_control.stop_requested = False
        if getattr(event, "stop_signal", None) != "SIGINT":
            return
        # The user's next 'continue' would step over a breakpoint that is about to be hit.
        ours = self._breakpoints.at(int(gdb.newest_frame().pc()))
        if ours is not None:
            ours.stop()

    def _require_stopped(self, what: str) -> None:
        if not self._connection.alive:
            raise TargetLost(f"the guest at {self.name} is gone")
        if self.running:
            raise Unsupported(f"{what} needs a stopped kernel; interrupt it first")

    def _selected_cpu(self) -> int:
        return self._connection.selected_cpu()
