"""What a watch has found: blocks by the stacks that allocated or freed them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kgdbx.leaks.frames import Frame

__all__ = ("Event", "Group", "Stack", "WatchReport", "group_by_stack")


@dataclass(frozen=True)
class Stack:
    """A stack of a watched module.

    :ivar frames: the allocator or what frees first; empty if the record of it was lost
    :ivar module: whose it is: that of the first frame in a watched module
    :ivar direct: whether that module called the first frame itself
    """

    frames: tuple[Frame, ...]
    module: str
    direct: bool

    @property
    def site(self) -> Frame | None:
        """The first frame in the module."""
        return next((frame for frame in self.frames[1:] if frame.module == self.module), None)


@dataclass(frozen=True)
class Event:
    """A block that was allocated, or a call that freed one.

    :ivar address: of the block, guest-virtual
    :ivar size_bytes: 0 if it is not known
    :ivar time_ns: the guest's monotonic clock
    :ivar comm: name of the task
    :ivar from_interrupt: the task had nothing to do with it
    :ivar freed_by: of a block that outlived its module and was freed later: by whom
    """

    address: int
    size_bytes: int
    stack: Stack
    time_ns: int
    pid: int
    comm: str
    from_interrupt: bool = False
    freed_by: Stack | None = None


@dataclass(frozen=True)
class Group:
    """Events with the same stack, oldest first."""

    stack: Stack
    events: tuple[Event, ...]

    @property
    def size_bytes(self) -> int:
        """Of all its blocks."""
        return sum(event.size_bytes for event in self.events)


@dataclass(frozen=True)
class WatchReport:
    """What is known of one session: from the first of the modules to the last, or until now.

    :ivar session: number, from 1
    :ivar modules: names
    :ivar attached_late: those that were loaded before: their earlier allocations are not known
    :ivar failed_init: those whose init failed
    :ivar over: whether all have gone; else the blocks may still be freed
    :ivar loaded: those that are there now
    :ivar allocations: calls that succeeded, by module
    :ivar frees: of these blocks, by module
    :ivar leaks: blocks that were not freed
    :ivar unallocated: frees by a module of what is not known to be allocated
    :ivar freed_late: blocks that were there when all modules had gone, and were freed later
    :ivar notes: why the numbers may not be the whole truth
    """

    session: int
    modules: tuple[str, ...]
    attached_late: tuple[str, ...]
    failed_init: tuple[str, ...]
    over: bool
    allocations: dict[str, int]
    frees: dict[str, int]
    leaks: tuple[Event, ...]
    unallocated: tuple[Event, ...]
    freed_late: tuple[Event, ...] = ()
    notes: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()

    @property
    def totals(self) -> tuple[int, int, int]:
        """Allocations, possible leaks, unallocated frees."""
        return sum(self.allocations.values()), len(self.leaks), len(self.unallocated)

    @property
    def clean(self) -> bool:
        """Whether there is nothing to look into."""
        return not self.leaks and not self.unallocated and not self.notes


def group_by_stack(events: Iterable[Event]) -> tuple[Group, ...]:
    """One group for each stack; those with most bytes first, then with most events."""
    groups: dict[tuple[object, ...], list[Event]] = {}
    for event in sorted(events, key=lambda e: e.time_ns):
        groups.setdefault(_key(event.stack), []).append(event)
    made = [Group(each[0].stack, tuple(each)) for each in groups.values()]
    return tuple(sorted(made, key=lambda g: (-g.size_bytes, -len(g.events), g.events[0].time_ns)))


def _key(stack: Stack) -> tuple[object, ...]:
    return (stack.module, *_shown(stack.frames, lambda f: (f.function or f.address, f.offset)))


def _shown(
    frames: Iterable[Frame], key: Callable[[Frame], tuple[object, ...]]
) -> Iterator[tuple[object, ...]]:
    # A module that is loaded again lies elsewhere: names tell that a stack is the same.
    for frame in frames:
        yield (frame.module, *key(frame))
