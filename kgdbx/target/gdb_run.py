"""Runs of the kernel by gdb's own ``continue``, from stop to stop, and what ends them."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import gdb

from kgdbx.errors import TargetLost
from kgdbx.target.base import Stop, StopReason
from kgdbx.target.gdb_breakpoints import GdbBreakpoints, user_breakpoints
from kgdbx.target.gdb_connection import GdbConnection, quiet
from kgdbx.target.gdb_idle import IdleThread

__all__ = ("GdbRun", "GdbRunControl")

_RETRY_S = 0.25
_GDBS_OWN = "[Switching to "


class GdbRun:
    """One run, as long as it is under way.

    :param on_stop: asked at each of our breakpoints whether the kernel is to run on
    :ivar expired: its time has passed
    :ivar hit: the stop at a breakpoint of ours that it ends with
    :ivar interrupted: gdb has stopped the kernel by a break-in
    :ivar hands_over: gdb was stopped before a breakpoint of the user, and is to go on and take it
    :ivar error: what is to come out of it when the kernel stands
    """

    def __init__(self, on_stop: Callable[[Stop], bool] | None) -> None:
        self.on_stop = on_stop
        self.expired = False
        self.hit: Stop | None = None
        self.interrupted = False
        self.hands_over = False
        self.error: BaseException | None = None
        self.retry = threading.Timer(0, lambda: None)

    def on_event(self, event: Any) -> None:
        """gdb has stopped."""
        self.interrupted = getattr(event, "stop_signal", None) == "SIGINT"


class GdbRunControl:
    """Lets the kernel run and stops it.

    :param selected_cpu: number of the vCPU that stopped
    :ivar current: the run under way; without one it is the user who lets the kernel run
    :ivar stop_requested: whether the kernel is to stop, and runs still
    """

    def __init__(
        self,
        connection: GdbConnection,
        breakpoints: GdbBreakpoints,
        selected_cpu: Callable[[], int],
    ) -> None:
        self.current: GdbRun | None = None
        self.stop_requested = False
        self._connection = connection
        self._breakpoints = breakpoints
        self._selected_cpu = selected_cpu
        self._posted: set[object] = set()

    @property
    def is_ending(self) -> bool:
        """Whether the run under way is to end with the next stop."""
        run = self.current
        return run is not None and (run.expired or self.stop_requested or run.error is not None)

    @property
    def has_posted(self) -> bool:
        """Whether there are events that gdb has not taken yet."""
        return bool(self._posted)

    def request_stop(self) -> None:
        """End the run under way, or the next; may be called from another thread."""
        self.stop_requested = True
        if self.current is not None:
            self._post_interrupt(self.current)

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None,
        timeout_s: float | None,
        on_idle: Callable[[], None] | None,
        idle_s: float,
    ) -> Stop | None:
        """As :meth:`~kgdbx.target.base.Target.run`; the kernel stands.

        :raises TargetLost: if the guest shuts down
        """
        self.current = run = GdbRun(on_stop)
        timer = threading.Timer(timeout_s or 0.0, self._expire, (run,))
        timer.daemon = True
        idle: IdleThread | None = None
        if on_idle is not None:
            call = functools.partial(self._call_idle, run, on_idle)
            idle = IdleThread(self._post, call, idle_s)
        gdb.events.stop.connect(run.on_event)
        try:
            if timeout_s is not None:
                timer.start()
            if self.stop_requested:
                self._post_interrupt(run)
            return self._run(run)
        finally:
            self.current = None
            self.stop_requested = False
            timer.cancel()
            if idle is not None:
                idle.stop()
            run.retry.cancel()
            gdb.events.stop.disconnect(run.on_event)
            if self._connection.alive:
                self._breakpoints.delete_retired()

    def _run(self, run: GdbRun) -> Stop | None:
        while True:
            self._continue(run)
            if run.error is not None:
                raise run.error
            ended = run.expired or self.stop_requested
            if ended and (run.hit is not None or run.interrupted):
                return None
            if run.hit is not None:
                return run.hit
            if run.hands_over:
                continue
            if run.interrupted:
                return Stop(self._selected_cpu(), StopReason.INTERRUPT, None, 2)
            return Stop(self._selected_cpu(), StopReason.TRAP)  # a breakpoint of the user

    def _continue(self, run: GdbRun) -> None:
        run.hit, run.interrupted, run.hands_over = None, False, False
        command = "continue"
        # A stop may come just before a breakpoint is hit, which must not be missed then.
        pc = int(gdb.newest_frame().pc())
        if self._breakpoints.at(pc) and not any(user_breakpoints(pc)):
            # 'continue' would step over it. gdb asks if an inlined function is there.
            command = f"with confirm off -- jump *{pc:#x}"
        with quiet():
            written = self._connection.execute(command)
        # Events that were shown while the kernel ran are among it.
        lines = written.splitlines(keepends=True)
        gdb.write("".join(line for line in lines if not line.startswith(_GDBS_OWN)))
        if self._connection.exited:
            raise TargetLost(f"the guest at {self._connection.name} has shut down")

    def _expire(self, run: GdbRun) -> None:
        run.expired = True
        self._post_interrupt(run)

    def _post(self, action: Callable[[], None]) -> None:
        # Any thread may post an event; gdb takes it between two stops, while the guest runs.
        event = object()
        self._posted.add(event)

        def take() -> None:
            self._posted.discard(event)
            action()

        gdb.post_event(take)

    def _post_interrupt(self, run: GdbRun) -> None:
        def interrupt() -> None:
            if self.current is run and self.is_ending:
                with contextlib.suppress(gdb.error):
                    gdb.execute("interrupt", to_string=True)
                # The stub drops a break-in that meets a stop.
                run.retry.cancel()
                run.retry = threading.Timer(_RETRY_S, self._post_interrupt, (run,))
                run.retry.daemon = True
                run.retry.start()

        if self.current is run:
            self._post(interrupt)

    def _call_idle(self, run: GdbRun, on_idle: Callable[[], None]) -> None:
        if self.current is run and self._connection.running and not self.is_ending:
            try:
                on_idle()
            except BaseException as e:  # gdb would print it and wait on
                run.error = e
                self._post_interrupt(run)
