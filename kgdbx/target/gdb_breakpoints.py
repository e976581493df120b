"""gdb's breakpoints: ours, which the user does not see, and the user's."""

import errno
from collections.abc import Callable, Iterator
from typing import Any

import gdb

from kgdbx.errors import ProbeError
from kgdbx.target.base import BreakpointKind, check_debug_register

__all__ = ("GdbBreakpoint", "GdbBreakpoints", "Key", "user_breakpoints")

Key = tuple[BreakpointKind, int, int]
"""Kind, guest-virtual address, and size in bytes."""

_WORDS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long"}
_LONGEST = "unsigned long"  # of what is longer, gdb watches the beginning


class GdbBreakpoint(gdb.Breakpoint):
    """One of ours.

    :param ask: asked in place of a condition; whether gdb shall stop
    :param made_at: number of the hit during which it is made; None if gdb asks about none
    :ivar retired_at: number of the hit during which it was removed
    """

    def __init__(
        self, key: Key, ask: Callable[["GdbBreakpoint"], bool], made_at: int | None
    ) -> None:
        self.key = key
        self.made_at = made_at
        self.retired_at = 0
        self._ask = ask
        kind, address, size_bytes = key
        if kind is BreakpointKind.SOFTWARE:
            super().__init__(f"*{address:#x}", gdb.BP_BREAKPOINT, internal=True)
        elif kind is BreakpointKind.HARDWARE:
            super().__init__(f"*{address:#x}", gdb.BP_HARDWARE_BREAKPOINT, internal=True)
        else:
            expression = f"*({_WORDS.get(size_bytes, _LONGEST)} *){address:#x}"
            classes = {
                # gdb passes over a write that leaves the value as it was; this one never does.
                # An argument of the function would be watched by single steps.
                BreakpointKind.WATCH_WRITE: (f"$_kgdbx_new() + 0 * {expression}", gdb.WP_WRITE),
                BreakpointKind.WATCH_READ: (expression, gdb.WP_READ),
                BreakpointKind.WATCH_ACCESS: (expression, gdb.WP_ACCESS),
            }
            what, wp_class = classes[kind]
            super().__init__(what, gdb.BP_WATCHPOINT, wp_class, internal=True)
        self.silent = True

    def stop(self) -> bool:
        """Whether gdb shall stop."""
        return self._ask(self)


class GdbBreakpoints:
    """Ours, by what they are. Iterating gives the keys.

    :param ask: asked at each hit whether gdb shall stop; must not raise
    """

    def __init__(self, ask: Callable[[GdbBreakpoint], bool]) -> None:
        self._ask = ask
        self._inserted: dict[Key, GdbBreakpoint] = {}
        self._retired: list[GdbBreakpoint] = []  # disabled, to be deleted at a safe moment
        _New()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._inserted)

    def holds(self, ours: GdbBreakpoint) -> bool:
        """Whether a breakpoint is still inserted."""
        return self._inserted.get(ours.key) is ours

    def at(self, pc: int) -> GdbBreakpoint | None:
        """What stops the kernel before the instruction at an address."""
        software = self._inserted.get((BreakpointKind.SOFTWARE, pc, 1))
        return software or self._inserted.get((BreakpointKind.HARDWARE, pc, 1))

    def check_new(self, key: Key) -> None:
        """Check that nothing of ours is there.

        :raises ProbeError: EBUSY if it is
        """
        if key in self._inserted:
            kind, address, _ = key
            raise ProbeError(f"there is a {kind.name} breakpoint at {address:#x}", errno.EBUSY)

    def is_retired(self, key: Key) -> bool:
        """Whether one was removed that gdb has not deleted yet."""
        return any(each.key == key for each in self._retired)

    def made_during(self, hit: int) -> list[Key]:
        """What was inserted during a hit: gdb puts it into the guest when it goes on."""
        return [key for key, each in self._inserted.items() if each.made_at == hit]

    def insert(self, key: Key, hit: int | None) -> None:
        """Insert a breakpoint or watchpoint.

        :param hit: number of the hit that gdb asks about; None if it asks about none
        :raises ProbeError: EBUSY if it is there; ENOSPC if there is no debug register, or gdb
            refuses it
        """
        self.check_new(key)
        kind, address, size_bytes = key
        check_debug_register(self._inserted, kind, size_bytes)
        for retired in self._retired:
            if retired.key == key:
                self._retired.remove(retired)
                retired.enabled = True
                retired.made_at = hit
                self._inserted[key] = retired
                return
        try:
            self._inserted[key] = GdbBreakpoint(key, self._ask, hit)
        except (gdb.error, RuntimeError) as e:
            raise ProbeError(
                f"gdb refuses a {kind.name} breakpoint at {address:#x}: {e}", errno.ENOSPC
            ) from e

    def remove(self, key: Key, hit: int | None) -> None:
        """Remove one; does nothing if it is not there.

        :param hit: number of the hit that gdb asks about; None if it asks about none
        """
        found = self._inserted.pop(key, None)
        if found is None:
            return
        if hit is None:
            found.delete()
        else:
            # gdb 13 crashes when it reports a hit of a breakpoint that is deleted meanwhile.
            # Disabling takes it out of the guest.
            found.enabled = False
            found.retired_at = hit
            self._retired.append(found)

    def delete_retired(self) -> None:
        """Delete what was removed during hits; gdb asks about none."""
        while self._retired:
            self._retired.pop(0).delete()

    def delete_retired_before(self, hit: int, address: int) -> None:
        """During a hit, delete what gdb does not look at for this stop: it lies elsewhere, and no
        watchpoint is among it.

        :param hit: its number
        :param address: where it is
        """
        for each in tuple(self._retired):
            kind, at, _ = each.key
            elsewhere = kind < BreakpointKind.WATCH_WRITE and at != address
            if elsewhere and each.retired_at < hit:
                self._retired.remove(each)
                each.delete()

    def delete_all(self) -> None:
        """Delete all of ours; gdb asks about none."""
        self.delete_retired()
        for each in self._inserted.values():
            each.delete()
        self._inserted.clear()

    def forget(self) -> None:
        """gdb is not connected any more."""
        self._inserted.clear()
        self._retired.clear()

    @property
    def are_all(self) -> bool:
        """Whether gdb has no other breakpoints."""
        return len(gdb.breakpoints()) == len(self._inserted) + len(self._retired)

    @property
    def has_users(self) -> bool:
        """Whether breakpoints of the user are enabled."""
        return any(b.enabled for b in gdb.breakpoints() if not isinstance(b, GdbBreakpoint))


class _New(gdb.Function):
    # Convenience function that has another value each time.

    def __init__(self) -> None:
        super().__init__("_kgdbx_new")
        self._count = 0

    def invoke(self) -> int:
        """Its value."""
        self._count += 1
        return self._count


def user_breakpoints(pc: int) -> Iterator[Any]:
    """Breakpoints of the user that are enabled at an address."""
    for each in gdb.breakpoints():
        code = each.type in (gdb.BP_BREAKPOINT, gdb.BP_HARDWARE_BREAKPOINT)
        if code and each.enabled and not isinstance(each, GdbBreakpoint):
            locations = getattr(each, "locations", ())  # not before gdb 13
            if any(location.enabled and location.address == pc for location in locations):
                yield each
