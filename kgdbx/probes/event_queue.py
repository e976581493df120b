"""Events on their way from the probes to those who show or store them."""

import collections
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from kgdbx.probes.event import Event
from kgdbx.probes.manager import ProbeManager
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import Stop

__all__ = ("EventQueue", "EventfulManager")

_PATIENCE_S = 1.0


class EventQueue:
    """Takes events while handlers run, and hands them to listeners afterwards.

    A handler has a time limit, and the guest stands in the middle of its hit meanwhile. Listeners
    print to readers that may take their time: they are called when all handlers are through.

    :param listeners: called with each event, in the order of the events
    :ivar latest_ns: time of the last event that was handed out
    :ivar hurry: whoever reads is asked to end: :meth:`deliver` does not wait any more for a
        listener that does not come back
    """

    def __init__(self, listeners: list[Callable[[Event], None]]) -> None:
        self.latest_ns = 0
        self.hurry = False
        self._listeners = listeners
        self._events: collections.deque[Event] = collections.deque()
        self._delivered = 0
        self._error: Exception | None = None

    def append(self, event: Event) -> None:
        """Take an event; nobody hears of it before :meth:`deliver`."""
        self._events.append(event)

    def deliver(self) -> bool:
        """Hand out all events, by their times. What listeners raise is kept for
        :meth:`raise_error`.

        :return: whether all went well
        :raises KeyboardInterrupt: if a listener is stuck after :attr:`hurry` was set; the events
            that are left are dropped
        """
        went_well = True
        if self._events:
            # Hits that rang are older than what was recorded until the kernel stood.
            self._events = collections.deque(sorted(self._events, key=lambda e: e.ts_ns))
            try:
                with self._watched():
                    while self._events:
                        went_well = self._hand_out(self._events.popleft()) and went_well
            except KeyboardInterrupt:
                self._events.clear()
                raise
        return went_well

    def raise_error(self) -> None:
        """Raise the first error of a listener since the last call, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _hand_out(self, event: Event) -> bool:
        self._delivered += 1
        self.latest_ns = event.ts_ns
        try:
            for listener in tuple(self._listeners):
                listener(event)
        except Exception as e:  # no handler's fault, and no reason to keep back the next event
            self._error = self._error or e
            return False
        return True

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        # A signal does not end a write that waits for its reader, unless its handler raises.
        # Handlers run in the main thread only.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = -1

        def look(signum: int, frame: FrameType | None) -> None:
            nonlocal before
            stuck = self.hurry and before == self._delivered
            before = self._delivered if self.hurry else -1
            if stuck:
                raise KeyboardInterrupt("a listener of events does not come back")

        previous = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S, _PATIENCE_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


class EventfulManager(ProbeManager):
    """A manager that hands out the events of a stop when its handlers are through.

    :param events: where the probes put their events
    :param before: called before the handlers of each stop, to take events from before it
    :param holds_back: whether an event that is older than those of this stop may still come:
        unless the kernel is to stand, they wait for it
    """

    def __init__(
        self,
        kernel: Kernel,
        events: EventQueue,
        before: Callable[[], None] | None = None,
        holds_back: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(kernel)
        self._events = events
        self._before = before
        self._holds_back = holds_back

    def on_stop(self, stop: Stop) -> bool:
        """Handle a stop of the kernel; events go out before it runs on, if they are in order.

        :return: True to let the kernel run on; False also after an error of a listener
        """
        if self._before is not None:
            self._before()
        going, delivered = False, True
        try:
            going = super().on_stop(stop)
        finally:
            if not (going and self._holds_back()):
                delivered = self._events.deliver()
        return going and delivered
