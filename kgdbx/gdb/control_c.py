"""^C while the kernel runs under gdb's own ``continue``."""

import signal
from pathlib import Path
from types import FrameType

import gdb

from kgdbx.machine.native import load_library
from kgdbx.probes.time_limit import is_whole
from kgdbx.target.gdb_inferior import GdbInferior

__all__ = ("ControlC",)

_SOURCE = Path(__file__).with_name("sigint.c")


class ControlC:
    """Tells whether ^C was pressed since the kernel runs.

    gdb passes ^C on to the stub once. It is lost if the kernel stands just then, which under steady
    hits of breakpoints it does most of the time, or if gdb deals with a stop. So it is counted
    before gdb gets it. In the middle of a hit it is a request to stop at its end, so that no
    instruction is left half done; handlers of the user are interrupted.

    :param target: whose hits these are
    :raises MachineError: if there is no gcc
    """

    def __init__(self, target: GdbInferior) -> None:
        self._target = target
        self._library = load_library(_SOURCE)
        self._seen = 0
        self._at_prompt = False
        self.arm()
        # Python's handler is called where gdb has its own; for the rest ours has to come back.
        signal.signal(signal.SIGINT, self._on_signal)
        self.arm()
        gdb.events.before_prompt.connect(self._on_prompt)

    def arm(self) -> None:
        """Come before gdb's handler, which gdb puts back at times; in gdb's thread only."""
        self._library.count_sigint()

    def begin(self) -> None:
        """The kernel begins to run: ^C is meant for it from now on."""
        self.arm()
        self._at_prompt = False
        self._seen = self._library.sigint_count()

    @property
    def pressed(self) -> bool:
        """Whether there was a ^C that gdb's prompt had no use for."""
        return not self._at_prompt and bool(self._library.sigint_count() != self._seen)

    def end(self) -> None:
        """Leave ^C to gdb."""
        gdb.events.before_prompt.disconnect(self._on_prompt)
        if signal.getsignal(signal.SIGINT) == self._on_signal:  # not that of a later session
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.arm()

    def _on_prompt(self) -> None:
        # A kernel that runs while gdb takes commands: ^C ends the command, or the line.
        self._at_prompt = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._target.in_hit and is_whole(frame):
            self._target.request_stop()
        else:
            raise KeyboardInterrupt
