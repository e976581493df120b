"""When a hit at a stop happened, by the clock that records made in the guest have."""

import time
from collections.abc import Callable

from kgdbx.errors import SymbolError
from kgdbx.resident.clock import IDENTITY
from kgdbx.resident.engine import Engine
from kgdbx.resident.reader import EventReader
from kgdbx.symbols.kernel import Kernel
from kgdbx.symbols.timekeeping import LastTick

__all__ = ("StopClock",)

# Where the guest's clock is not the counter: how far the line of time stamps may be before it.
_UNSURE_NS = 1_000_000
_RATE_PARTS = 10_000


class StopClock:
    """The guest's monotonic clock at a stop.

    A hit that rang for the host brings its time stamp. Of others it is known that they came after
    the guest's last timer tick (an idle guest has none), after what was recorded so far, and after
    the hit before: the last of these moments is taken for theirs. So events are in order, whichever
    tier they are of.

    :param reader: of the records made in the guest
    :param handed_out: time of the last event that was shown
    """

    def __init__(
        self, kernel: Kernel, engine: Engine, reader: EventReader, handed_out: Callable[[], int]
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._handed_out = handed_out
        self._latest = 0
        self._started_ns = time.monotonic_ns()
        self._tick: LastTick | None = None
        # Over KGDB's serial line what is read at each hit costs more than the rest of the hit.
        if kernel.target.capabilities.writes_code:
            try:
                self._tick = LastTick(kernel)
            except (AttributeError, LookupError, SymbolError):
                self._tick = None  # the host's clock, then

    def ns(self, tsc: int | None = None) -> int:
        """Nanoseconds of ``CLOCK_MONOTONIC``; of the host since the session began, where the
        guest's clock cannot be read.

        :param tsc: the hit's time stamp, if it is known
        """
        clock = self._engine.clock
        if tsc is not None and clock is not IDENTITY:
            return max(clock.ns(tsc), self._handed_out())
        if self._tick is None:
            return time.monotonic_ns() - self._started_ns
        ns, cycles = self._tick.read()
        if clock is not IDENTITY:
            # By the same line as the records, and not before those that are there.
            if cycles is not None:
                ns = clock.ns(cycles)
            else:
                ns -= _UNSURE_NS + abs(ns - clock.ns_base) // _RATE_PARTS
            ns = max(ns, clock.ns(self._reader.latest_tsc))
        self._latest = max(self._latest, self._handed_out(), ns)
        return self._latest
