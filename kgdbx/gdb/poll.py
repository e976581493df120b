"""What goes on beside the user's own ``continue`` in gdb: events of resident probes, and ^C."""

import contextlib
import os
import threading
import traceback

import gdb

from kgdbx.errors import TargetLost
from kgdbx.gdb.control_c import ControlC
from kgdbx.session import Session
from kgdbx.target.gdb_inferior import GdbInferior

__all__ = ("Poller",)

_POLL_S = 0.1
# Of a flood of events gdb takes some at a time, and commands and ^C in between.
_BUDGET_S = 0.03
_PAUSE_S = 0.005
_AT_STOP_S = 2.0
_AT_KEY_S = 0.3  # somebody waits for the prompt


class Poller:
    """Has a session hand out its events in gdb's own thread: again and again while the kernel
    runs, and when it stops. And has a kernel stop that is asked to, until it stands: a break-in is
    lost if the kernel stands at a breakpoint just then. It ends with the session.

    gdb crashes if it exits with an event that was posted and not taken. So nothing is posted
    but while there are resident probes, or the kernel is to stop, and the kernel runs, and the
    session is not being closed: to take those probes out, the kernel runs once more, and gdb takes
    the event. A gdb that is ended by a signal while the kernel runs takes none any more: it ends
    without its own ending then, whose work is to let go of the kernel, which was done.

    :param target: the session's
    :param keys: whether ^C comes to gdb
    """

    def __init__(self, session: Session, target: GdbInferior, *, keys: bool) -> None:
        self._session = session
        self._target = target
        self._control_c = ControlC(target) if keys else None
        if self._control_c is not None:
            target.on_hit = self._control_c.arm
        self._runs = threading.Event()
        self._taken = threading.Event()
        self._taken.set()
        self._rest = False
        self._posting = threading.Lock()
        self._over = False
        gdb.events.cont.connect(self._on_cont)
        gdb.events.stop.connect(self._on_stop)
        gdb.events.gdb_exiting.connect(self._on_exit)
        threading.Thread(target=self._tick, name="kgdbx-poll", daemon=True).start()

    def _on_cont(self, event: object) -> None:
        if not self._runs.is_set():
            if self._control_c is not None:
                self._control_c.begin()
            self._runs.set()

    def _on_stop(self, event: object) -> None:
        with self._posting:  # what comes now is the way out, perhaps: nothing more is posted
            self._runs.clear()
            if not self._target.in_run:
                self._target.forget_stop_request()
        pressed = self._control_c is not None and self._control_c.pressed
        self._take(_AT_KEY_S if pressed else _AT_STOP_S)
        if self._control_c is not None:
            self._control_c.over()
            if not self._target.in_run:
                self._target.forget_stop_request()
        if self._rest and not self._session.closed:
            gdb.write("kgdbx: more events wait; they are shown when the kernel runs on\n")

    def _on_exit(self, event: gdb.GdbExitingEvent) -> None:
        with self._posting:
            self._over = True
        if not self._taken.is_set():
            gdb.flush()
            os._exit(getattr(event, "exit_code", 0))

    def _tick(self) -> None:
        pause = threading.Event()
        while not self._session.closed:
            self._runs.wait()
            pause.wait(_PAUSE_S if self._rest else _POLL_S)
            if self._post():
                self._taken.wait()

    def _post(self) -> bool:
        with self._posting:
            if not self._runs.is_set() or self._session.closed or self._over:
                return False
            if (keys := self._control_c) is not None and keys.pressed:
                self._target.request_stop()
            if self._session.resident.engine.is_open or self._target.stop_requested:
                self._taken.clear()
                gdb.post_event(self._beside)
                return True
        return False

    def _beside(self) -> None:
        # Posted. The kernel may have stopped since: then all is done.
        try:
            if self._runs.is_set():
                self._take(_BUDGET_S)
        finally:
            self._taken.set()

    def _take(self, budget_s: float) -> None:
        try:
            if self._control_c is not None:
                self._control_c.arm()
            if self._session.closed:
                self._end()
                return
            if self._target.stop_requested and self._runs.is_set():
                self._interrupt()
            self._rest = self._session.poll(budget_s)
        except KeyboardInterrupt:  # gdb would drop it
            if self._runs.is_set():
                self._target.request_stop()
                self._interrupt()
        except TargetLost:  # gdb tells
            self._end()
        except Exception:  # nobody is there to catch it, and gdb would say next to nothing
            traceback.print_exc()
            self._end()

    def _interrupt(self) -> None:
        with contextlib.suppress(gdb.error):  # the kernel stands already
            gdb.execute("interrupt", to_string=True)

    def _end(self) -> None:
        with self._posting:
            if self._over:
                return
            self._over = True
        if self._control_c is not None:
            self._control_c.end()
            self._control_c = None
        gdb.events.cont.disconnect(self._on_cont)
        gdb.events.stop.disconnect(self._on_stop)
        gdb.events.gdb_exiting.disconnect(self._on_exit)
