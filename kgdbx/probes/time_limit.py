"""Handlers run for a limited time: the guest stands meanwhile."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from kgdbx.errors import HandlerTimeout

__all__ = ("is_whole", "time_limit")

# Interrupted between a packet and its answer, every later answer would be taken for another one;
# interrupted in the manager, a breakpoint could be in the guest and in no list.
_WHOLE = ("kgdbx.target.", "kgdbx.probes.manager", "kgdbx.probes.site")
_CALLER = "kgdbx.probes.probe"
_RETRY_S = 0.005


@contextlib.contextmanager
def time_limit(limit_s: float | None) -> Iterator[None]:
    """Interrupt the body with :class:`~kgdbx.errors.HandlerTimeout` after a time.

    Handlers of a network driver that wait, or of a kernel whose clock goes on during a stop,
    make the guest's watchdogs fire. Works in the main thread only, where handlers run.

    :param limit_s: seconds; None for no limit
    """
    if not limit_s or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(signum: int, frame: FrameType | None) -> None:
        if is_whole(frame):
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise HandlerTimeout(
            f"handlers ran longer than {limit_s:g} s with the guest stopped; do the work after "
            "the hit, or set session.probes.handler_limit_s in start(session) of the script"
        )

    previous = signal.signal(signal.SIGALRM, expired)
    # Again and again: one that comes just before a system call does not end it.
    signal.setitimer(signal.ITIMER_REAL, limit_s, _RETRY_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def is_whole(frame: FrameType | None) -> bool:
    """Whether a signal meets something that must not be left half done.

    What called the user's handler is no part of that.

    :param frame: of the signal's handler
    """
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(_WHOLE):
            return True
        if module == _CALLER:
            break
        frame = frame.f_back
    return False
