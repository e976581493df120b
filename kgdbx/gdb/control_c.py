"""^C while the kernel runs under gdb's own ``continue``."""

import signal
from pathlib import Path
from types import FrameType

import gdb

from kgdbx.machine.native import load_library
from kgdbx.probes.time_limit import is_whole
from kgdbx.target.gdb_inferior import GdbInferior

__all__ = ("ControlC",)

_POLLER = "kgdbx.gdb.poll"
_BREAKPOINTS = "kgdbx.target.gdb_breakpoints"
_CALLER = "kgdbx.probes.probe"  # of the user's handlers
_SOURCE = Path(__file__).with_name("sigint.c")


class ControlC:
    """Tells whether ^C was pressed while the kernel runs.

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
        self._seen = self._library.sigint_count()
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
        """The kernel begins to run: ^C is meant for it from the command on that has it run."""
        self.arm()
        self._at_prompt = False

    def over(self) -> None:
        """The kernel stands: what was pressed until now has had its effect."""
        self._seen = self._library.sigint_count()

    @property
    def pressed(self) -> bool:
        """Whether there was a ^C since the last prompt, or since the kernel stands."""
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
        self.over()
        if not self._target.running:
            self._target.forget_stop_request()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if (self._target.in_hit and is_whole(frame)) or _is_called_by_gdb(frame):
            self._target.request_stop()
        else:
            raise KeyboardInterrupt


def _is_called_by_gdb(frame: FrameType | None) -> bool:
    # An exception would get into gdb, which gives up the stop or the watchpoint, or says a word and
    # forgets it: unless it is taken on its way, or a handler of the user is to be interrupted.
    top = frame
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module == _CALLER:
            break
        name = frame.f_code.co_name
        if module == _POLLER:
            return frame is top or name != "_take"
        if module == _BREAKPOINTS and name in ("stop", "invoke"):
            return True
        frame = frame.f_back
    return False
