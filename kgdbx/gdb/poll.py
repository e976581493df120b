"""Events of resident probes in gdb, where the user's own ``continue`` lets the kernel run."""

import contextlib
import threading
import traceback

import gdb

from kgdbx.session import Session

__all__ = ("Poller",)

_POLL_S = 0.1


class Poller:
    """Has a session hand out its events again and again, in gdb's own thread.

    It ends with the session, and with gdb.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._taken = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._tick, name="kgdbx-poll", daemon=True).start()

    def _tick(self) -> None:
        while not self._ended.wait(_POLL_S):
            self._taken.clear()
            gdb.post_event(self._take)  # also while the kernel runs
            self._taken.wait()

    def _take(self) -> None:
        try:
            if self._session.closed:
                self._ended.set()
            else:
                self._session.poll()
        except KeyboardInterrupt:  # gdb would drop it
            with contextlib.suppress(gdb.error):  # the kernel stands already
                gdb.execute("interrupt", to_string=True)
        except Exception:  # nobody is there to catch it, and gdb would say next to nothing
            traceback.print_exc()
            self._ended.set()
        finally:
            self._taken.set()
