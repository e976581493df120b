"""What all probes have in common: identity, state, counters, recorded faults."""

import abc
import collections
import dataclasses
import enum
import errno
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import drgn

from kgdbx.arch.registers import Registers
from kgdbx.errors import ProbeError
from kgdbx.probes.time_limit import time_limit
from kgdbx.probes.user_trace import user_trace
from kgdbx.symbols.tasks import Task

if TYPE_CHECKING:
    from kgdbx.probes.manager import ProbeManager
    from kgdbx.probes.site import Attachment
    from kgdbx.symbols.kernel import Function, Kernel

__all__ = ("HandlerFault", "Hit", "Point", "Probe", "State")

_FAULTS_KEPT = 16
_serial = itertools.count(1)


class State(enum.Enum):
    """Where a probe is in its life; the words of ``/sys/kernel/debug/kprobes/list``."""

    NEW = "NEW"
    PENDING = "PENDING"  # waits for its module to be loaded
    ENABLED = "ENABLED"
    DISABLED = "DISABLED"
    GONE = "GONE"  # its code was freed: an unloaded module, or a module's finished init
    UNREGISTERED = "UNREGISTERED"


@dataclasses.dataclass(frozen=True)
class Point:
    """One address that a probe watches.

    :ivar address: guest-virtual
    :ivar function: the function whose code is there
    :ivar inlined: name of the inlined function that begins there, or None
    """

    address: int
    function: "Function"
    inlined: str | None = None

    @property
    def offset_bytes(self) -> int:
        """Distance from the start of the function."""
        return self.address - self.function.address

    @property
    def is_entry(self) -> bool:
        """Whether this is the first instruction of a function that is really called."""
        return self.address == self.function.address and self.inlined is None


@dataclasses.dataclass(frozen=True)
class HandlerFault:
    """A handler that raised. The guest goes on.

    :ivar handler: name of the handler
    :ivar error: what it raised
    :ivar trace: its traceback, from the handler on
    """

    handler: str
    error: BaseException
    trace: str


class Hit:
    """One stop at a probe: what handlers may look at and change.

    :ivar kernel: names, types and memory
    :ivar cpu: vCPU, counted from 0
    :ivar regs: its registers, writable
    :ivar tsc: time stamp counter of the hit; None if it is not known
    """

    __slots__ = ("_task", "address", "cpu", "kernel", "regs", "stop_requested", "tsc")

    def __init__(
        self,
        kernel: "Kernel",
        cpu: int,
        regs: Registers,
        address: int,
        tsc: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.tsc = tsc
        self.cpu = cpu
        self.regs = regs
        self.address = address
        self.stop_requested = False
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """The task on this vCPU."""
        if self._task is None:
            self._task = self.kernel.current.task(self.regs)
        return self._task

    def stack_trace(self) -> drgn.StackTrace:
        """The stack that led here, with the true return addresses.

        :raises ValueError: if it cannot be unwound
        """
        program = self.kernel.program
        values = {
            member.name: self.regs[member.name]
            for member in program.type("struct pt_regs").members
            if member.name is not None and member.name in self.regs
        }
        with self.kernel.true_stacks():
            return program.stack_trace(drgn.Object(program, "struct pt_regs", value=values))

    def stop(self) -> None:
        """Leave the kernel standing after this hit."""
        self.stop_requested = True


class Probe(abc.ABC):
    """A probe that can be registered with a :class:`~kgdbx.probes.manager.ProbeManager`.

    A registered probe is a context manager: leaving it unregisters it.

    :param where: ``[module:]function[+offset]``, ``function:line``, or an address
    :param name: shown in listings; must be unique among the registered ones
    :param hardware: use debug registers instead of software breakpoints
    """

    kind = "?"
    tier = "stop"
    """Where hits are handled: at a stop of the kernel, or ``resident`` in the guest."""

    inlined_copies = False
    """Whether the copies of a function that were inlined elsewhere are probed too."""

    def __init__(
        self, where: str | int, *, name: str | None = None, hardware: bool = False
    ) -> None:
        self.where = where
        self.number = next(_serial)
        self.name = name or f"{type(self).__name__.lower()}{self.number}"
        self.hardware = hardware
        self.state = State.NEW
        self.points: tuple[Point, ...] = ()
        self.hits = 0
        self.nmissed = 0
        self.nfaults = 0
        self.faults: collections.deque[HandlerFault] = collections.deque(maxlen=_FAULTS_KEPT)
        self.handler_s = 0.0
        self.notes: tuple[str, ...] = ()
        self.is_internal = False  # one of kgdbx's own, which listings do not show
        self.tier_reason = ""  # why it is not resident, though it might have been
        self.text = f"{self.kind} {where:#x}" if isinstance(where, int) else f"{self.kind} {where}"
        self.manager: ProbeManager | None = None

    @property
    def active(self) -> bool:
        """Whether handlers are called."""
        return self.state is State.ENABLED

    def unregister(self) -> None:
        """Remove the probe; does nothing the second time. May be called from a handler."""
        if self.manager is not None:
            self.manager.unregister(self)

    def enable(self) -> None:
        """Call the handlers again.

        :raises ProbeError: EINVAL if the probe is not registered, or its code is gone
        """
        self._registered().enable(self)

    def disable(self) -> None:
        """Stop calling the handlers, and take the breakpoints out of the guest."""
        self._registered().disable(self)

    def _registered(self) -> "ProbeManager":
        if self.manager is None or self.state in (State.NEW, State.UNREGISTERED):
            raise ProbeError(f"probe {self.name!r} is not registered", errno.EINVAL)
        return self.manager

    @abc.abstractmethod
    def attachments(self) -> tuple["Attachment", ...]:
        """What to attach at each of the :attr:`points`, after :meth:`prepare`."""

    @abc.abstractmethod
    def prepare(self, kernel: "Kernel") -> None:
        """Check the handlers against the probe's :attr:`points`, before anything is inserted.

        :raises ProbeError: EINVAL if a handler does not fit
        """

    def install(self) -> None:  # noqa: B027
        """Do what :meth:`attachments` do not, after them. Nothing here.

        :raises ProbeError: if it cannot be done; nothing is changed then
        """

    def uninstall(self) -> None:  # noqa: B027
        """Undo :meth:`install`; does nothing without."""

    def call(self, handler: Callable[..., Any], name: str, *arguments: Any) -> Any:
        """Run a handler; what it raises is recorded, never passed on.

        :return: the handler's result; None if it raised
        """
        limit_s = self.manager.handler_limit_s if self.manager else None
        start = time.perf_counter()
        try:
            with time_limit(limit_s):
                return handler(*arguments)
        except Exception as e:  # a handler's error must not leave the guest half stopped
            self.record_fault(name, e)
            return None
        finally:
            self.handler_s += time.perf_counter() - start

    def record_fault(self, handler: str, error: Exception) -> None:
        """Keep an error of a handler, count it, and tell the manager's listeners."""
        self.nfaults += 1
        fault = HandlerFault(handler, error, user_trace(error))
        self.faults.append(fault)
        if self.manager is not None:
            self.manager.report_fault(self, fault)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unregister()
