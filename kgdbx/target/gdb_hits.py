"""Hits of our breakpoints: gdb asks whether to stop, and handlers run before it has the answer."""

import dataclasses
import traceback
from collections.abc import Callable

import gdb

from kgdbx.target.base import Stop, StopReason
from kgdbx.target.gdb_breakpoints import GdbBreakpoints, user_breakpoints
from kgdbx.target.gdb_connection import GdbConnection
from kgdbx.target.gdb_general_thread import GeneralThread
from kgdbx.target.gdb_run import GdbRunControl

__all__ = ("GdbHits",)


class GdbHits:
    """Answers gdb. What handlers raise never gets into gdb, which is in the middle of a stop.

    :param selected_cpu: number of the vCPU that stopped
    :param on_stop: asked at each hit under the user's own ``continue`` whether the kernel is to
        run on
    :param on_hit: called at the beginning of each hit
    :param next_stop: asked when a hit was handled: another stop of its vCPU, which gdb does not
        know of
    :ivar cpu: the vCPU of the hit that gdb asks about; None if it asks about none
    :ivar stop: the kernel's last stop
    :ivar looked_at: the vCPU that the user is to look at, if it is not the one that gdb reports
    :ivar errors: what was raised under the user's own ``continue``
    """

    def __init__(
        self,
        connection: GdbConnection,
        general_thread: GeneralThread,
        breakpoints: GdbBreakpoints,
        run_control: GdbRunControl,
        selected_cpu: Callable[[], int],
        *,
        on_stop: Callable[[Stop], bool],
        on_hit: Callable[[], None],
        next_stop: Callable[[int], Stop | None],
    ) -> None:
        self.cpu: int | None = None
        self.stop = Stop(0, StopReason.INTERRUPT, None, 2)
        self.looked_at: int | None = None
        self.errors: list[BaseException] = []
        self._connection = connection
        self._general_thread = general_thread
        self._breakpoints = breakpoints
        self._run_control = run_control
        self._selected_cpu = selected_cpu
        self._on_stop = on_stop
        self._on_hit = on_hit
        self._next_stop = next_stop
        self._count = 0
        self._pc: int | None = None  # where handlers have sent the vCPU
        self._printed = False

    @property
    def number(self) -> int | None:
        """Number of the hit that gdb asks about; None if it asks about none."""
        return self._count if self.cpu is not None else None

    def moved(self, cpu: int, pc: int) -> None:
        """A vCPU's program counter was changed."""
        if cpu == self.cpu:
            self._pc = pc

    def look_at(self, cpu: int) -> None:
        """As :meth:`~kgdbx.target.base.Target.look_at`."""
        self.stop = dataclasses.replace(self.stop, cpu=cpu)
        self.looked_at = cpu

    def ask(self, question: Callable[[], bool]) -> bool:
        """Whether gdb shall stop: what a question gives, or True if it raises."""
        try:
            return question()
        except KeyboardInterrupt:
            return self.stop_at_interrupt()
        except BaseException as e:  # gdb would stay in the middle of a stop
            self._note(e)
            return True

    def handle(
        self, reason: StopReason, watched: int | None, elsewhere_than: int | None = None
    ) -> bool:
        """Run the handlers of a hit.

        :param watched: guest-virtual address that a watchpoint reports
        :param elsewhere_than: address of a breakpoint; others that were removed are deleted
        :return: whether gdb shall stop
        """
        self._count += 1
        self._on_hit()
        self.cpu = cpu = self._selected_cpu()
        self._general_thread.begin_hit(cpu)
        self._pc = self.looked_at = None
        self.stop = stop = Stop(cpu, reason, watched)
        try:
            keep = self._dispatch(stop)
            while keep and (again := self._next_stop(cpu)) is not None:
                self.stop = again
                keep = self._dispatch(again)
            if elsewhere_than is not None:
                self._breakpoints.delete_retired_before(self._count, elsewhere_than)
        finally:
            self.cpu = None
            self._general_thread.end_hit()
        if not keep:
            return True
        self.looked_at = None
        return self._pc is not None and self._hands_over(self._pc)

    def stop_at_interrupt(self) -> bool:
        """^C during a hit, whoever was at work: gdb stops, always."""
        self.stop = dataclasses.replace(self.stop, reason=StopReason.INTERRUPT, signal=2)
        if self._run_control.current is not None:
            self._run_control.current.hit = self.stop
        return True

    def _dispatch(self, stop: Stop) -> bool:
        run = self._run_control.current
        callback = self._on_stop if run is None else run.on_stop
        keep = False
        try:
            keep = callback is not None and bool(callback(stop))
        except KeyboardInterrupt:
            self.stop = dataclasses.replace(self.stop, reason=StopReason.INTERRUPT, signal=2)
        except Exception as e:  # gdb must not see it in the middle of a stop
            if run is not None:
                run.error = run.error or e
            else:
                self._note(e)
                keep = self._connection.alive
        if run is not None:
            keep = keep and not self._run_control.is_ending
            run.hit = None if keep else self.stop
        elif keep and self._run_control.stop_requested:
            keep = False
            self.stop = dataclasses.replace(stop, reason=StopReason.INTERRUPT, signal=2)
        return keep

    def _hands_over(self, pc: int) -> bool:
        # Whether a breakpoint of the user is next, which gdb would now step over.
        if self._breakpoints.are_all:
            return False
        for each in user_breakpoints(pc):
            if self._run_control.current is not None:
                self._run_control.current.hands_over = True
            else:
                gdb.write(f"kgdbx: breakpoint {each.number} is next; continue to take it\n")
            return True
        return False

    def _note(self, error: BaseException) -> None:
        self.errors.append(error)
        if not self._printed:
            self._printed = True
            trace = "".join(traceback.format_exception(error))
            gdb.write(f"kgdbx: error at a probe; the kernel runs on:\n{trace}", gdb.STDERR)
