"""What ends a run of the kernel from outside: signals, and the end of a command in the guest."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

from kgdbx.probes.event_queue import EventQueue
from kgdbx.target.base import Target

__all__ = ("GuestCommand", "raise_interrupt", "stop_at_end", "stop_on_signals")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What drgn calls: an exception that it takes for memory that is not there would be lost.
_WHOLE = "kgdbx.symbols.program"
_RETRY_S = 0.005


class GuestCommand(Protocol):
    """A command under way in the guest."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""


def raise_interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler of ``^C`` where no kernel runs: as Python's own, but not while drgn reads memory.

    :raises KeyboardInterrupt: when drgn is through
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == _WHOLE:
            again = threading.Timer(_RETRY_S, signal.raise_signal, (signum,))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def stop_on_signals(target: Target, done: threading.Event, events: EventQueue) -> Iterator[None]:
    """While the block runs, ^C sets *done* and stops the target where nothing is half done.

    So do requests to end the process, which then goes on with its way out; not what the process
    was started to ignore, as by nohup(1), and not what is handled by others than Python: gdb deals
    with those itself.

    :raises SystemExit: after the block, if the process was asked to end
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        done.set()
        events.hurry = True
        target.request_stop()

    handlers = {number: signal.getsignal(number) for number in _ENDING}
    previous = {
        number: handler
        for number, handler in handlers.items()
        if handler is not None and (number == signal.SIGINT or handler != signal.SIG_IGN)
    }
    for number in previous:
        signal.signal(number, note)
    try:
        yield
    except KeyboardInterrupt:
        if not caught:
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for signum in caught:
        if signum != signal.SIGINT:
            raise SystemExit(128 + signum)


@contextlib.contextmanager
def stop_at_end(
    target: Target, command: GuestCommand | None, done: threading.Event
) -> Iterator[None]:
    """While the block runs, the end of a guest's command sets *done* and stops the target.

    The guest's agent answers on its own line; watching it needs no stop of the guest.
    """
    if command is None:
        yield
        return
    quit_event = threading.Event()

    def watch() -> None:
        while not quit_event.is_set():
            if command.poll() is not None:
                done.set()
                target.request_stop()
                return
            quit_event.wait(0.02)

    thread = threading.Thread(target=watch, name="kgdbx-guest-command", daemon=True)
    thread.start()
    try:
        yield
    finally:
        quit_event.set()
        thread.join()
