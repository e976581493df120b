"""One thing that an audit complains of, with all that the forms of a report need of it."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from kgdbx.leaks.findings import Group, Stack, WatchReport, group_by_stack
from kgdbx.leaks.frames import FrameNames

__all__ = (
    "AuditReport",
    "CacheGrowth",
    "Finding",
    "RULES",
    "Trace",
    "from_watch",
    "lines_of",
    "tell_lost",
)

RULES = {
    "leak": "memory that was allocated and never freed",
    "freed-late": "memory that outlived its module and was freed later",
    "unallocated-free": "a free of what is not known to be allocated",
    "unreferenced": "memory that nothing in the kernel points to",
    "dangling": "a pointer to memory that was freed",
}
"""What the kinds of findings mean."""


@dataclass(frozen=True)
class Trace:
    """A line of a stack.

    :ivar text: ``function+0xoff/0xlen [module]``
    :ivar file: source file, or empty
    :ivar line: 1-based, or 0
    """

    text: str
    address: int = 0
    file: str = ""
    line: int = 0

    @property
    def function(self) -> str:
        """The name alone."""
        return self.text.partition("+")[0]

    @property
    def place(self) -> str:
        """``file:line``, or empty."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(frozen=True)
class Finding:
    """Blocks, or calls, with the same stack.

    :ivar rule: one of :data:`RULES`
    :ivar module: whose it is; empty if that is not known
    :ivar message: one line, lower case
    :ivar addresses: of the blocks, guest-virtual
    :ivar sizes: bytes of each; 0 if not known
    :ivar stack: innermost first; empty if it is not known
    :ivar site: the line of the stack that the module's author looks for
    :ivar freed_by: the stack of a late free
    :ivar direct: whether the module called the first function of the stack itself
    :ivar failing: whether it makes an audit fail
    """

    rule: str
    module: str
    message: str
    addresses: tuple[int, ...]
    sizes: tuple[int, ...]
    stack: tuple[Trace, ...] = ()
    site: Trace | None = None
    freed_by: tuple[Trace, ...] = ()
    comm: str = ""
    pid: int = 0
    time_ns: int = 0
    from_interrupt: bool = False
    direct: bool = True
    failing: bool = True

    @property
    def size_bytes(self) -> int:
        """Of all."""
        return sum(self.sizes)


@dataclass(frozen=True)
class CacheGrowth:
    """Objects of a slab cache before and after.

    :ivar object_bytes: size of one
    """

    name: str
    before: int
    after: int
    object_bytes: int

    @property
    def growth_bytes(self) -> int:
        """More than before; less is negative."""
        return (self.after - self.before) * self.object_bytes


@dataclass(frozen=True)
class AuditReport:
    """All that an audit has found.

    :ivar modules: names
    :ivar kernel: its release
    :ivar allocations: calls that succeeded
    :ivar command: what was run, or empty
    :ivar status: its exit status; None if it did not end
    :ivar notes: why the numbers may not be the whole truth
    :ivar checks: what was looked for
    """

    modules: tuple[str, ...]
    kernel: str
    allocations: int
    findings: tuple[Finding, ...]
    command: str = ""
    status: int | None = 0
    notes: tuple[str, ...] = ()
    checks: tuple[str, ...] = ("watch",)
    caches: tuple[CacheGrowth, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong: no finding that counts, and the command succeeded."""
        return not any(finding.failing for finding in self.findings) and self.status == 0

    def count(self, rule: str) -> int:
        """How many blocks or calls there are of a kind."""
        return sum(len(f.addresses) for f in self.findings if f.rule == rule)

    @property
    def not_freed_yet(self) -> int:
        """How many of the leaks are of modules that are still loaded, and may be none."""
        leaks = (f for f in self.findings if f.rule == "leak" and not f.failing)
        return sum(len(f.addresses) for f in leaks)


def from_watch(report: WatchReport, names: FrameNames) -> Iterator[Finding]:
    """The findings of a watch's session. While it is not over, what is not freed is a hint.

    :param names: knows the lines
    """
    for group in group_by_stack(report.leaks):
        said = "not freed" if report.over else "not freed yet"
        text = f"{_amount(e.size_bytes for e in group.events)} {said}"
        yield _finding("leak", group, names, text, failing=report.over)
    for group in group_by_stack(report.unallocated):
        count = len(group.events)
        text = f"{count} {'free' if count == 1 else 'frees'} of what is not known to be allocated"
        # Others may have allocated it, and left it to the module to free: a hint.
        yield _finding("unallocated-free", group, names, text, failing=group.stack.direct)
    for group in group_by_stack(report.freed_late):
        by = {_who(event.freed_by) for event in group.events if event.freed_by}
        amount = _amount(e.size_bytes for e in group.events)
        text = f"{amount} freed later by {', '.join(sorted(by))}"
        yield _finding("freed-late", group, names, text, failing=False)


def tell_lost(finding: Finding, lost: Collection[int]) -> Iterator[Finding]:
    """Part a hint at blocks that are not freed yet: nobody can free what nothing points to.

    :param lost: addresses of what nothing points to
    :return: a finding that counts for these blocks, and the hint for the others
    """
    if finding.rule != "leak" or finding.failing:
        yield finding
        return
    blocks = tuple(zip(finding.addresses, finding.sizes, strict=True))
    for said, failing in (("not freed, and nothing points there", True), ("not freed yet", False)):
        part = [(address, size) for address, size in blocks if (address in lost) == failing]
        if part:
            addresses, sizes = zip(*part, strict=True)
            text = f"{_amount(sizes)} {said}"
            yield replace(finding, message=text, addresses=addresses, sizes=sizes, failing=failing)


def lines_of(stack: Stack, names: FrameNames) -> tuple[Trace, ...]:
    """A stack with its source lines."""
    lines = []
    for frame in stack.frames:
        place = names.line(frame) or ("", 0)
        lines.append(Trace(frame.text, frame.address, *place))
    return tuple(lines)


def _finding(
    rule: str, group: Group, names: FrameNames, message: str, *, failing: bool = True
) -> Finding:
    stack, first = group.stack, group.events[0]
    lines = lines_of(stack, names)
    site = lines[stack.frames.index(stack.site)] if stack.site else None
    by = next((event.freed_by for event in group.events if event.freed_by), None)
    return Finding(
        rule,
        stack.module,
        message,
        tuple(event.address for event in group.events),
        tuple(event.size_bytes for event in group.events),
        lines,
        site,
        lines_of(by, names) if by else (),
        first.comm,
        first.pid,
        first.time_ns,
        first.from_interrupt,
        stack.direct,
        failing,
    )


def _amount(sizes: Iterable[int]) -> str:
    all_sizes = tuple(sizes)
    count = len(all_sizes)
    blocks = "1 block" if count == 1 else f"{count} blocks"
    return f"{blocks} of {_bytes(all_sizes)}"


def _bytes(sizes: tuple[int, ...]) -> str:
    total = sum(sizes)
    if not all(sizes):
        return f"at least {total:,} bytes" if total else "unknown size"
    return f"{total:,} bytes in all" if len(sizes) > 1 else f"{total:,} bytes"


def _who(stack: Stack) -> str:
    return f"module {stack.module}" if stack.module else "the kernel"
