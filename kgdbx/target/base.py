"""The contract that every transport fulfils; ``tests/contract`` runs over all of them."""

import abc
import dataclasses
import enum
import errno
from collections.abc import Callable, Iterable
from typing import Self

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError

__all__ = (
    "BreakpointKind",
    "Capabilities",
    "DEBUG_REGISTERS",
    "IDLE_S",
    "Stop",
    "StopReason",
    "Target",
    "check_debug_register",
)

IDLE_S = 0.005
"""Seconds between two calls of what a run does beside waiting."""


class BreakpointKind(enum.IntEnum):
    """What a ``Z`` packet inserts; the values are the packet's own numbers."""

    SOFTWARE = 0
    HARDWARE = 1
    WATCH_WRITE = 2
    WATCH_READ = 3
    WATCH_ACCESS = 4


class StopReason(enum.Enum):
    """Why the kernel stopped."""

    TRAP = "trap"  # a breakpoint, or a step that ended
    WATCHPOINT = "watchpoint"
    INTERRUPT = "interrupt"
    SIGNAL = "signal"
    EXITED = "exited"


DEBUG_REGISTERS = 4
"""Debug registers of an x86-64 vCPU, shared by breakpoints and watchpoints."""

_WATCHED_BYTES = 8


def check_debug_register(
    inserted: Iterable[tuple[BreakpointKind, int, int]], kind: BreakpointKind, size_bytes: int
) -> None:
    """Check that a breakpoint finds a debug register, if it needs one.

    A watchpoint of more than 8 bytes does not fit into one: emulators have such watchpoints.

    :param inserted: kind, address and size of what is there
    :raises ProbeError: ENOSPC if all are taken
    """

    def takes(kind: BreakpointKind, size_bytes: int) -> bool:
        return kind is not BreakpointKind.SOFTWARE and size_bytes <= _WATCHED_BYTES

    if takes(kind, size_bytes) and sum(takes(k, n) for k, _, n in inserted) >= DEBUG_REGISTERS:
        raise ProbeError(
            f"all {DEBUG_REGISTERS} debug registers are in use; remove a hardware breakpoint or "
            "watchpoint first, or use a software breakpoint",
            errno.ENOSPC,
        )


