"""leaks: memory of the attached kernel that nothing points to."""

import argparse
from collections.abc import Iterable, Sequence

from kgdbx.arch.registers import Registers
from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.errors import Unsupported
from kgdbx.leaks.blocks import Block, Heap
from kgdbx.leaks.dangling import Dangling
from kgdbx.leaks.describe import Description, describe_block
from kgdbx.leaks.scan import Scan, scan_heap
from kgdbx.leaks.snapshot import Growth
from kgdbx.probes.value import Hex
from kgdbx.render import table
from kgdbx.session import Session
from kgdbx.trace.text import PLAIN, Style

__all__ = ("all_registers", "block_record", "dangling_table", "growth_table", "leak_table")


def all_registers(session: Session) -> Sequence[Registers]:
    """Registers of all vCPUs of a kernel that stands."""
    return [session.target.read_registers(cpu) for cpu in session.target.cpus()]


def leak_table(heap: Heap, blocks: Iterable[Block], style: Style = PLAIN) -> str:
    """Blocks as a table, with what may be told of each."""
    rows = []
    for block in blocks:
        about = describe_block(heap, block)
        rows.append((Hex(block.address), block.size_bytes, block.cache, _told(about)))
    return table(("address", "bytes", "cache", "what"), rows, style)


def growth_table(growth: Iterable[Growth], style: Style = PLAIN) -> str:
    """Growth of caches as a table."""
    rows = [(g.objects, g.more_objects, g.more_bytes, g.cache) for g in growth]
    return table(("objects", "more", "more bytes", "cache"), rows, style)


def dangling_table(found: Iterable[Dangling], style: Style = PLAIN) -> str:
    """Pointers into a module that is gone as a table."""
    rows = [(Hex(d.address), Hex(d.value), Hex(d.offset), d.place) for d in found]
    return table(("pointer at", "points to", "offset", "in"), rows, style)


def block_record(heap: Heap, block: Block) -> dict[str, object]:
    """A block as a JSON object."""
    about = describe_block(heap, block)
    return {
        "kind": block.kind.value,
        "cache": block.cache,
        "address": hex(block.address),
        "bytes": block.size_bytes,
        "type": about.type_name,
        "text": about.text,
        "symbols": list(about.symbols),
    }


def _told(about: Description) -> str:
    text = f'"{about.text}"' if about.text else ""
    symbols = f"-> {', '.join(about.symbols)}" if about.symbols else ""
    return " ".join(part for part in (about.type_name, text, symbols) if part)


@SESSION_COMMANDS.command(
    name="leaks",
    summary="Scan the whole kernel for memory that nothing points to.",
    description="Looks at variables, stacks, registers and all allocated memory, as they are at\n"
    "this stop. 'kgdbx leaks' on the command line has more.",
    arguments=(argument("--limit", type=int, default=50, metavar="N", help="lines (default 50)"),),
    needs_session=True,
)
def leaks(context: Context, args: argparse.Namespace) -> None:
    session = context.session
    if session.ram is None:
        raise Unsupported("a leak scan needs the RAM of a VM of ours; attach by its name")
    own = session.resident.engine.taken
    scan: Scan = scan_heap(session.kernel, session.ram, all_registers(session), own)
    for error in scan.errors:
        context.write(f"not looked at: {error}")
    if scan.leaks:
        context.write(leak_table(scan.heap, scan.leaks[: args.limit], context.style))
    size = sum(block.size_bytes for block in scan.leaks)
    context.write(f"{len(scan.leaks)} blocks of {size:,} bytes that nothing points to")
