"""What a run does beside waiting for the kernel's next stop."""

import math
import time
from collections.abc import Callable

__all__ = ("IdleCalls",)


class IdleCalls:
    """Calls a function again and again, with a pause between one's end and the next.

    :param on_idle: the function; None for no calls
    :param idle_s: seconds of the pause
    :ivar due: when the next call is due, on the clock of :func:`time.monotonic`
    """

    def __init__(self, on_idle: Callable[[], None] | None, idle_s: float) -> None:
        self._on_idle = on_idle
        self._idle_s = idle_s
        self.due = math.inf if on_idle is None else time.monotonic() + idle_s

    def call_if_due(self) -> None:
        """Call the function if its time has come."""
        if self._on_idle is not None and time.monotonic() >= self.due:
            self._on_idle()
            self.due = time.monotonic() + self._idle_s
