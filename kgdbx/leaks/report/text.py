"""The report that people read, in the form that KEDR's users know."""

from collections.abc import Iterator

from kgdbx.leaks.findings import Event, Group, Stack, WatchReport, group_by_stack
from kgdbx.leaks.frames import FrameNames
from kgdbx.leaks.report.finding import lines_of

__all__ = ("watch_text",)

_RULE = "-" * 40


def watch_text(report: WatchReport, names: FrameNames) -> str:
    """What a watch has found in one session.

    :param names: knows the lines of frames
    """
    return "\n".join(_lines(report, names)) + "\n"


def _lines(report: WatchReport, names: FrameNames) -> Iterator[str]:
    for module in report.modules:
        yield f"Target module: {module!r}, {_state(report, module)}"
    allocations, leaks, unallocated = report.totals
    yield f"Allocations: {allocations}"
    yield f"{'Possible leaks' if report.over else 'Not yet freed'}: {leaks}{_shares(report.leaks)}"
    yield f"Unallocated frees: {unallocated}{_shares(report.unallocated)}"
    if report.freed_late:
        yield f"Freed after the unload: {len(report.freed_late)}"
    if len(report.modules) > 1:
        for module in report.modules:
            yield f"  {module}: {report.allocations[module]} allocations"
    for note in report.notes:
        yield f"Note: {note}"
    for title, events, what in (
        ("Possible leaks" if report.over else "Not yet freed", report.leaks, "allocation"),
        ("Unallocated frees", report.unallocated, "deallocation"),
        ("Freed after the unload", report.freed_late, "allocation"),
    ):
        groups = group_by_stack(events)
        if groups:
            yield f"\n{title}:"
        for group in groups:
            yield from _group(group, what, names)


def _group(group: Group, what: str, names: FrameNames) -> Iterator[str]:
    first = group.events[0]
    yield "<IRQ>" if first.from_interrupt else f"Process: {first.comm} (PID: {first.pid})"
    size = f", size: {first.size_bytes or 'unknown'}" if what == "allocation" else ""
    yield f"Address: {first.address:#x}{size}; stack trace of the {what}:"
    yield from _stack(group.stack, names)
    more = len(group.events) - 1
    if more:
        yield f"+{more} more {what}(s) with the same call stack."
    for by, count in _freed_by(group.events):
        blocks = "" if count == 1 else f" ({count} blocks)"
        yield f"Freed later by {f'module {by.module}' if by.module else 'the kernel'}{blocks}:"
        yield from _stack(by, names)
    yield _RULE


def _stack(stack: Stack, names: FrameNames) -> Iterator[str]:
    if not stack.frames:
        yield "(the stack was lost: a ring was full)"
    for line in lines_of(stack, names):
        yield f"[<{line.address:016x}>] {line.text}{f' ({line.place})' if line.place else ''}"


def _freed_by(events: tuple[Event, ...]) -> tuple[tuple[Stack, int], ...]:
    counts: dict[Stack, int] = {}
    for event in events:
        if event.freed_by is not None:
            counts[event.freed_by] = counts.get(event.freed_by, 0) + 1
    return tuple(counts.items())


def _shares(events: tuple[Event, ...]) -> str:
    # A module is also charged with what others do on its behalf.
    indirect = sum(not event.stack.direct for event in events)
    if not indirect:
        return ""
    return f" ({len(events) - indirect} by the module itself, {indirect} through other code)"


def _state(report: WatchReport, module: str) -> str:
    if module in report.failed_init:
        return "its init failed"
    return "loaded" if module in report.loaded else "unloaded"
