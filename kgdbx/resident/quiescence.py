"""Letting the guest run until nothing in it is inside of code that is to change or to go."""

import time
from collections.abc import Callable, Iterable, Sequence

from kgdbx.errors import ProbeError
from kgdbx.resident.guest_call import GuestCaller
from kgdbx.resident.place.displace import Displacement, tasks_inside
from kgdbx.symbols.kernel import Kernel

__all__ = ("Quiescence",)

_MOST_S = 10.0
_STEP_S = 0.01


class Quiescence:
    """Waits for the tasks of a guest, which stands before and after.

    :param caller: how stops that come meanwhile are handled, and whether the guest may run
    """

    def __init__(self, kernel: Kernel, caller: GuestCaller) -> None:
        self._kernel = kernel
        self._caller = caller

    @property
    def must_stand(self) -> bool:
        """Whether the guest must not run on for a moment: a handler runs, or gdb waits for us."""
        return self._caller.handling() is not None or self._kernel.target.in_hit

    def run_on(self) -> None:
        """Let the guest run for a moment.

        :raises ProbeError: if it must stand
        """
        if self.must_stand:
            raise ProbeError("a handler cannot wait for the guest to run on; try again outside")
        self._kernel.target.run(self._caller.dispatch, _STEP_S)

    def wait_until_free(self, displacements: Iterable[Displacement]) -> None:
        """Have nothing stand inside of the bytes that are to give way to jumps.

        :raises ProbeError: if something still does after 10 s
        """
        # A 5-byte NOP is one instruction: nothing can be inside of it.
        ranges = [
            (d.address, d.address + len(d.original)) for d in displacements if not d.is_ftrace_nop
        ]
        deadline = time.monotonic() + _MOST_S
        while ranges and (inside := tasks_inside(self._kernel, ranges)):
            if time.monotonic() > deadline:
                raise ProbeError(f"the bytes to replace are in use: {inside[0]}")
            self.run_on()

    def wait_until_unused(
        self, ranges: Sequence[tuple[int, int]], settled: Callable[[], bool]
    ) -> bool:
        """Let the guest run until nothing in it is inside ranges of addresses, 10 s at most.

        :param ranges: guest-virtual ``(start, end)`` of code
        :param settled: called at each stop; whether nothing comes back to them by other ways
        :return: whether that came to be
        """
        deadline = time.monotonic() + _MOST_S
        while not settled() or tasks_inside(self._kernel, ranges, include_start=True):
            if time.monotonic() > deadline:
                return False
            self.run_on()
        return True
