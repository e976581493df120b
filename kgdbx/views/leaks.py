"""Leaks as a table, and blocks of the heap as drgn objects, for one more look at what it shows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import drgn
from drgn.helpers.linux.percpu import per_cpu_ptr

from kgdbx.arch.registers import Registers
from kgdbx.errors import CommandError, Unsupported
from kgdbx.leaks.blocks import Block, BlockKind, Heap
from kgdbx.leaks.describe import Description, describe_block, typed_object
from kgdbx.leaks.heap import read_heap
from kgdbx.leaks.scan import Scan, scan_heap
from kgdbx.leaks.slab import ALLOCATED
from kgdbx.probes.value import Hex
from kgdbx.render import table
from kgdbx.session import Session
from kgdbx.trace.text import PLAIN, Style

__all__ = ("Leaks", "all_registers", "leak_functions", "leak_table", "report_leaks")

_WORD = 8
_LEAST_ADDRESS = 4096  # what is below is a number


class Leaks(list[drgn.Object]):
    """The leaks of a scan as pointers; shown as a numbered table.

    :ivar scan: which found them
    """

    def __init__(self, scan: Scan) -> None:
        super().__init__(_pointer(scan.heap, block, "", 0) for block in scan.leaks)
        self.scan = scan

    def __repr__(self) -> str:
        return self.text()

    def text(self, style: Style = PLAIN, limit: int | None = None) -> str:
        """The table, and how many there are.

        :param limit: of the rows
        """
        shown = self.scan.leaks[:limit]
        size = sum(block.size_bytes for block in self.scan.leaks)
        lines = [leak_table(self.scan.heap, shown, style, numbered=True)] if shown else []
        more = len(self.scan.leaks) - len(shown)
        lines += [f"and {more} more"] if more else []
        return "\n".join([*lines, f"{len(self)} blocks of {size:,} bytes that nothing points to"])


def all_registers(session: Session) -> Sequence[Registers]:
    """Registers of all vCPUs of a kernel that stands."""
    return [session.target.read_registers(cpu) for cpu in session.target.cpus()]


def report_leaks(session: Session) -> Leaks:
    """Scan a kernel that stands. What is found has numbers from then on, for ``leak(N)``.

    :raises Unsupported: if its RAM cannot be read
    """
    own = session.resident.engine.taken
    scan = scan_heap(session.kernel, _ram(session), all_registers(session), own)
    session.reported_leaks = scan.leaks
    return Leaks(scan)


def leak_table(
    heap: Heap, blocks: Iterable[Block], style: Style = PLAIN, *, numbered: bool = False
) -> str:
    """Blocks as a table, with what may be told of each.

    :param numbered: with numbers, from 1
    """
    columns = ["num", "address", "bytes", "cache", "what"]
    rows = []
    for number, block in enumerate(blocks, 1):
        about = _told(describe_block(heap, block))
        rows.append((number, Hex(block.address), block.size_bytes, block.cache, about))
    first = 0 if numbered else 1
    return table(columns[first:], [row[first:] for row in rows], style)


def leak_functions(session: Session, *, standing: bool = False) -> dict[str, Callable[..., Any]]:
    """What Python on a kernel has for its heap: ``leak(N)``, ``leak(ADDRESS)`` and ``leaks()``.

    :param standing: the kernel does not run on between calls: its heap is read once
    """
    known: list[Heap] = []

    def heap_now() -> Heap:
        heap = known[0] if known else read_heap(session.kernel, _ram(session))
        known[:] = [heap] if standing else []
        return heap

    def leak(which: int, type: str | drgn.Type = "", cpu: int = 0) -> drgn.Object:  # noqa: A002
        """A block as a pointer: ``leak(1)``, ``leak(0xffff8eac41155b80)``.

        :param which: number in the last report, or an address in the block; of per-CPU memory what
            ``alloc_percpu()`` gave
        :param type: such as ``"struct dentry"``; without it the one that goes by the name of the
            block's cache, and if there is none, an array of words
        :param cpu: whose copy of per-CPU memory
        :raises CommandError: if nothing is allocated there, or there is no leak of that number
        """
        address = int(which)
        if 0 <= address < _LEAST_ADDRESS:
            address = _numbered(session, address)
        heap = heap_now()
        return _pointer(heap, _block_at(heap, address), type, cpu)

    def leaks() -> Leaks:
        """All blocks that nothing points to, as the kernel stands now, as pointers."""
        return report_leaks(session)

    return {"leak": leak, "leaks": leaks}


# The address of a leak of the last report; the first to ask has one made.
def _numbered(session: Session, number: int) -> int:
    reported = session.reported_leaks or report_leaks(session).scan.leaks
    if not 0 < number <= len(reported):
        raise CommandError(f"there is no leak {number}: leaks() has {len(reported)}")
    return reported[number - 1].address


def _told(about: Description) -> str:
    text = f'"{about.text}"' if about.text else ""
    symbols = f"-> {', '.join(about.symbols)}" if about.symbols else ""
    return " ".join(part for part in (about.type_name, text, symbols) if part)


def _ram(session: Session) -> Any:
    if session.ram is None:
        raise Unsupported("the heap is read from the RAM of a VM of ours, or from a core file")
    return session.ram


def _block_at(heap: Heap, address: int) -> Block:
    node = heap.node_of(address)
    if node is None:
        node = heap.percpu_node_of(address)
    if node is None or not heap.node_flags[node] & ALLOCATED:
        what = "what is there is free" if node is not None else "it is in no block of the heap"
        raise CommandError(f"nothing is allocated at {address:#x}: {what}")
    return heap.block(node)


def _pointer(heap: Heap, block: Block, wanted: str | drgn.Type, cpu: int) -> drgn.Object:
    program = heap.kernel.program
    guess = typed_object(heap, block)
    if wanted:
        type_ = program.type(wanted) if isinstance(wanted, str) else wanted
    elif guess is not None:
        type_ = guess.type_
    else:
        word = program.pointer_type(program.void_type())  # shown with the symbol that it is
        type_ = program.array_type(word, block.size_bytes // _WORD)
    found = drgn.Object(program, program.pointer_type(type_), block.address)
    if block.kind is BlockKind.PERCPU:
        found = per_cpu_ptr(found, cpu)
    return found
