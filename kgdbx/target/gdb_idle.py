"""What a run inside gdb does beside waiting: calls in gdb's own thread, while the kernel runs."""

import threading
from collections.abc import Callable

__all__ = ("IdleThread",)


class IdleThread:
    """Has a function called again and again, with a pause between one's end and the next.

    :param post: has gdb's own thread call what it is given
    :param call: the function
    :param idle_s: seconds of the pause
    """

    def __init__(
        self,
        post: Callable[[Callable[[], None]], None],
        call: Callable[[], None],
        idle_s: float,
    ) -> None:
        self._post = post
        self._call = call
        self._idle_s = idle_s
        self._ended = threading.Event()
        self._called = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="kgdbx-idle", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Post no more."""
        self._ended.set()
        self._called.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._ended.wait(self._idle_s):
            self._called.clear()
            if self._ended.is_set():
                return  # stop() came before the clear()
            self._post(self._take)
            self._called.wait()

    def _take(self) -> None:
        try:
            self._call()
        finally:
            self._called.set()
