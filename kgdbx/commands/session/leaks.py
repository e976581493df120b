"""leaks: memory of the attached kernel that nothing points to."""

import argparse
from collections.abc import Iterable

from kgdbx.commands.context import Context
from kgdbx.commands.registry import argument
from kgdbx.commands.session import SESSION_COMMANDS
from kgdbx.leaks.blocks import Block, Heap
from kgdbx.leaks.dangling import Dangling
from kgdbx.leaks.describe import describe_block
from kgdbx.leaks.snapshot import Growth
from kgdbx.probes.value import Hex
from kgdbx.render import table
from kgdbx.trace.text import PLAIN, Style
from kgdbx.views.leaks import report_leaks

__all__ = ("block_record", "dangling_table", "growth_table")


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


@SESSION_COMMANDS.command(
    name="leaks",
    summary="Scan the whole kernel for memory that nothing points to.",
    description="Looks at variables, stacks, registers and all allocated memory, as they are at\n"
    "this stop. 'kgdbx leaks' on the command line has more. leak(N) of Python opens a block.",
    arguments=(argument("--limit", type=int, default=50, metavar="N", help="lines (default 50)"),),
    needs_session=True,
)
def leaks(context: Context, args: argparse.Namespace) -> None:
    found = report_leaks(context.session)
    for error in found.scan.errors:
        context.write(f"not looked at: {error}")
    context.write(found.text(context.style, args.limit))