@dataclasses.dataclass(frozen=True)
class Stop:
    """One stop of the kernel. All vCPUs stand still.

    :ivar cpu: the vCPU that stopped, counted from 0
    :ivar address: guest-virtual address that a watchpoint reports, otherwise None
    :ivar signal: the stub's signal number
    """

    cpu: int
    reason: StopReason
    address: int | None = None
    signal: int = 5


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What a transport can do.

    :ivar hardware_breakpoints: debug registers per vCPU, shared by breakpoints and watchpoints
    :ivar software_breakpoints: most addresses that can have one until the target is closed; None
        for no limit
    :ivar physical_memory: guest-physical addresses can be read and written at a stop
    :ivar reads_while_running: memory can be read without stopping the kernel
    :ivar writes_while_running: guest-physical memory can be written without stopping the kernel
    :ivar writes_code: code can be written at a stop, though the kernel protects it
    :ivar cheap_watchpoints: a stop at a watchpoint costs a fraction of one at a breakpoint, and
        the kernel can run on between two handlers of a stop
    """

    hardware_breakpoints: int
    software_breakpoints: int | None
    physical_memory: bool
    reads_while_running: bool
    writes_while_running: bool
    writes_code: bool = True
    cheap_watchpoints: bool = False


class Target(abc.ABC):
    """A kernel under control. Addresses are guest-virtual unless a name says physical.

    A target is a context manager; leaving it removes every breakpoint and lets the kernel run on.
    Everything that waits has a deadline and raises :class:`~kgdbx.errors.TargetTimeout` when it
    passes, or :class:`~kgdbx.errors.TargetLost` as soon as the guest is gone.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Where this target is attached, for messages."""

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What this transport can do."""

    @property
    @abc.abstractmethod
    def running(self) -> bool:
        """Whether the kernel runs now."""

    @property
    def in_hit(self) -> bool:
        """Whether a debugger that we are guests of waits for our answer to a stop: until then
        :meth:`run` ends by another stop only, not by its time.
        """
        return False

    def look_at(self, cpu: int) -> None:  # noqa: B027 (asked only where watchpoints are cheap)
        """During a stop that is being handled: say which vCPU it is about, if that is not the one
        that the stub reports. :meth:`run` and gdb tell of it.
        """

    @abc.abstractmethod
    def cpus(self) -> tuple[int, ...]:
        """Numbers of all vCPUs, counted from 0."""

    @abc.abstractmethod
    def read_memory(self, address: int, size_bytes: int, *, cpu: int | None = None) -> bytes:
        """Read virtual memory through a vCPU's page tables.

        :param cpu: the vCPU; by default the one that stopped last
        :raises MemoryFault: if any byte cannot be read
        """

    @abc.abstractmethod
    def write_memory(self, address: int, data: bytes, *, cpu: int | None = None) -> None:
        """Write virtual memory, read-only pages and kernel text included.

        :raises MemoryFault: if any byte cannot be written
        """

    @abc.abstractmethod
    def read_physical(self, address: int, size_bytes: int) -> bytes:
        """Read guest-physical memory.

        :raises MemoryFault: if any byte is not RAM; QEMU's stub alone, without the guest's RAM
            seen from the host, gives zeros instead
        :raises Unsupported: if the transport reaches virtual memory only
        """

    @abc.abstractmethod
    def write_physical(self, address: int, data: bytes) -> None:
        """Write guest-physical memory.

        At a stop also code is written: the stub drops its translation of it. While the kernel
        runs, data only, and each vCPU sees it when its processor would show it another one's.

        :raises MemoryFault: if any byte is not RAM
        :raises Unsupported: if the transport reaches virtual memory only, or the kernel runs and
            the transport has no ``writes_while_running``
        """

    @abc.abstractmethod
    def flush_translations(self) -> None:
        """Have every vCPU forget cached address translations, after page tables were changed at
        a stop.

        :raises Unsupported: if the stub has no way to do that
        """

    @abc.abstractmethod
    def read_registers(self, cpu: int) -> Registers:
        """Registers of a stopped vCPU."""

    @abc.abstractmethod
    def write_registers(self, cpu: int, registers: Registers) -> None:
        """Write back the registers that were changed since they were read."""

    @abc.abstractmethod
    def insert_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        """Insert a breakpoint or watchpoint at a stop.

        :param size_bytes: for a watchpoint 1, 2, 4 or 8, and the address a multiple of it
        :raises ProbeError: ENOSPC if no debug register is free, EBUSY if it is there already
        :raises Unsupported: if the stub has no breakpoints of this kind
        """

    @abc.abstractmethod
    def remove_breakpoint(self, kind: BreakpointKind, address: int, size_bytes: int = 1) -> None:
        """Remove a breakpoint; one that is not there is left alone."""

    @abc.abstractmethod
    def step(self, cpu: int) -> Stop:
        """Execute one instruction on one vCPU, past a breakpoint under it, with interrupts held
        off where the stub can do that; the other vCPUs stand still.
        """

    @abc.abstractmethod
    def resume(self) -> None:
        """Let all vCPUs run."""

    @abc.abstractmethod
    def interrupt(self) -> Stop:
        """Stop the kernel now, or return the last stop if it stands already."""

    @abc.abstractmethod
    def run(
        self,
        on_stop: Callable[[Stop], bool] | None = None,
        timeout_s: float | None = None,
        on_idle: Callable[[], None] | None = None,
        idle_s: float = IDLE_S,
    ) -> Stop | None:
        """Let the kernel run until a stop that *on_stop* does not pass over.

        What either function raises comes out when the kernel stands.

        :param on_stop: called at each stop with the kernel standing; True lets it run on
        :param timeout_s: seconds to run; None for no limit
        :param on_idle: called again and again while the kernel runs, in the same thread; it may
            do what the target can do with a running kernel
        :param idle_s: seconds from its end to its next call, about; stops that come faster do
            not hold it off
        :return: the stop, or None if the time passed first; then the kernel was stopped
        """

    @abc.abstractmethod
    def request_stop(self) -> None:
        """End the :meth:`run` in progress as if its time had passed, or else the next one.

        May be called from a signal handler or another thread.
        """

    @abc.abstractmethod
    def forget_stop_request(self) -> None:
        """Drop a stop request that came after the run that it was meant for."""

    @abc.abstractmethod
    def close(self, *, resume: bool = True) -> None:
        """Remove every breakpoint and disconnect; does nothing the second time.

        :param resume: let the kernel run on; otherwise it is left standing
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
