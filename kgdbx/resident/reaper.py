"""Return slots of tasks that died inside a probed function, or will never return from it."""

import time

from kgdbx.resident.engine import Engine
from kgdbx.resident.program import Program
from kgdbx.symbols.kernel import Kernel

__all__ = ("Reaper",)

_INTERVAL_S = 0.25
_SHARE = 20  # at most one part in as many of the time is spent


class Reaper:
    """Frees slots when calls are missed for want of them.

    As ``kprobe_flush_task()`` does in the kernel, except that the host has to look for the dead.
    """

    def __init__(self, kernel: Kernel, engine: Engine) -> None:
        self._kernel = kernel
        self._engine = engine
        self._due_s = 0.0
        self._missed: dict[Program, int] = {}

    def visit(self) -> None:
        """Look after all return probes, unless that was done just now.

        The guest may run where the host sees its RAM; elsewhere nothing is done until it stands.
        """
        started = time.monotonic()
        if started < self._due_s or (self._kernel.target.running and not self._engine.host.live):
            return
        programs = [p for p in self._engine.programs.values() if p.maxactive]
        self._missed = {p: n for p, n in self._missed.items() if p in programs}
        for program in programs:
            missed = self._engine.counts(program).nmissed
            if missed != self._missed.get(program, 0):
                self._missed[program] = missed
                self._engine.returns.reap(program)
        now = time.monotonic()
        self._due_s = now + max(_INTERVAL_S, _SHARE * (now - started))
