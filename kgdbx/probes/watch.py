"""Data watch: a handler when memory is accessed, by a debug register."""

import errno
from collections.abc import Callable
from typing import Any

from kgdbx.errors import ProbeError
from kgdbx.probes.context import context_suppliers
from kgdbx.probes.handler import Supplier, bind_handler
from kgdbx.probes.probe import Hit, Probe, State
from kgdbx.probes.site import Attachment
from kgdbx.symbols.kernel import Kernel
from kgdbx.target.base import BreakpointKind, Stop

__all__ = ("Watch", "Watches")

_KINDS = {
    "w": BreakpointKind.WATCH_WRITE,
    "r": BreakpointKind.WATCH_READ,
    "rw": BreakpointKind.WATCH_ACCESS,
}


class Watch(Probe):
    """Watch kernel data.

    The handler runs after the access, with ``regs.ip`` at the next instruction, and names ``old``
    and ``new`` (unsigned values before and after), ``p``, ``regs``, ``hit``, ``task``, ``cpu``,
    ``kernel``. Each watched place takes a debug register, of which x86 has four.

    :param where: name of a kernel variable, or an address
    :param handler: runs after each access
    :param size_bytes: 1, 2, 4 or 8; the address must be a multiple of it
    :param access: ``w`` for writes, ``r`` for reads, ``rw`` for both
    """

    kind = "w"

    def __init__(
        self,
        where: str | int,
        handler: Callable[..., Any] | None = None,
        *,
        size_bytes: int = 8,
        access: str = "w",
        name: str | None = None,
    ) -> None:
        super().__init__(where, name=name, hardware=True)
        if access not in _KINDS:
            raise ProbeError(f"access {access!r} is not one of {', '.join(_KINDS)}")
        if size_bytes not in (1, 2, 4, 8):
            raise ProbeError(f"a debug register watches 1, 2, 4 or 8 bytes, not {size_bytes}")
        self.handler = handler
        self.access = access
        self.size_bytes = size_bytes
        self.address = 0
        self.old = 0
        self.new = 0
        self._call: Callable[[Hit], Any] | None = None

    @property
    def breakpoint_kind(self) -> BreakpointKind:
        """What to insert."""
        return _KINDS[self.access]

    def prepare(self, kernel: Kernel) -> None:
        if self.address % self.size_bytes:
            raise ProbeError(
                f"{self.address:#x} is not a multiple of {self.size_bytes}; a debug register "
                "watches aligned memory: use a smaller size"
            )
        self.new = self._value(kernel)
        if self.handler is not None:
            suppliers: dict[str, Supplier] = {
                **context_suppliers(self),
                "old": lambda hit: self.old,
                "new": lambda hit: self.new,
            }
            self._call = bind_handler(self.handler, suppliers, f"the watch of {self.where}")

    def attachments(self) -> tuple[Attachment, ...]:
        return ()

    @property
    def register(self) -> tuple[BreakpointKind, int, int]:
        """What its debug register holds; watches of the same share one."""
        return self.breakpoint_kind, self.address, self.size_bytes

    def covers(self, address: int) -> bool:
        """Whether an access at an address is one that is watched."""
        return self.address <= address < self.address + self.size_bytes

    def accessed(self, hit: Hit) -> None:
        """Runs after an access."""
        self.hits += 1
        self.old, self.new = self.new, self._value(hit.kernel)
        if self._call is not None:
            self.call(self._call, "handler", hit)

    def _value(self, kernel: Kernel) -> int:
        return int.from_bytes(kernel.memory.read(self.address, self.size_bytes), "little")


class Watches:
    """The watches of a manager; those of the same place share a debug register."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._watches: list[Watch] = []

    def __bool__(self) -> bool:
        return bool(self._watches)

    def place(self, watch: Watch) -> None:
        """Arm a watch.

        :raises ProbeError: ENOENT if there is no such variable, ENOSPC if no debug register is free
        """
        if isinstance(watch.where, int):
            watch.address = watch.where
        else:
            address = self._kernel.object_address(watch.where)
            if address is None:
                raise ProbeError(f"there is no variable {watch.where!r}", errno.ENOENT)
            watch.address = address
        watch.prepare(self._kernel)
        if not self._is_armed(watch):
            self._kernel.target.insert_breakpoint(*watch.register)
        self._watches.append(watch)
        watch.state = State.ENABLED

    def withdraw(self, watch: Watch) -> None:
        """Disarm a watch; does nothing if it is not armed."""
        if watch in self._watches:
            self._watches.remove(watch)
            if not self._is_armed(watch):
                self._kernel.target.remove_breakpoint(*watch.register)

    def accessed(self, hit: Hit, stop: Stop) -> None:
        """Run the handlers of the watches that a watchpoint's stop is about."""
        assert stop.address is not None
        for watch in tuple(self._watches):
            if watch.active and watch.covers(stop.address):
                hit.address = hit.regs.rip
                watch.accessed(hit)

    def _is_armed(self, watch: Watch) -> bool:
        return any(other.register == watch.register for other in self._watches)
