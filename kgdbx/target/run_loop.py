"""The run of a kernel from stop to stop, over a line of our own."""

import abc
import dataclasses
import math
import time
from collections.abc import Callable

from kgdbx.errors import TargetLost
from kgdbx.target.base import IDLE_S, Stop, StopReason, Target
from kgdbx.target.idle import IdleCalls

__all__ = ("RunLoop",)


class RunLoop(Target):
    """The part of a target that goes from stop to stop; mixed into one that has a connection."""

    _running: bool
    _looked_at: int | None = None

    @property
    def running(self) -> bool:
        return self._running

    def look_at(self, cpu: int) -> None:
        self._looked_at = cpu

    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        try:
            return self._run(on_stop, deadline, IdleCalls(on_idle, idle_s))
        except TargetLost:
            self._running = False  # what is asked next fails for the same reason
            raise
        except (KeyboardInterrupt, SystemExit):
            self.interrupt()  # so that the way out finds a kernel that stands
            raise

    def _run(
        self, on_stop: Callable[[Stop], bool] | None, deadline: float, idle: IdleCalls
    ) -> Stop | None:
        while True:
            self.resume()
            try:
                idle.call_if_due()
            except BaseException:
                self._break_in(on_stop)
                raise
            stop = self._next_stop(min(deadline, idle.due))
            if stop is None:
                if self._stop_is_requested or time.monotonic() >= deadline:
                    self.forget_stop_request()
                    self._break_in(on_stop)
                    return None
                continue
            self._require_not_exited(stop)
            self._looked_at = None
            if on_stop is None or not on_stop(stop):
                cpu = self._looked_at
                return stop if cpu is None else dataclasses.replace(stop, cpu=cpu)
            if self._stop_is_requested or time.monotonic() >= deadline:
                self.forget_stop_request()  # it stands: the next stop may be as fast as we are
                return None

    def _break_in(self, on_stop: Callable[[Stop], bool] | None) -> None:
        # A breakpoint may have been faster than our break-in: it counts as any other.
        stop = self.interrupt()
        self._require_not_exited(stop)
        if stop.reason is not StopReason.INTERRUPT and on_stop is not None:
            on_stop(stop)

    def _require_not_exited(self, stop: Stop) -> None:
        if stop.reason is StopReason.EXITED:
            raise TargetLost(f"the guest at {self.name} has shut down")

    # Wait for the kernel's next stop until a moment on the clock of time.monotonic(), which may
    # never come; None then, if a stop was requested, or for no reason.
    @abc.abstractmethod
    def _next_stop(self, until: float) -> Stop | None:
        raise NotImplementedError

    @property
    @abc.abstractmethod
    def _stop_is_requested(self) -> bool:
        raise NotImplementedError
